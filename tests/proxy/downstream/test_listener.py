"""A listening socket: clients are met, wait while it is paused, and find nobody once it is stopped."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import pytest

from portero_py.proxy.downstream.listener import ListenerSite
from tests.proxy.downstream.tls_listener import Play


class Greeter(asyncio.Protocol):
    """Says a word to who comes, and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        ours = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        ours.write(b"welcome")
        ours.close()


def bound() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


async def visit(address: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def test_clients_that_come_while_it_is_paused_are_served_when_it_accepts_again(play: Play) -> None:
    async def scene() -> None:
        sock = bound()
        address = sock.getsockname()
        site = ListenerSite(sock, Greeter)
        await site.resume()
        assert await visit(address) == b"welcome"
        site.pause()
        site.pause()
        waiting = asyncio.create_task(visit(address))
        connected = socket.create_connection(address)  # the kernel takes it: nobody is refused
        connected.setblocking(False)
        for _ in range(20):
            await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            connected.recv(1)
        await site.resume()
        await site.resume()
        assert await waiting == b"welcome"
        assert await asyncio.get_running_loop().sock_recv(connected, 100) == b"welcome"
        connected.close()
        await site.stop()

    play(scene)


def test_a_stopped_listener_closes_its_socket_and_never_accepts_again(play: Play) -> None:
    async def scene() -> None:
        sock = bound()
        address = sock.getsockname()
        site = ListenerSite(sock, Greeter)
        await site.resume()
        await site.stop()
        await site.resume()
        assert sock.fileno() == -1
        await asyncio.sleep(0)  # uvloop closes its copy in the next turn
        with pytest.raises(ConnectionRefusedError):
            await visit(address)

    play(scene)


def test_a_listener_that_is_stopped_while_it_is_paused_stays_so(play: Play) -> None:
    async def scene() -> None:
        site = ListenerSite(bound(), Greeter)
        await site.resume()
        site.pause()
        await site.stop()
        await site.resume()

    play(scene)


def test_a_socket_that_cannot_accept_is_an_error_and_leaks_nothing(play: Play) -> None:
    async def scene() -> None:
        sock = bound()
        site = ListenerSite(sock, Greeter)
        sock.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            await site.resume()
        await site.stop()

    play(scene)
