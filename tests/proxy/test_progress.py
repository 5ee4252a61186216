"""Whether a slow peer takes anything is seen in the kernel too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from portero_py.proxy.progress import Progress, SlowPeer


class FullTransport(asyncio.Transport):
    """Its own buffer stays as full as it is; what the peer takes is the kernel's."""

    def __init__(self, sock: socket.socket | None) -> None:
        super().__init__({"socket": sock})
        self.unsent = 100_000

    def get_write_buffer_size(self) -> int:
        return self.unsent


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        near.setblocking(False)
        try:
            while True:
                near.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        yield near, far


def take(far: socket.socket, near: socket.socket) -> None:
    """Read until the kernel on the near side knows."""
    before = Progress(FullTransport(near))
    while not before.is_made():
        far.recv(1 << 20)


def test_what_the_kernel_was_relieved_of_is_progress(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    progress = Progress(FullTransport(near))
    assert not progress.is_made()
    take(far, near)
    assert progress.is_made()
    assert not progress.is_made()


def test_a_slow_peer_gets_time_while_it_takes_something(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    transport = FullTransport(near)
    slow = SlowPeer(transport)
    assert slow.more_time(60) == 15  # nothing is known of the kernel yet
    take(far, near)
    assert slow.more_time(60) == 60
    assert slow.more_time(60) == 0


def test_what_the_transport_was_relieved_of_is_progress_too() -> None:
    transport = FullTransport(None)
    slow = SlowPeer(transport)
    for _ in range(2):
        transport.unsent -= 1
        assert slow.more_time(60) == 60
    assert [slow.more_time(60), slow.more_time(60)] == [15, 0]


def test_a_closed_socket_makes_no_progress(pair: tuple[Any, Any]) -> None:
    near, _ = pair
    slow = SlowPeer(FullTransport(near))
    near.close()
    assert [slow.more_time(60), slow.more_time(60)] == [15, 0]
