"""Imports every module that registers faults or healthy clusters."""

from catalogue import (
    faults_devices,
    faults_logs,
    faults_network,
    faults_pool,
    faults_probe,
    faults_router,
    faults_servers,
    faults_stories,
    faults_transfer,
    healthy,
)

__all__ = [
    "faults_devices",
    "faults_logs",
    "faults_network",
    "faults_pool",
    "faults_probe",
    "faults_router",
    "faults_servers",
    "faults_stories",
    "faults_transfer",
    "healthy",
]
