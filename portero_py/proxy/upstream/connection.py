"""What a pool asks of a connection to a backend, whatever its HTTP version.

A class and no `typing.Protocol`, because the compiled build calls a method of a class by its place. It is
an asyncio protocol already, because a compiled class has one base.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portero_py.proxy.endpoints import ResponseSide, Upstream


class UpstreamConnection(asyncio.Protocol):
    """A connection to one backend, which is in its pool or carries an exchange.

    The pool writes both times (seconds of the monotonic clock): when the connection came back to it, and when
    it has been idle for too long. For the rest `deadline` is the connection's own, as `Deadlines` says.
    """

    __slots__ = ("deadline", "idle_since")

    deadline: float
    idle_since: float

    def is_usable(self) -> bool:
        """Say whether another exchange may be sent here, as far as can be known."""
        raise NotImplementedError

    def upstream(self) -> Upstream | None:
        """Return the upstream for one more exchange, which sends its head now; None when it is not usable."""
        raise NotImplementedError

    def carried(self) -> ResponseSide | None:
        """Return the exchange that it carries; of several, this is asked of each stream."""
        raise NotImplementedError

    def close(self) -> None:
        """End the connection, which is idle."""
        raise NotImplementedError
