"""What a process tells about itself: one-line structured logs, Prometheus metrics, port holders.

Every room above `protocol` uses this one, so that a request can be followed through all processes by its ids.
"""

from kvferry.observe.background import start_background
from kvferry.observe.listeners import LISTENING, PortHolder, holder_of_port, port_taken, tell_listening
from kvferry.observe.logs import Log, configure_logs, get_log
from kvferry.observe.metrics import (
    HandoffMetrics,
    InstanceMetrics,
    PoolMetrics,
    PoolReading,
    RequestMetrics,
    render_metrics,
)

__all__ = [
    "LISTENING",
    "HandoffMetrics",
    "InstanceMetrics",
    "Log",
    "PoolMetrics",
    "PoolReading",
    "PortHolder",
    "RequestMetrics",
    "configure_logs",
    "get_log",
    "holder_of_port",
    "port_taken",
    "render_metrics",
    "start_background",
    "tell_listening",
]
