"""A server for strangers does not wait for ever, nor for everybody, nor in the log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from portero_py.control.open_server import OpenServer


async def hello(request: web.BaseRequest) -> web.Response:
    if request.path == "/bug":
        raise RuntimeError("a bug")
    return web.Response(text="hello")


@contextlib.asynccontextmanager
async def serving(server: OpenServer) -> AsyncIterator[int]:
    runner = web.ServerRunner(server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def sent(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


async def rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What still comes until the server ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(5):
            data = await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()
    return data


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost:"])
async def test_a_head_that_does_not_come_ends_the_connection(data: bytes) -> None:
    async with serving(OpenServer(hello, lifetime=0.05)) as port:
        assert await rest(*await sent(port, data)) == b""


async def test_a_connection_too_many_is_refused_and_the_next_is_served_once_there_is_room() -> None:
    server = OpenServer(hello, max_connections=1)
    async with serving(server) as port:
        request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        first = await sent(port, b"GET ")
        assert await rest(*await sent(port, request)) == b""
        first[1].write(request[4:])
        assert (await rest(*first)).endswith(b"hello")
        assert (await rest(*await sent(port, request))).endswith(b"hello")
        assert not server._ends


async def test_a_bug_is_logged_and_a_malformed_request_is_not(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(OpenServer(hello)) as port:
        assert b" 400 " in await rest(*await sent(port, b"no http\r\n\r\n"))
        assert not caplog.records
        request = b"GET /bug HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert b" 500 " in await rest(*await sent(port, request))
        assert "a bug" in caplog.text
