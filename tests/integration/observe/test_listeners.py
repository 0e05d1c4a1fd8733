"""Real sockets: a taken port names the process that holds it."""

from __future__ import annotations

import os
import socket

from kvferry.errors import ConfigError
from kvferry.observe import holder_of_port, port_taken


def test_the_holder_of_a_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        holder = holder_of_port(port)
        assert holder is not None and holder.pid == os.getpid()
        error = port_taken("127.0.0.1", port, "router.port")
        assert isinstance(error, ConfigError)
        assert f"port {port}" in str(error) and f"pid {os.getpid()}" in str(error) and "router.port" in str(error)
    assert holder_of_port(port) is None
    assert "cannot see" in str(port_taken("127.0.0.1", port, "router.port"))
