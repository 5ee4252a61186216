"""A worker's end of the feed, when control is another process: tables in, counters out.

The rules
- The connection is made anew whenever it ends: control has died, and the next one will accept. Until then
  the worker serves by what it has. A new control process sends everything from the beginning.
- An update is applied, then acknowledged: control answers a POST on the strength of that. What the worker
  cannot take is logged, counted and not acknowledged; the next update builds on it all the same, and the
  worker goes on with what it had.
- Counters go out every second, or less often when they are so many that this would cost more than a
  fiftieth of the worker's time; and whenever control asks.
- A control process that does not read is not written to: nothing grows here when it hangs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol, cast

from portero_py.core.certificates import CertificateTable
from portero_py.core.challenges import Challenges
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import FeedError
from portero_py.feed.messages import (
    Ack,
    Ask,
    AskCertificates,
    AskStandings,
    CertificateUpdate,
    Counted,
    Departed,
    FrameReader,
    Hello,
    Message,
    Serving,
    Standings,
    TableUpdate,
    Unknown,
    encode,
)

if TYPE_CHECKING:
    from portero_py.core.counters import Counters
    from portero_py.core.health import Evidence
    from portero_py.core.model import Standing

#: Seconds between two reports of counters, at least.
REPORT_SECONDS: Final = 1.0
#: The part of its time that a worker spends on them, at most.
REPORT_SHARE: Final = 0.02
#: Seconds between two attempts to connect.
RETRY_SECONDS: Final = 0.05
#: Seconds that the last counters may take at the end.
GOODBYE_SECONDS: Final = 1.0
#: Bytes that may wait for a control process that does not read before counters are held back.
MAX_UNSENT: Final = 1 << 20

_log = logging.getLogger(__name__)


class Fed(Protocol):
    """The worker, as the feed sees it."""

    @property
    def counters(self) -> Counters: ...

    def apply(self, table: RoutingTable) -> None: ...

    def apply_certificates(self, certificates: CertificateTable) -> None: ...

    def apply_challenges(self, challenges: Challenges) -> None: ...

    def standings(self, service: str) -> list[Standing]: ...


class FeedClient:
    """Feeds `worker`, the one with that `number`, from the unix socket at `path`.

    `run` connects again and again until it is cancelled. `clock` counts seconds.
    """

    def __init__(self, worker: Fed, path: str, number: int, clock: Callable[[], float]) -> None:
        # process
        self._worker = worker
        self._path = path
        self._number = number
        self._clock = clock
        self._table = RoutingTable()
        self._certificates = CertificateTable()
        self._challenges_version = 0  # ours: a new control process counts from the start
        self._departed = Departed()
        self._serving = False
        self._supplied = asyncio.Event()
        # connection
        self._connection: _Connection | None = None

    def presents(self, certificates: CertificateTable) -> None:
        """Before `run`: the worker has had these from somebody else, and control may ask for them."""
        self._certificates = certificates

    async def run(self) -> None:
        """Stay connected."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, self._connection = await loop.create_unix_connection(
                    lambda: _Connection(self._received), self._path
                )
            except OSError as error:
                _log.debug("control cannot be reached: %s", error)
            else:
                connection = self._connection
                try:
                    connection.send(self._hello())
                    await self._report_until_lost(connection)
                except Exception:  # a bug: a worker without a feed would serve an old table for ever
                    _log.exception("the feed begins anew")
                    self._worker.counters.errors[FeedError.reason] += 1
                    connection.close()
                self._connection = None
                _log.debug("the connection to control ended")
            await asyncio.sleep(RETRY_SECONDS)

    async def supplied(self) -> None:
        """Wait until the worker has its first routing table, and the certificates before it."""
        await self._supplied.wait()

    def serving(self) -> None:
        """Tell control that the worker accepts connections."""
        self._serving = True
        self._send(Serving())

    def found(self, evidence: Evidence) -> None:
        """Tell control that a backend fails; when there is none, it is told by the next one."""
        self._send(evidence)

    async def close(self) -> None:
        """Send the last counters. To be called when `run` was cancelled."""
        connection = self._connection
        if connection is not None:
            connection.send(self._counted())
            connection.close()
            await asyncio.wait([connection.lost], timeout=GOODBYE_SECONDS)

    # Private

    def _counted(self) -> Counted:
        counters = self._worker.counters
        counters.tasks = len(asyncio.all_tasks())
        return Counted(counters)

    def _hello(self) -> Hello:
        table = TableUpdate.between(None, self._table)
        return Hello(self._number, self._serving, table, self._worker.counters, self._departed)

    async def _report_until_lost(self, connection: _Connection) -> None:
        pause = REPORT_SECONDS
        while True:
            await asyncio.wait([connection.lost], timeout=pause)
            if connection.lost.done():
                return
            begun = self._clock()
            if connection.unsent <= MAX_UNSENT:
                connection.send(self._counted())
            pause = max(REPORT_SECONDS, (self._clock() - begun) / REPORT_SHARE)

    def _send(self, message: Message, number: int = 0) -> None:
        if self._connection is not None:
            self._connection.send(message, number)

    def _received(self, connection: _Connection, number: int, message: Message) -> None:
        worker = self._worker
        try:
            if isinstance(message, TableUpdate):
                self._table = message.applied_to(self._table)
                worker.apply(self._table)
                self._supplied.set()
            elif isinstance(message, CertificateUpdate):
                self._certificates = message.applied_to(self._certificates)
                worker.apply_certificates(self._certificates)
            elif isinstance(message, Challenges):
                self._challenges_version += 1
                worker.apply_challenges(replace(message, version=self._challenges_version))
            elif isinstance(message, Departed):
                self._departed = message
            elif isinstance(message, Ask):
                connection.send(self._counted())
            elif isinstance(message, AskStandings):
                connection.send(Standings(tuple(worker.standings(message.service))), number)
                return  # that is the acknowledgement too
            elif isinstance(message, AskCertificates):
                names = frozenset(message.names)
                held = [each for each in self._certificates.certificates if each.name in names]
                connection.send(CertificateUpdate.between(None, CertificateTable(held)))
            elif isinstance(message, Unknown):
                _log.debug("the feed: control is of another version")
            else:
                raise FeedError(f"control does not say {type(message).__name__}")  # noqa: TRY301 - passed on below
        except FeedError:
            raise
        except Exception:  # a bug: not acknowledged, so control does not take it for in force
            _log.exception("the feed: %s cannot be applied", type(message).__name__)
            worker.counters.errors[FeedError.reason] += 1
        else:
            if number:
                connection.send(Ack(), number)


class _Connection(asyncio.Protocol):
    """One connection to one control process. `lost` is done when it has ended."""

    def __init__(self, received: Callable[[_Connection, int, Message], None]) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = received
        self._frames = FrameReader()
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)

    @property
    def unsent(self) -> int:
        """Bytes that control has not read yet."""
        return self._transport.get_write_buffer_size()

    def send(self, message: Message, number: int = 0) -> None:
        """Send one frame, if the connection lives."""
        if not self.lost.done() and not self._transport.is_closing():
            self._transport.write(encode(message, number))

    def close(self) -> None:
        """End it when everything is sent."""
        self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for number, message in self._frames.feed(data):
                self._received(self, number, message)
        except FeedError as error:
            _log.error("the feed: %s", error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
