"""Answers for which a caller waits: their head goes out at once, their body when there is something to say.

The rules
- So a caller can tell a portero that waits from one that is dead: status 200 comes at once, and what is wrong
  with a request is said before that, with its status. Whoever wants no wait is answered as ever.
- Who waits keeps a connection. There are at most half as many as the API has (`places`): whoever would be one
  too many is refused before anything is done for him. So renewals always come in.
- A caller that hangs up waits no longer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import orjson
from aiohttp import web

from portero_py.control.api.answers import NO_STORE, answer
from portero_py.control.open_server import Door
from portero_py.errors import TooManyWaits

#: Seconds that an answer may come late: a worker that hangs delays a look, and the answer has to be taken.
LATE: Final = 30.0


class Waits:
    """The callers that wait, at one door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._taken = 0

    @property
    def places(self) -> int:
        """How many may wait at a time."""
        return max(self._door.most // 2, 1)

    @contextlib.contextmanager
    def place(self, seconds: float) -> Iterator[None]:
        """A place for one who wants to wait, if he does. Raises TooManyWaits."""
        if not seconds:
            yield
            return
        if self._taken >= self.places:
            raise TooManyWaits(f"{self._taken} callers wait already: come again, or do not wait")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def answer(
        self,
        request: web.Request,
        seconds: float,
        over: asyncio.Future[int],
        say: Callable[[int], dict[str, Any]],
    ) -> web.StreamResponse:
        """Answer with what `say` makes of what `over` brings, within `seconds`."""
        try:
            if not seconds:
                return answer(say(await over))
            lost = self._door.may_take(request, seconds + LATE)
            response = web.StreamResponse(headers={"Content-Type": "application/json", **NO_STORE})
            with contextlib.suppress(ConnectionError):  # he has hung up
                await response.prepare(request)
                ends: tuple[asyncio.Future[Any], ...] = (over, lost)
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if over.done() and not lost.done():
                    await response.write_eof(orjson.dumps(say(over.result())))
            return response
        finally:
            over.cancel()
