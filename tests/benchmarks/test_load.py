"""The load of the faults, against a proxy that misbehaves: each misdeed is counted under its name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from jh2.hpack import Encoder  # type: ignore[import-untyped]

from benchmarks.faults.asks import Ask, Kind
from benchmarks.faults.connections import Place
from benchmarks.faults.ledger import WRONG, Tally
from benchmarks.faults.load import Load

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def proxy(talk: Talk) -> AsyncIterator[int]:
    """Somebody who accepts and talks as told; its port."""

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (EOFError, ConnectionError):
            pass  # the load is done
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def load(port: int, *asks: Ask, patience: float = 5.0) -> Tally:
    """All of them, each when the one before it has been answered for sure (as far as nobody is slow)."""
    due = [(number * 0.05, ask) for number, ask in enumerate(asks)]
    return await Load(Place(port), patience).steady(due, asyncio.Event())


def gets(count: int, **how: bool) -> list[Ask]:
    return [Ask(f"a-{number}", Kind.GET, 200, **how) for number in range(count)]


def plain(answer: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer


def http1(*answers: bytes) -> Talk:
    """One answer after the other, a request each; after the last one the connection ends."""
    left = list(answers)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while left:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(left.pop(0))
        await writer.drain()

    return talk


@pytest.mark.parametrize(
    ("answer", "way"),
    [
        (b"", "closed"),
        (b"HTTP/1.1 200 O", "cut"),
        (plain(b"x" * 300)[:-1], "cut"),
        (plain(b"x" * 200), WRONG),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "503"),
        (b"HTTP/1.1 what\r\n\r\n", "garbled"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "garbled"),
    ],
)
async def test_what_http1_does_wrong_has_a_name(answer: bytes, way: str) -> None:
    async with proxy(http1(answer)) as port:
        tally = await load(port, *gets(1))
    assert tally.lost == {"GET": {way: 1}}
    assert tally.answered == {}


async def test_right_answers_count_in_both_framings() -> None:
    first, second = gets(2)
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nc8\r\n" + second.answer + b"\r\n0\r\n\r\n"
    )
    async with proxy(http1(plain(first.answer), chunked)) as port:
        tally = await load(port, first, second)
    assert tally.answered == {"GET": 2}
    assert tally.lost == {}


async def test_an_answer_that_comes_twice_is_noticed() -> None:
    first, second = gets(2)
    async with proxy(http1(plain(first.answer) * 2, plain(second.answer))) as port:
        tally = await load(port, first, second)
    assert tally.answered == {"GET": 1}
    assert tally.lost == {"GET": {WRONG: 1}}


async def test_answers_in_the_wrong_order_are_wrong() -> None:
    first, second = gets(2)
    async with proxy(http1(plain(second.answer), plain(first.answer))) as port:
        assert (await load(port, first, second)).lost == {"GET": {WRONG: 2}}


async def test_nothing_is_asked_again() -> None:
    asked = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))

    async with proxy(talk) as port:
        tally = await load(port, *gets(3))
    assert tally.lost == {"GET": {"closed": 3}}
    assert len(asked) == 3


async def test_silence_is_timed_out() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with proxy(talk) as port:
        tally = await load(port, *gets(1), Ask("b", Kind.GET, 200, http2=True), patience=0.2)
    assert tally.lost == {"GET": {"timed out": 2}}


async def test_a_kept_connection_that_ends_has_a_name_of_its_own() -> None:
    first, second = gets(2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(first.answer))
        await reader.readuntil(b"\r\n\r\n")

    async with proxy(talk) as port:
        tally = await load(port, first, second)
    assert tally.answered == {"GET": 1}
    assert tally.lost == {"GET": {"kept connection closed": 1}}


async def test_a_closed_port_is_refused() -> None:
    async with proxy(http1()) as port:
        pass
    assert (await load(port, *gets(1))).lost == {"GET": {"refused": 1}}


# HTTP/2

DATA, HEADERS, RESET, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def head(stream: int, status: str = "200") -> bytes:
    block = b"\x88" if status == "200" else Encoder().encode([(":status", status)])
    return frame(HEADERS, END_HEADERS, stream, block)


def http2(*answers: bytes) -> Talk:
    """One lot of frames after the other, one for each request's head; after the last one the end."""
    left = list(answers)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"SM\r\n\r\n")
        writer.write(frame(SETTINGS, 0, 0))
        while left:
            top = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(top[:3], "big"))
            if top[3] == HEADERS:
                writer.write(left.pop(0))
        await writer.drain()

    return talk


H2 = Ask("c", Kind.GET, 200, http2=True)


@pytest.mark.parametrize(
    ("answer", "way"),
    [
        (b"", "closed"),
        (head(1), "cut"),
        (head(1) + frame(DATA, 0, 1, H2.answer), "cut"),
        (head(1) + frame(DATA, END_STREAM, 1, H2.answer[:-1] + b"?"), WRONG),
        (head(1, "502") + frame(DATA, END_STREAM, 1, b"sorry"), "502"),
        (frame(RESET, 0, 1, (7).to_bytes(4, "big")), "to be repeated"),
        (frame(RESET, 0, 1, (2).to_bytes(4, "big")), "stream reset (2)"),
        (frame(GOAWAY, 0, 0, bytes(8)), "to be repeated"),
        (frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"), "garbled"),
    ],
)
async def test_what_http2_does_wrong_has_a_name(answer: bytes, way: str) -> None:
    async with proxy(http2(answer)) as port:
        tally = await load(port, H2)
    assert tally.lost == {"GET": {way: 1}}


async def test_a_stream_that_a_goaway_lets_finish_is_answered() -> None:
    goaway = frame(GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4))
    async with proxy(http2(goaway + head(1) + frame(DATA, END_STREAM, 1, H2.answer))) as port:
        assert (await load(port, H2)).answered == {"GET": 1}


# WebSockets

WEBSOCKET = Ask("d", Kind.WEBSOCKET, 2)


def websocket(*frames: bytes) -> Talk:
    left = list(frames)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        while left:
            top = await reader.readexactly(2)
            await reader.readexactly(4 + (top[1] & 127))
            writer.write(left.pop(0))
        await writer.drain()

    return talk


@pytest.mark.parametrize(
    ("frames", "way"),
    [
        ((b"\x81\x03d 0", b"\x81\x03d 1", b"\x88\x02\x03\xe8"), ""),
        ((b"\x81\x03d 0", b"\x89\x00\x81\x03d 1", b"\x88\x02\x03\xe8"), ""),
        ((b"\x81\x03d 0", b"\x81\x03d 0", b"\x88\x02\x03\xe8"), WRONG),
        ((b"\x81\x03d 0",), "cut"),
        ((b"\x81\x03d 0", b"\x88\x02\x03\xe9"), "told to leave (1001)"),
    ],
)
async def test_a_websocket_wants_every_message_back(frames: tuple[bytes, ...], way: str) -> None:
    async with proxy(websocket(*frames)) as port:
        tally = await load(port, WEBSOCKET)
    assert tally.lost == ({"WebSocket": {way: 1}} if way else {})
    assert tally.answered == ({} if way else {"WebSocket": 1})
