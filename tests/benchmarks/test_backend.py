"""The backends of the faults fail as they are told: a fault that does not happen would prove nothing."""

from __future__ import annotations

import http.client
import signal
import socket
from collections.abc import Iterator

import pytest

from benchmarks.faults.asks import HEALTH_PATH, Ask, Kind
from benchmarks.faults.stage import Backend, Stage, stage

GET = Ask("a-1", Kind.GET, 2_000)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def made() -> Iterator[Stage]:
    with stage() as here:
        yield here


@pytest.fixture(scope="module")
def shared(made: Stage) -> Backend:
    return made.start_backend()


@pytest.fixture
def backend(shared: Backend) -> Iterator[Backend]:
    yield shared
    shared.tell("accept")


def ask(backend: Backend, ask: Ask, path: str = "", seconds: float = 5.0) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", backend.port, timeout=seconds)
    try:
        connection.request(ask.method, path or ask.path, ask.body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def is_well(backend: Backend) -> bool:
    return ask(backend, GET) == (200, GET.answer)


def test_it_gives_the_answers_that_the_client_expects(backend: Backend) -> None:
    for asked in (GET, Ask("a-2", Kind.POST, 1_000), Ask("a-3", Kind.DOWNLOAD, 2)):
        assert ask(backend, asked) == (200, asked.answer)
    assert ask(backend, GET, HEALTH_PATH)[0] == 200


def test_it_writes_down_the_posts_that_it_carries_out(made: Stage, backend: Backend) -> None:
    assert made.repeated() == 0
    for _ in range(3):
        ask(backend, Ask("a-4", Kind.POST, 100))
    assert made.repeated() == 2


@pytest.mark.parametrize("status", [500, 503])
def test_a_status_is_given_to_everybody_until_all_is_well(backend: Backend, status: int) -> None:
    backend.tell(f"status {status}")
    assert {ask(backend, GET)[0], ask(backend, GET, HEALTH_PATH)[0]} == {status}
    backend.tell("accept")
    assert is_well(backend)


def test_a_reset_comes_instead_of_an_answer(backend: Backend) -> None:
    backend.tell("reset")
    with pytest.raises(ConnectionResetError):
        ask(backend, GET)
    backend.tell("accept")
    assert is_well(backend)


def test_who_refuses_closes_what_is_idle_and_lets_what_is_not_finish(backend: Backend) -> None:
    download = Ask("a-5", Kind.DOWNLOAD, 10)
    idle, busy = (http.client.HTTPConnection("127.0.0.1", backend.port, timeout=10) for _ in range(2))
    idle.request("GET", GET.path)
    idle.getresponse().read()
    busy.request("GET", download.path)
    answer = busy.getresponse()
    backend.tell("refuse")
    with pytest.raises(ConnectionRefusedError):
        ask(backend, GET)
    assert idle.sock.recv(1) == b""
    assert answer.read() == download.answer
    backend.tell("accept")
    assert is_well(backend)
    idle.close()
    busy.close()


def test_a_black_hole_answers_no_syn(backend: Backend) -> None:
    backend.tell("blackhole")
    with pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", backend.port), timeout=0.5)
    backend.tell("accept")
    assert is_well(backend)


def test_who_is_frozen_takes_connections_and_says_nothing(backend: Backend) -> None:
    backend.send(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            ask(backend, GET, seconds=0.5)
    finally:
        backend.send(signal.SIGCONT)
    assert is_well(backend)


def test_who_leaves_serves_what_still_comes_and_then_ends(made: Stage) -> None:
    backend = made.start_backend()
    backend.tell("leave")
    assert is_well(backend)
    backend.wait()
    with pytest.raises(ConnectionRefusedError):
        ask(backend, GET)
