"""What the limits turn away: counted each time, logged once a second.

Whoever floods a proxy must not be able to flood its log as well. The first refusal for a reason is a line of
its own; those of the second after it are one line together, and so on until a second has none.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from portero_py.core.counters import Counters

#: Seconds between two lines for one reason.
PAUSE: Final = 1.0

#: The limits, as the metric and the log name them: what became of whoever was over one.
CONNECTIONS: Final = "connections"
LISTENER_CONNECTIONS: Final = "listener_connections"
CLIENT_CONNECTIONS: Final = "client_connections"
DESCRIPTORS: Final = "descriptors"
HANDSHAKES: Final = "handshakes"
BODY_RATE: Final = "body_rate"
BUFFERED_BYTES: Final = "buffered_bytes"
RATE_LIMIT: Final = "rate_limit"

_MEANINGS: Final[Mapping[str, str]] = {
    CONNECTIONS: "as many connections as limits.connections allows: other clients wait",
    LISTENER_CONNECTIONS: "as many connections as limits.connections_per_listener allows: other clients wait",
    CLIENT_CONNECTIONS: "a connection over limits.connections_per_client was closed",
    DESCRIPTORS: "as many clients as the limit of open files allows: others wait",
    HANDSHAKES: "a connection over limits.handshakes_per_client was closed",
    BODY_RATE: "a request whose body came slower than limits.body_rate was ended",
    BUFFERED_BYTES: "a connection that did not move was ended: limits.buffered_bytes are used up",
    RATE_LIMIT: "a request over a rate_limit of its service was refused",
}

_log = logging.getLogger(__name__)


class Refusals:
    """Counts in `counters`, by reason, and logs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, counters: Counters) -> None:
        self._loop = loop
        self._counters = counters
        self._more: dict[str, int] = {}  # reason -> how many since the last line, which is not long ago
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def count(self, reason: str, who: str = "") -> None:
        """Something was refused for `reason`; `who` is worth a word in the log, if this is the first."""
        self._counters.refused[reason] += 1
        if reason in self._more:
            self._more[reason] += 1
            return
        _log.warning("%s%s", _MEANINGS[reason], f" ({who})" if who else "")
        self._wait(reason)

    def close(self) -> None:
        """Log nothing any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    # Private

    def _wait(self, reason: str) -> None:
        self._more[reason] = 0
        self._timers[reason] = self._loop.call_later(PAUSE, self._look, reason)

    def _look(self, reason: str) -> None:
        more = self._more.pop(reason)
        del self._timers[reason]
        if more:
            _log.warning("%s: %d more in the last second", reason, more)
            self._wait(reason)
