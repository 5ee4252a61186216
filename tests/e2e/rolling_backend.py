"""A backend for deploys: it joins by a registrar, and ends when that has left. What is in flight then is cut.

    python -m tests.e2e.rolling_backend SERVICE API-URL SECRET KEY

It writes `registered` when it is. SIGTERM lets it leave.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from aiohttp import WSMsgType, web

from portero_py.client.registrar import Api, Registrar, Registration


async def answer(request: web.Request) -> web.StreamResponse:
    """The body of the request, after as many seconds as the query says; a WebSocket is an echo."""
    if request.headers.get("Upgrade"):
        return await _echo(request)
    pause = float(request.query.get("pause", "0"))
    if request.method == "POST":
        return web.Response(body=await request.read())
    response = web.StreamResponse()
    response.content_length = 20
    await response.prepare(request)
    await response.write(b"0123456789")
    await asyncio.sleep(pause)
    await response.write(b"0123456789")
    return response


async def _echo(request: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
    return socket


async def _serve(service: str, url: str, secret: str, key: str) -> None:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    backend = Registration(service, "127.0.0.1", runner.addresses[0][1], ttl_seconds=3)
    async with Registrar(Api(url, secret, key), backend, drain_seconds=60) as registrar:
        await registrar.wait_registered()
        sys.stdout.write("registered\n")
        sys.stdout.flush()
        await stop.wait()
    os._exit(0)  # no good-bye to anybody


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
