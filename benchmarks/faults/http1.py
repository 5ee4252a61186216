"""HTTP/1.1 as the load speaks it: one exchange at a time, connections kept and shared, nothing sent twice."""

from __future__ import annotations

import asyncio
import ssl
from typing import Self

from benchmarks.faults.asks import Ask
from benchmarks.faults.connections import HOST, Place, connect
from benchmarks.faults.ledger import Lost


class Connection:
    """One connection. `is_kept`: another request may follow."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._said_close = False
        self._has_answered = False

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext | None) -> Self:
        return cls(*await connect(port, tls))

    @property
    def is_kept(self) -> bool:
        return not (self._said_close or self.reader.at_eof() or self.writer.transport.is_closing())

    async def ask(self, ask: Ask, *more: str) -> tuple[int, bytes]:
        """Send it and read the answer's status and body; 101: what follows is not read. Raises Lost."""
        status, fields = await self._ask_for_head(ask, more)
        if status == 101:
            return status, b""
        try:
            return status, await self._body(fields)
        except (OSError, EOFError) as error:
            raise Lost("cut") from error
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise Lost("garbled") from error

    def close(self) -> None:
        self.writer.transport.abort()

    # Private

    @property
    def _closed(self) -> str:
        return "kept connection closed" if self._has_answered else "closed"

    async def _ask_for_head(self, ask: Ask, more: tuple[str, ...]) -> tuple[int, dict[bytes, bytes]]:
        body = ask.body
        lines = [f"{ask.method} {ask.path} HTTP/1.1", f"Host: {HOST}", *more]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        try:
            self.writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
            head = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        except asyncio.IncompleteReadError as error:
            raise Lost("cut" if error.partial else self._closed) from error
        except (OSError, RuntimeError) as error:  # uvloop: a write to a transport that is closed
            raise Lost(self._closed) from error
        except asyncio.LimitOverrunError as error:
            raise Lost("garbled") from error
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in head[1:])
        }
        self._said_close = fields.get(b"connection", b"").lower() == b"close"
        try:
            status = int(head[0].split(b" ", 2)[1])
        except (IndexError, ValueError) as error:
            raise Lost("garbled") from error
        self._has_answered = True
        return status, fields

    async def _body(self, fields: dict[bytes, bytes]) -> bytes:
        if b"content-length" in fields:
            return await self.reader.readexactly(int(fields[b"content-length"]))
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            body = bytearray()
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
            return bytes(body)
        self._said_close = True
        return await self.reader.read(-1)


class Connections:
    """Those that wait for their next exchange; the one that was used last goes first, as in browsers."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._idle: list[Connection] = []

    async def ask(self, ask: Ask) -> tuple[int, bytes]:
        """Ask on one that is open or, for a fresh ask, on a new one. Raises Lost."""
        connection = None if ask.fresh else self._take()
        if connection is None:
            connection = await Connection.open(self._place.port, self._place.tls)
        try:
            answer = await connection.ask(ask)
        except BaseException:
            connection.close()
            raise
        if connection.is_kept and not ask.fresh:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    # Private

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_kept:
                return connection
            connection.close()
        return None
