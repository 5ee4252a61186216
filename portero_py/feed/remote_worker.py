"""One worker process as control sees it: a connection, and a subscriber of the feed.

The theory
- A connection is in order, so one number says it all: `Ack(n)` means that everything up to n is in force.
- A worker that does not answer within `ACK_SECONDS` is late: nobody waits for it until it has caught up. The
  supervisor sees from its heartbeat whether it hangs, and replaces it; nothing is decided here.
- What waits for a late worker is bounded: beyond `MAX_UNSENT` bytes nothing more is sent, and when it has
  caught up it gets one update from the table that it has to the newest.
- A question is answered in any case: when the worker is gone, with nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

from portero_py.core.counters import Counters
from portero_py.core.health import Evidence
from portero_py.errors import FeedError
from portero_py.feed.feed import ACK_SECONDS
from portero_py.feed.messages import (
    Ack,
    Ask,
    AskCertificates,
    AskStandings,
    CertificateUpdate,
    Counted,
    FrameReader,
    Hello,
    Serving,
    Standings,
    TableUpdate,
    Unknown,
    encode,
)

if TYPE_CHECKING:
    from portero_py.core.certificates import Certificate, CertificateTable
    from portero_py.core.challenges import Challenges
    from portero_py.core.model import Standing
    from portero_py.core.routing_table import RoutingTable
    from portero_py.feed.feed import InForce
    from portero_py.feed.messages import Departed, Message

#: Most bytes that wait for a worker that does not read.
MAX_UNSENT: Final = 32 << 20

_log = logging.getLogger(__name__)


class Gathering(Protocol):
    """What a worker's connection tells: `feed.server` is it."""

    def joined(self, worker: RemoteWorker, hello: Hello) -> None:
        """A worker has said hello. Raises FeedError when it had done so before."""

    def left(self, worker: RemoteWorker) -> None:
        """A worker is gone: dead, most likely."""

    def tell_serving(self) -> None:
        """Another number of workers serves, perhaps."""

    def found(self, evidence: Evidence) -> None:
        """A worker has seen how a backend does."""


class _Unanswered(NamedTuple):
    number: int
    sent_at: float
    answer: asyncio.Future[None]


class RemoteWorker(asyncio.Protocol):
    """The connection of one worker process: a subscriber of the feed."""

    def __init__(self, server: Gathering, *, is_guest: bool = False, came_by: int = -1) -> None:
        # connection
        self.is_guest = is_guest
        self.came_by = came_by
        self.counters = Counters()
        self.serving = False
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._frames = FrameReader()
        self._name = "a worker"
        self._is_gone = False
        self._number = 0
        self._unanswered: deque[_Unanswered] = deque()
        self._is_late = False
        self._asked: asyncio.Future[None] | None = None
        self._asked_standings: dict[int, asyncio.Future[list[Standing]]] = {}  # by the number of the question
        self._asked_certificates: asyncio.Future[tuple[Certificate, ...]] | None = None
        # what it was sent, and what it should have
        self._sent: RoutingTable | None = None
        self._table: RoutingTable | None = None
        self._certificates: CertificateTable | None = None

    # A subscriber

    def apply(self, table: RoutingTable) -> InForce:
        """Send what differs from the table that it has."""
        self._table = table
        if self._is_gone or self._transport.get_write_buffer_size() > MAX_UNSENT:
            return None  # when it is late by far: see `_acknowledged`
        answer = self._send(TableUpdate.between(self._sent, table))
        self._sent = table
        return answer

    def apply_certificates(self, certificates: CertificateTable) -> InForce:
        """Send the certificates that differ."""
        answer = self._send(CertificateUpdate.between(self._certificates, certificates))
        self._certificates = certificates
        return answer

    def apply_challenges(self, challenges: Challenges) -> InForce:
        """Send all of them: there are never many."""
        return self._send(challenges)

    def standings(self, service: str) -> asyncio.Future[list[Standing]]:
        """Ask for them: the answer; cancelled when it is gone."""
        answer: asyncio.Future[list[Standing]] = self._loop.create_future()
        if self._is_gone or self._transport.is_closing():
            answer.set_result([])  # its exchanges are gone with it
        elif self._transport.get_write_buffer_size() > MAX_UNSENT:
            answer.cancel()
        else:
            self._number += 1
            self._asked_standings[self._number] = answer
            self._write(AskStandings(service), self._number)
        return answer

    # What the server wants of it

    def has(self, table: RoutingTable) -> None:
        """It has that table already: differences will do (10,000 services cost it 0.1 s)."""
        self._sent = self._table = table

    def keep(self, departed: Departed) -> None:
        """Have it keep what others had counted."""
        self._write(departed)

    def ask(self) -> asyncio.Future[None]:
        """Ask for its counters: done when they have come."""
        if self._asked is None or self._asked.done():
            self._asked = self._loop.create_future()
            if self._is_gone:
                _done(self._asked)
            self._write(Ask())
        return self._asked

    def ask_certificates(self, names: list[str]) -> asyncio.Future[tuple[Certificate, ...]]:
        """Ask what it presents for these names: the answer, or nothing when it is gone. Once at a time."""
        answer = self._asked_certificates = self._loop.create_future()
        if self._is_gone or self._transport.is_closing():
            self._answer_certificates(())
        else:
            self._write(AskCertificates(tuple(names)))
        return answer

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for number, message in self._frames.feed(data):
                self._receive(number, message)
        except FeedError as error:
            _log.error("%s: %s", self._name, error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.serving = False
        self._is_gone = True
        while self._unanswered:
            _done(self._unanswered.popleft().answer)
        _done(self._asked)
        self._answer_certificates(())
        for asked in self._asked_standings.values():
            if not asked.done():
                asked.set_result([])
        self._asked_standings.clear()
        self._server.left(self)

    # Private

    def _receive(self, number: int, message: Message) -> None:
        if isinstance(message, Ack):
            self._acknowledged(number)
        elif isinstance(message, Counted):
            self.counters = message.counters
            _done(self._asked)
        elif isinstance(message, Hello):
            former = " of the version before" if self.is_guest else ""
            self._name = f"worker {message.worker}{former}"
            self.counters = message.counters
            self.serving = message.serving
            self._server.joined(self, message)
        elif isinstance(message, Serving):
            self.serving = True
            self._server.tell_serving()
        elif isinstance(message, CertificateUpdate):
            self._answer_certificates(message.changed)
        elif isinstance(message, Standings):
            asked = self._asked_standings.pop(number, None)
            if asked is not None and not asked.done():
                asked.set_result(list(message.standings))
            self._acknowledged(number)
        elif isinstance(message, Evidence):
            self._server.found(message)
        elif not isinstance(message, Unknown):
            raise FeedError(f"a worker does not say {type(message).__name__}")

    def _write(self, message: Message, number: int = 0) -> None:
        # What goes to a worker that is dying goes nowhere: `connection_lost` is about to say so.
        if not self._is_gone and not self._transport.is_closing():
            self._transport.write(encode(message, number))

    def _answer_certificates(self, held: tuple[Certificate, ...]) -> None:
        answer, self._asked_certificates = self._asked_certificates, None
        if answer is not None and not answer.done():
            answer.set_result(held)

    def _send(self, message: Message) -> InForce:
        if self._is_gone:
            return None
        self._number += 1
        self._write(message, self._number)
        answer: asyncio.Future[None] = self._loop.create_future()
        now = self._loop.time()
        self._unanswered.append(_Unanswered(self._number, now, answer))
        if not self._is_late and now - self._unanswered[0].sent_at > ACK_SECONDS:
            self._is_late = True
            _log.warning("%s does not answer: not waiting for it", self._name)
        return None if self._is_late else answer

    def _acknowledged(self, number: int) -> None:
        unanswered = self._unanswered
        while unanswered and unanswered[0].number <= number:
            _done(unanswered.popleft().answer)
        if not unanswered:
            if self._is_late:
                self._is_late = False
                _log.info("%s has caught up", self._name)
            if self._table is not self._sent and self._table is not None:
                self.apply(self._table)


def _done(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
