"""An aiohttp server that strangers may talk to: bounded in connections and in time, and quiet.

aiohttp waits for a request's head as long as the client likes, and logs a traceback for every malformed one.
On a public port the first costs file descriptors that the data plane needs, the second fills the disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

#: Seconds that a connection may live, whatever it does: a redirect takes one round trip.
LIFETIME: Final = 30.0

#: Seconds that a connection may wait for its next request.
KEEP_ALIVE: Final = 5.0

MAX_CONNECTIONS: Final = 4096


class _NotForMalformed(logging.Filter):
    """Lets everything pass but aiohttp's tracebacks of requests that were no HTTP."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


#: For aiohttp's `logger`: bugs are logged, other people's mistakes are not.
quiet_logger: Final = logging.getLogger("portero_py.control.aiohttp")
quiet_logger.addFilter(_NotForMalformed())


class OpenServer(web.Server):
    """Answers every request with `answer`, whatever its target."""

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        lifetime: float = LIFETIME,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        super().__init__(
            answer,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEP_ALIVE,
            logger=quiet_logger,
        )
        self._lifetime = lifetime
        self._max_connections = max_connections
        self._ends: dict[object, asyncio.TimerHandle] = {}  # connection -> when it is aborted

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Take a connection, or abort it when there are too many."""
        super().connection_made(handler, transport)
        if len(self._ends) >= self._max_connections:
            transport.abort()
            return
        self._ends[handler] = asyncio.get_running_loop().call_later(self._lifetime, transport.abort)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        end = self._ends.pop(handler, None)
        if end is not None:
            end.cancel()
        super().connection_lost(handler, exc)
