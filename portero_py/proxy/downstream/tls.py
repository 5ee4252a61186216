"""TLS between a client's socket and its protocol: bytes in, records out, and the end said properly.

A protocol to the socket's transport, and a transport to the HTTP protocol above. The loops bring such a
layer; this one knows what it is used for
- A record is read once: the loops ask again until OpenSSL raises "want read", 3 of 16 µs of a small request.
- It has no buffers of its own. uvloop's keeps 256 KiB of address space a connection, and what its use makes
  dirty: 49 KB for an idle connection; here it is what OpenSSL takes.
- The handshake's deadline is on the worker's wheel: no timer a connection.
- A session ticket leaves with the first response instead of in a packet of its own.

States
    HANDSHAKE  the client has `seconds` for it
    OPEN       the protocol above is there
    ENDING     our close_notify and a FIN are out (or an alert): what still comes is thrown away
    CLOSED     the socket's transport is closing

The traps
- A client that ends its side of TLS is gone, as on most servers: nothing is owed to it (RFC 8446, 6.1 would
  let it read on). One that ends its TCP connection without a word in TLS is gone too; bodies are framed, so
  that a truncation cannot be taken for an end.
- An alert is followed by FIN and not by a close: unread bytes would make that a reset, which overtakes it.
- OpenSSL answers a KeyUpdate in `_outgoing`; it leaves with whatever is written next, which is soon enough,
  unless there are thousands of them: who asks for that many and takes no answer is cut off.
- A client that is gone may leave bytes untaken, and a transport that closes waits for them for ever. So the
  protocol above hears of the end (`eof_received`): it closes, and has a deadline.
"""

from __future__ import annotations

import asyncio
import ssl
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portero_py.proxy.deadlines import DeadlineWheel
    from portero_py.proxy.downstream.sni import FrontSSLObject, FrontTls

#: The longest plaintext of a record: a larger read would not return more.
RECORD: Final = 16_384
#: Encrypted bytes that are given to OpenSSL at once. Its buffers never shrink: with whole reads of 256 KiB a
#: connection that has moved one large body would keep 340 KB for as long as it is idle.
PIECE: Final = 32_768


class State(Enum):
    HANDSHAKE = 0
    OPEN = 1
    ENDING = 2
    CLOSED = 3


_HANDSHAKE, _OPEN, _ENDING, _CLOSED = State

#: State -> those that may follow.
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    _HANDSHAKE: frozenset({_OPEN, _ENDING, _CLOSED}),
    _OPEN: frozenset({_ENDING, _CLOSED}),
    _ENDING: frozenset({_CLOSED}),
    _CLOSED: frozenset({_CLOSED}),
}


class Entrance(Protocol):
    """Where a connection comes from."""

    def arrived(self, who: object, transport: asyncio.Transport) -> bool:
        """It is there, before anything is done for it. False: it was turned away, `who` is out."""

    def opened(self, transport: TlsTransport) -> asyncio.Protocol:
        """The handshake is complete: return who has the transport from now on."""

    def left(self, transport: TlsTransport) -> None:
        """The connection is gone, and its handshake was never complete."""


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """One client's TLS connection.

    `entrance` is asked whether it may come in before anything is done for it. When the handshake is complete
    it gives the protocol above (`opened`), whose `connection_made` is not called. A connection of a CA that
    validates a name (`is_challenge`) ends there instead.
    """

    __slots__ = (
        "_deadlines",
        "_entrance",
        "_front",
        "_incoming",
        "_outgoing",
        "_protocol",
        "_socket",
        "_state",
        "_tls",
        "deadline",
    )

    def __init__(
        self,
        front: FrontTls,
        deadlines: DeadlineWheel,
        seconds: float,
        entrance: Entrance,
    ) -> None:
        self._deadlines = deadlines
        self._front: FrontTls | None = front  # until the first bytes are there
        self._entrance = entrance
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls: FrontSSLObject = cast("FrontSSLObject", None)  # set by connection_made
        self._state = _HANDSHAKE
        self._protocol: asyncio.Protocol | None = None
        self._socket: asyncio.Transport = cast("asyncio.Transport", None)  # set by connection_made
        self.deadline = monotonic() + seconds

    # What the socket's transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        if not self._entrance.arrived(self, self._socket):
            return
        front = self._front
        assert front is not None
        self._tls = front.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._deadlines.watch(self)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state is _OPEN:
            self._read(data)
        elif state is _HANDSHAKE:
            front, self._front = self._front, None
            if front is not None:
                context = front.context_for(data)
                if context is not self._tls.context:
                    self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
            self._incoming.write(data[:PIECE])
            self._shake_hands()
            if len(data) > PIECE:
                self.data_received(data[PIECE:])  # a body behind the handshake, or garbage
        elif state is _ENDING:
            if self._protocol is None:
                self.abort()  # it has its alert
            else:
                self._protocol.data_received(data)  # encrypted, as nobody wants it: only its length counts

    def eof_received(self) -> bool:
        if self._state is _OPEN and self._protocol is not None:
            self._state = _ENDING
            self._protocol.eof_received()
        self._state = _CLOSED
        return False  # the socket's transport closes

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        self._tls.gone()
        protocol, self._protocol = self._protocol, None
        if protocol is None:
            self._deadlines.forget(self)
            self._entrance.left(self)
        else:
            protocol.connection_lost(exc)

    # The deadline wheel

    def on_deadline(self, now: float) -> None:
        """The handshake takes too long, or a client that was refused does not go."""
        self.abort()

    def kill(self) -> None:
        """End at once."""
        self.abort()

    # What the protocol above calls

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._state is not _OPEN or self._socket.is_closing():
            return
        outgoing, tls = self._outgoing, self._tls
        try:
            if len(data) <= RECORD:
                tls.write(data)
                self._socket.write(outgoing.read())
                return
            pieces = []
            rest = memoryview(data)
            while rest:
                sent = tls.write(rest[:RECORD])  # inside of the brackets mypyc would call it twice
                rest = rest[sent:]
                pieces.append(outgoing.read())  # a record at a time, for the reason at PIECE
            self._socket.writelines(pieces)
        except ssl.SSLError:
            self.abort()  # only a broken session refuses to encrypt

    def get_write_buffer_size(self) -> int:
        return self._socket.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._socket.pause_reading()

    def resume_reading(self) -> None:
        self._socket.resume_reading()

    def is_closing(self) -> bool:
        return self._state is _CLOSED or self._socket.is_closing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Say that nothing more will come, and throw away what the client still sends."""
        if self._state is _OPEN:
            self._say_goodbye()
            self._state = _ENDING
            self._socket.write_eof()

    def close(self) -> None:
        """Close once everything is written."""
        if self._state is _OPEN:
            self._say_goodbye()
        self._state = _CLOSED
        self._socket.close()

    def abort(self) -> None:
        """Close at once."""
        self._state = _CLOSED
        self._socket.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast("asyncio.Protocol", protocol)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._tls if name == "ssl_object" else self._socket.get_extra_info(name, default)

    # Private

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError:
            self._flush()
            self._state = _ENDING
            self._socket.write_eof()
            return
        self._deadlines.forget(self)
        self._state = _OPEN
        if self._tls.is_challenge:
            self.close()
            return
        self._protocol = self._entrance.opened(self)
        if self._incoming.pending:
            self._read(b"")
            if self._tls.version() == "TLSv1.3":
                return  # the ticket waits for the response
        self._flush()

    def _read(self, data: bytes) -> None:
        """Decrypt all whole records and pass them on in one piece."""
        pieces: list[bytes] = []
        ended = broken = False
        try:
            if len(data) <= PIECE:
                self._incoming.write(data)
                ended = self._decrypt(pieces)
            else:
                rest = memoryview(data)
                while rest and not ended:
                    self._incoming.write(rest[:PIECE])
                    rest = rest[PIECE:]
                    ended = self._decrypt(pieces)
        except ssl.SSLError:
            broken = True
        if pieces:
            assert self._protocol is not None
            self._protocol.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if broken:
            self._flush()  # the alert
            self.abort()
        elif ended:
            if self._state is _OPEN and self._protocol is not None:
                self._protocol.eof_received()
            self.close()
        elif self._outgoing.pending >= PIECE:
            if self._socket.get_write_buffer_size() >= PIECE:
                self.abort()
            else:
                self._flush()

    def _decrypt(self, pieces: list[bytes]) -> bool:
        """Append what the whole records hold; True when the client has said that it ends."""
        read, incoming = self._tls.read, self._incoming
        try:
            while data := read(RECORD):
                pieces.append(data)
                if not incoming.pending:
                    return False
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLZeroReturnError:
            pass
        return True

    def _flush(self) -> None:
        if self._outgoing.pending and not self._socket.is_closing():
            self._socket.write(self._outgoing.read())

    def _say_goodbye(self) -> None:
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # nearly always "want read": the client's own goodbye is not waited for
        self._flush()
