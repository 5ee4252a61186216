"""HTTP/2 as the load speaks it (RFC 9113): a few connections with many streams each.

The usual libraries read nothing more after a GOAWAY; here the streams that it lets finish do finish. A stream
that it refuses, or that is reset with REFUSED_STREAM, may be repeated safely (8.7): nobody does that here, so
it is lost as `to be repeated`.

Flow control: what comes is allowed for once and for all (a GiB a connection, 16 MiB a stream; one carries
less than that in a run), what goes waits for the proxy's window.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Self

from jh2.hpack import Decoder, Encoder, HPACKError  # type: ignore[import-untyped]

from benchmarks.faults.asks import Ask
from benchmarks.faults.connections import HOST, Place, connect
from benchmarks.faults.ledger import Lost

#: What a browser opens is one; some more, so that a lost one does not take half of the load along.
CONNECTIONS = 4

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 1, 1, 4, 8, 32
_MAX_FRAME = 16_384
_CANCEL, _REFUSED_STREAM = 8, 7
_ENABLE_PUSH, _INITIAL_WINDOW = 2, 4

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class _Stream:
    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.body = bytearray()

    def lose(self, way: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(Lost(way))

    def end(self) -> None:
        if not self.answer.done():
            self.answer.set_result((self.status, bytes(self.body)))


class Connection:
    """One connection; `is_usable` until a GOAWAY or its end. Whoever opens it closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._encoder, self._decoder = Encoder(), Decoder()
        self._streams: dict[int, _Stream] = {}
        self._next = 1
        self._window = 65_535
        self._wider = asyncio.Event()
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags and a block that is not whole
        self.is_usable = True
        settings = _ENABLE_PUSH.to_bytes(2, "big") + bytes(4)
        settings += _INITIAL_WINDOW.to_bytes(2, "big") + (1 << 24).to_bytes(4, "big")
        self._write(
            _PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, (1 << 30).to_bytes(4, "big"))
        )
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext | None) -> Self:
        return cls(*await connect(port, tls))

    async def ask(self, ask: Ask) -> tuple[int, bytes]:
        """One stream: its status and body. Raises Lost."""
        number, stream = self._next, _Stream()
        self._next += 2
        self._streams[number] = stream
        body = ask.body
        fields = [(":method", ask.method), (":scheme", "https"), (":authority", HOST), (":path", ask.path)]
        if body is not None:
            fields.append(("content-length", str(len(body))))
        block = self._encoder.encode(fields)
        self._write(_frame(_HEADERS, _END_HEADERS | (_END_STREAM if body is None else 0), number, block))
        try:
            if body is not None:
                while self._window < len(body) and not stream.answer.done():
                    self._wider.clear()
                    await self._wider.wait()
                self._window -= len(body)
                self._write(_frame(_DATA, _END_STREAM, number, body))
            return await stream.answer
        finally:
            if not stream.answer.done() or stream.answer.cancelled():
                self._write(_frame(_RESET, 0, number, _CANCEL.to_bytes(4, "big")))
            self._streams.pop(number, None)
            if not self.is_usable and not self._streams:
                self.close()

    def close(self) -> None:
        self.is_usable = False
        self._writer.transport.abort()
        self._reading.cancel()

    # Private

    def _write(self, data: bytes) -> None:
        if not self._writer.transport.is_closing():
            self._writer.write(data)

    async def _read(self) -> None:
        way = "closed"
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        except (OSError, EOFError):
            pass  # the end of the connection: the streams are told below
        except (HPACKError, ValueError, IndexError):
            way = "garbled"
        finally:
            self.is_usable = False
            self._wider.set()
            for stream in self._streams.values():
                stream.lose("cut" if stream.status and way == "closed" else way)
            self._writer.transport.abort()

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _DATA:
            self._data(number, flags, payload)
        elif kind == _HEADERS:
            if flags & _PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            if flags & _PRIORITY:
                payload = payload[5:]
            self._block = (number, flags, bytearray(payload))
        elif kind == _CONTINUATION and self._block is not None:
            self._block[2].extend(payload)
        elif kind == _RESET:
            code = int.from_bytes(payload[:4], "big")
            if stream := self._streams.get(number):
                stream.lose("to be repeated" if code == _REFUSED_STREAM else f"stream reset ({code})")
        elif kind == _SETTINGS and not flags & _ACK:
            self._write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and number == 0:
            self._window += int.from_bytes(payload, "big")
            self._wider.set()
        elif kind == _GOAWAY:
            self._leave(int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF)
        if kind in (_HEADERS, _CONTINUATION) and flags & _END_HEADERS:
            self._fields()

    def _data(self, number: int, flags: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.body += payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload
        if flags & _END_STREAM:
            stream.end()

    def _fields(self) -> None:
        assert self._block is not None
        (number, flags, block), self._block = self._block, None
        fields = dict(self._decoder.decode(bytes(block)))
        stream = self._streams.get(number)
        if stream is None:
            return
        if ":status" in fields:
            stream.status = int(fields[":status"])
        if flags & _END_STREAM:
            stream.end()

    def _leave(self, last: int) -> None:
        self.is_usable = False
        for number, stream in self._streams.items():
            if number > last:
                stream.lose("to be repeated")
        if not self._streams:
            self.close()


class Connections:
    """`CONNECTIONS` of them, in turns; one that may not be used any more is replaced when its turn comes."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._open: list[Connection | None] = [None] * CONNECTIONS
        self._opening: list[asyncio.Task[None] | None] = [None] * CONNECTIONS
        self._turn = 0

    async def ask(self, ask: Ask) -> tuple[int, bytes]:
        """Ask on one of them or, for a fresh ask, on a new one. Raises Lost."""
        if ask.fresh:
            connection = await Connection.open(self._place.port, self._place.http2_tls)
            try:
                return await connection.ask(ask)
            finally:
                connection.close()
        self._turn = (self._turn + 1) % CONNECTIONS
        return await (await self._at(self._turn)).ask(ask)

    def close(self) -> None:
        for task in self._opening:
            if task is not None:
                task.cancel()
        for connection in self._open:
            if connection is not None:
                connection.close()

    # Private

    async def _at(self, turn: int) -> Connection:
        connection = self._open[turn]
        while connection is None or not connection.is_usable:
            task = self._opening[turn]
            if task is None or task.done():
                task = self._opening[turn] = asyncio.create_task(self._fill(turn))
            # Shielded: who gives up does not take those along who wait for the same connection.
            await asyncio.shield(task)
            connection = self._open[turn]
        return connection

    async def _fill(self, turn: int) -> None:
        self._open[turn] = await Connection.open(self._place.port, self._place.http2_tls)


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    assert len(payload) <= _MAX_FRAME
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload
