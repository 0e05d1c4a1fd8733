"""`/metrics` of a node over HTTP, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from kvferry.observe import port_taken


class MetricsServer:
    """Serves what `render` gives: a body and its content type. On the node's event loop."""

    def __init__(self, render: Callable[[], tuple[bytes, str]], host: str, port: int) -> None:
        self._render, self._host, self._port = render, host, port
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)

    async def start(self) -> str:
        """Bind and serve; returns the URL. Raises: ConfigError if the port is taken."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            raise port_taken(self._host, self._port, "pool.metrics_port") from error
        host, port = self._runner.addresses[0][:2]
        return f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"

    async def close(self) -> None:
        """Give the port back. Idempotent."""
        await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        body, content_type = self._render()
        return web.Response(body=body, headers={"Content-Type": content_type})
