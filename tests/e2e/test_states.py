"""Who is starting or down gets no request while another is ready; who comes back is found by probes."""

from __future__ import annotations

import threading

import pytest

from tests.e2e.backends import RecordingBackend, echo_each
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.health_backend import QUICK, BackendProcess, Patient, until_state
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually

both = pytest.mark.parametrize("workers", ["1", "2"])

#: A backend that does not answer is found out soon, by clients as by probes; one on a busy machine is not.
HASTY = (
    "[timeouts]\ndrain = 2\nshutdown = 2\nconnect = 2\nupstream_head = 2\n"
    "[health]\ninterval = 0.2\ntimeout = 2\n"
)


def asked(proxy: ProxyProcess, service: str, times: int = 1) -> list[tuple[int, bytes]]:
    """Status and body of requests, each on a connection of its own."""
    answers = []
    for _ in range(times):
        with proxy.connect() as client:
            response = client.ask(get(service))
            answers.append((response.status, response.body))
    return answers


@both
def test_one_that_is_starting_or_down_is_passed_over_while_another_is_ready(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    proxy = start_proxy(toml=QUICK, flags=("--workers", workers))
    first, second = Patient("first"), Patient("second")
    second.status = 503
    backends = start_backend(first), start_backend(second)
    for backend in backends:
        proxy.register(service, backend.host, backend.port, health_path="/up")
    until_state(proxy, service, backends[0].port, "ready")
    assert set(asked(proxy, service, 20)) == {(200, b"first")}
    second.status = 200
    until_state(proxy, service, backends[1].port, "ready")
    assert set(asked(proxy, service, 20)) == {(200, b"first"), (200, b"second")}
    first.status = 500
    until_state(proxy, service, backends[0].port, "down")
    assert set(asked(proxy, service, 20)) == {(200, b"second")}
    second.status = 500
    until_state(proxy, service, backends[1].port, "down")
    assert {status for status, _ in asked(proxy, service, 20)} == {200}  # down is better than nobody
    first.status = 200
    until_state(proxy, service, backends[0].port, "ready")
    assert set(asked(proxy, service, 20)) == {(200, b"first")}


@both
def test_one_without_a_health_path_that_refuses_is_down_until_it_takes_connections_again(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    proxy = start_proxy(toml=QUICK, flags=("--workers", workers))
    well = start_backend(Patient("well"))
    ill = RecordingBackend(Patient("ill"))
    for backend in (well, ill):
        proxy.register(service, backend.host, backend.port)
    assert set(asked(proxy, service, 20)) == {(200, b"well"), (200, b"ill")}
    ill.close()

    def is_down() -> bool:
        assert asked(proxy, service, 10) == [(200, b"well")] * 10  # what was refused is tried elsewhere
        return proxy.metric("portero_backends", service=service, state="down") == 1

    eventually(is_down, "it is down")
    assert proxy.metric("portero_probes_total", result="refused") >= 1
    again = RecordingBackend(Patient("again"), port=ill.port)
    try:
        until_state(proxy, service, ill.port, "ready")
        assert set(asked(proxy, service, 20)) == {(200, b"well"), (200, b"again")}
    finally:
        again.close()


@both
def test_one_without_a_health_path_that_hangs_is_down_until_it_answers_again(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    proxy = start_proxy(toml=HASTY, flags=("--workers", workers))
    well = start_backend(Patient("well"))
    with BackendProcess() as frozen:
        for port in (well.port, frozen.port):
            proxy.register(service, "127.0.0.1", port)
        assert set(asked(proxy, service, 20)) == {(200, b"well"), (200, b"ok")}
        frozen.stop()
        late: list[int] = []
        stop = threading.Event()

        def ask_on() -> None:
            while not stop.is_set():
                late.extend(status for status, _ in asked(proxy, service) if status != 200)

        clients = [threading.Thread(target=ask_on) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            until_state(proxy, service, frozen.port, "down")
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert set(late) <= {504}  # whoever was sent there before anybody knew
        assert asked(proxy, service, 40) == [(200, b"well")] * 40
        assert proxy.metric("portero_probes_total", result="timeout") >= 1
        frozen.go_on()
        until_state(proxy, service, frozen.port, "ready")
        assert set(asked(proxy, service, 20)) == {(200, b"well"), (200, b"ok")}


@both
def test_one_that_answers_503_and_takes_connections_stays_ready(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    """What it may do about that is a worker's own business: nobody named a health path."""
    proxy = start_proxy(toml=f"{QUICK}statuses = [503]\n", flags=("--workers", workers))
    health = Patient("ill")
    well, ill = start_backend(echo_each), start_backend(health)
    for backend in (well, ill):
        proxy.register(service, backend.host, backend.port)
    health.serves = 503
    eventually(
        lambda: asked(proxy, service, 10) and proxy.metric("portero_probes_total", result="ok") >= 1,
        "a connection is tried",
    )
    assert proxy.metric("portero_backends", service=service, state="ready") == 2
