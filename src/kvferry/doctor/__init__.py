"""The doctor: facts from files, processes, sockets, logs and the running cluster; pure checks; a report."""

from __future__ import annotations

from kvferry.doctor.checks import CHECKS, examine
from kvferry.doctor.facts import Facts
from kvferry.doctor.findings import Finding
from kvferry.doctor.gather import gather

__all__ = ["CHECKS", "Facts", "Finding", "examine", "gather"]
