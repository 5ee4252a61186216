"""A backend that joins portero by itself: an aiohttp application and a registrar.

Start a proxy, then, with the same secrets in the environment:

    export PORTERO_REGISTER_SECRET=... PORTERO_JWT_HMAC_KEY=...
    python examples/backend.py app.example

It takes a free port, registers it, renews the lease while it serves, and gives it back on Ctrl-C or SIGTERM:
then it serves on until its last response is out, for half a minute at most, and ends.
`PORTERO_REGISTER_URL` names another registration API than the one on this machine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from aiohttp import web

from portero_py.client.registrar import Api, Registrar, Registration

HOST = "::1"


async def hello(request: web.Request) -> web.Response:
    client = request.headers.get("X-Forwarded-For", "somebody")
    return web.Response(text=f"Hello {client}, you asked {request.host} for {request.path}\n")


async def serve(service_name: str) -> None:
    app = web.Application()
    app.router.add_get("/{path:.*}", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    port = runner.addresses[0][1]

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    api = Api(
        url=os.environ.get("PORTERO_REGISTER_URL", "http://127.0.0.1:18080"),
        secret=os.environ["PORTERO_REGISTER_SECRET"],
        hmac_key=os.environ["PORTERO_JWT_HMAC_KEY"],
    )
    try:
        async with Registrar(api, Registration(service_name, HOST, port)):
            await stop.wait()
    finally:
        # The lease was given back first: what was on its way has found the backend serving.
        await runner.cleanup()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asyncio.run(serve(sys.argv[1] if len(sys.argv) > 1 else "app.example"))
