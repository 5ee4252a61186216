"""The two backends of the demo: small aiohttp applications that show what reaches them."""

from __future__ import annotations

import asyncio
import html
from typing import Final

from aiohttp import WSMsgType, web

#: What portero adds to a request, in the order in which it is shown.
_SHOWN: Final = ("Host", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Request-ID")

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: portero-py demo</title>
<style>
  body {{ font: 1.05rem/1.6 system-ui, sans-serif; max-width: 40rem; margin: 12vh auto; padding: 0 1.5rem;
         color: #223; background: #fafaf7; }}
  h1 {{ font-weight: 600; border-left: .5rem solid {colour}; padding-left: 1rem; }}
  th {{ text-align: left; font-weight: 500; padding-right: 2rem; color: #667; vertical-align: top; }}
  td {{ font-family: ui-monospace, monospace; overflow-wrap: anywhere; }}
</style>
<h1>Hello from {name}</h1>
<p>This page came through portero-py. Reload it: the backends of a service take turns.</p>
<table>{rows}</table>
<p><a href="/events">Server-sent events</a>, streamed as they come.</p>
</html>
"""


class DemoBackend:
    """One backend: `/` and every other path shows the request, `/events` streams, `/ws` echoes."""

    def __init__(self, name: str) -> None:
        self._name = name
        app = web.Application()
        app.router.add_get("/events", self._events)
        app.router.add_get("/ws", self._echo)
        app.router.add_route("*", "/{path:.*}", self._show)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self, host: str) -> int:
        """Serve on a free port of `host`; returns the port."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def close(self) -> None:
        await self._runner.cleanup()

    # Private

    async def _show(self, request: web.Request) -> web.Response:
        version = f"HTTP/{request.version.major}.{request.version.minor}"
        rows = [("backend", self._name), ("request", f"{request.method} {request.raw_path} {version}")]
        rows += [(name, request.headers[name]) for name in _SHOWN if name in request.headers]
        if "text/html" not in request.headers.get("Accept", ""):
            lines = [f"Hello from {self._name}", *(f"  {name + ':':18} {value}" for name, value in rows[1:])]
            return web.Response(text="\n".join(lines) + "\n")
        cells = (f"<tr><th>{html.escape(name)}<td>{html.escape(value)}" for name, value in rows)
        page = _PAGE.format(name=html.escape(self._name), colour=html.escape(self._name), rows="".join(cells))
        return web.Response(text=page, content_type="text/html")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await stream.prepare(request)
        for number in range(1, 6):
            await stream.write(f"data: event {number} of 5 from {self._name}\n\n".encode())
            await asyncio.sleep(1)
        return stream

    async def _echo(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await socket.send_str(f"{self._name}: {message.data}")
        return socket
