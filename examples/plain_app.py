"""A web application that knows nothing of portero: it serves until SIGTERM, and ends when it has answered.

examples/compose.yaml runs several of it. GET / tells who answers, /slow the same after a second, /up that it
is well.
"""

from __future__ import annotations

import asyncio
import os
import socket

from aiohttp import web

#: Seconds that it has for its last answers: less than Docker gives it (`stop_grace_period`).
GRACE = 10


async def who(request: web.Request) -> web.Response:
    if request.path == "/slow":
        await asyncio.sleep(1)
    return web.Response(text=f"{socket.gethostname()}\n")


async def up(request: web.Request) -> web.Response:
    return web.Response(text="well\n")


def application() -> web.Application:
    app = web.Application()
    app.router.add_get("/up", up)
    app.router.add_get("/{path:.*}", who)
    return app


if __name__ == "__main__":
    web.run_app(
        application(),
        host=os.environ.get("HOST"),
        port=int(os.environ.get("PORT", "8000")),
        shutdown_timeout=GRACE,
        print=None,
    )
