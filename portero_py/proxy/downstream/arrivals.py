"""The connections that are there: at which listener each arrived, whose it is, and who may not come in.

The rules
- A connection is written down once, when it arrives, before its TLS handshake, under the name of whoever has
  its transport; when that changes (the handshake is complete, HTTP/2 was found, it is leaving) it is
  `passed_on`. It is struck out once, when the last of them is gone. So a count is right whatever way a
  connection ends.
- At the limit of a listener clients wait (`doors`): a connection that is accepted there already comes in.
  Over a client's own limits its connection is closed at once: it costs no handshake.
- A trusted proxy stands for many clients ("" for its name here): their limits are not for it.
- A limit that is set while the proxy runs concerns what arrives from then on: who was not counted as the
  client's is not given back either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from portero_py.core.limits import Clients, Rates
from portero_py.proxy.refusals import CLIENT_CONNECTIONS, HANDSHAKES

if TYPE_CHECKING:
    import asyncio

    from portero_py.config.model import Limits
    from portero_py.core.limits import SharedCounts

#: Seconds between two looks for clients whose rates can be forgotten.
SWEEP_SECONDS: Final = 2.0


class Place(Protocol):
    """A listener, as what arrives there sees it."""

    @property
    def secure(self) -> bool:
        """Whether a TLS handshake comes first."""

    def came(self) -> None:
        """There is one connection more."""

    def went(self) -> None:
        """There is one less."""


class Arrivals:
    """The connections of one worker; `shared` tells what the other workers have of each client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, shared: SharedCounts | None = None) -> None:
        # process
        self._loop = loop
        self._there: dict[object, tuple[Place, str]] = {}
        self._clients = Clients(shared)
        self._rates = Rates()
        self._sweeping: asyncio.TimerHandle | None = None
        # configuration
        self._per_client = 0
        self._handshakes = 0
        self._share = 0.0

    def configure(self, limits: Limits, workers: int) -> None:
        """Take over the limits. A burst may be of one second, even if one worker gets all of it."""
        self._per_client = limits.connections_per_client
        self._handshakes = limits.handshakes_per_client
        self._share = limits.handshakes_per_client / workers

    @property
    def by_client(self) -> bool:
        """Whether it matters which client it is."""
        return self._per_client != 0 or self._handshakes != 0

    def __len__(self) -> int:
        return len(self._there)

    @property
    def clients(self) -> int:
        """How many clients are remembered, because of their connections or their handshakes."""
        return len(self._clients) + len(self._rates)

    def arrive(self, who: object, place: Place, client: str, now: float) -> str:
        """Write down a connection and return "", or the reason for which it may not come in."""
        if client:
            if (
                self._handshakes
                and place.secure
                and not self._rates.take(client, self._share, self._handshakes, now)
            ):
                return HANDSHAKES
            if self._handshakes and self._sweeping is None:
                self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)
            if not self._per_client:
                client = ""
            elif not self._clients.enter(client, self._per_client):
                return CLIENT_CONNECTIONS
        self._there[who] = place, client
        place.came()
        return ""

    def place_of(self, who: object) -> Place | None:
        """Return where it arrived."""
        there = self._there.get(who)
        return None if there is None else there[0]

    def passed_on(self, former: object, successor: object) -> None:
        """Another one has the transport now. Harmless when `former` never arrived, as in most tests."""
        there = self._there.pop(former, None)
        if there is not None:
            self._there[successor] = there

    def leave(self, who: object) -> None:
        """It is gone. Harmless when it never arrived, or was passed on."""
        there = self._there.pop(who, None)
        if there is not None:
            place, client = there
            if client:
                self._clients.leave(client)
            place.went()

    def close(self) -> None:
        """Look for nothing any more."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    # Private

    def _sweep(self) -> None:
        self._rates.forget_quiet(self._loop.time())
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep) if len(self._rates) else None
