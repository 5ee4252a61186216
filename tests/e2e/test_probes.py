"""Real proxies probe real backends: states, answers of all kinds, a control process that is replaced."""

from __future__ import annotations

import datetime as dt
import os
import signal
import ssl
from pathlib import Path

import pytest

from tests.e2e.backends import Peer, Script, answer_with, ok
from tests.e2e.certificates import Authority
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.health_backend import (
    IMPATIENT,
    QUICK,
    BackendProcess,
    Patient,
    backend_of,
    until_state,
)
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.test_workers import processes, replaced
from tests.e2e.waiting import eventually

both = pytest.mark.parametrize("workers", ["1", "2"])


def started(start_proxy: StartProxy, workers: str, toml: str = QUICK) -> ProxyProcess:
    return start_proxy(toml=toml, flags=("--workers", workers))


def asked(proxy: ProxyProcess, service: str) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    with proxy.connect() as client:
        response = client.ask(get(service))
        return response.status, response.body


@both
def test_a_backend_starts_is_ready_fails_is_down_and_is_ready_again(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    proxy = started(start_proxy, workers)
    health = Patient()
    health.status = 503
    backend = start_backend(health)
    before = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    proxy.register(service, backend.host, backend.port, health_path="/up", max_in_flight=5)
    eventually(lambda: health.probes >= 3, "it is probed")
    shown = backend_of(proxy, service, backend.port)
    assert shown["state"] == "starting"
    assert shown["last_error"] == "probe: status 503 at /up"
    assert (shown["health_path"], shown["max_in_flight"], shown["ejected"]) == ("/up", 5, 0)
    assert (
        before
        <= dt.datetime.fromisoformat(shown["since"])
        <= dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
    )
    assert shown["since"].endswith("Z")
    assert asked(proxy, service) == (200, b"served")  # there is nobody else to try
    health.status = 200
    until_state(proxy, service, backend.port, "ready")
    assert proxy.metric("portero_backends", service=service, state="ready") == 1
    assert proxy.metric("portero_probes_total", result="ok") >= 1
    health.status = 500
    until_state(proxy, service, backend.port, "down")
    assert proxy.metric("portero_backends", service=service, state="down") == 1
    assert proxy.metric("portero_backends", service=service, state="ready") == 0
    assert proxy.metric("portero_probes_total", result="bad_status") >= 6
    assert asked(proxy, service) == (200, b"served")  # all are down: one is tried all the same
    health.status = 200
    until_state(proxy, service, backend.port, "ready")
    eventually(lambda: proxy.operator_log().count(f"ready: {service}") == 2, "it is logged")
    log = proxy.operator_log()
    assert f"down: {service} at http://{backend.host}:{backend.port}: 3 probes failed" in log
    assert "probe of" not in log


@both
def test_a_stopped_process_is_down_and_ready_when_it_goes_on(
    start_proxy: StartProxy, service: str, workers: str
) -> None:
    proxy = started(start_proxy, workers, IMPATIENT)
    with BackendProcess() as backend:
        proxy.register(service, "127.0.0.1", backend.port, health_path="/up")
        until_state(proxy, service, backend.port, "ready")
        backend.stop()
        shown = until_state(proxy, service, backend.port, "down")
        assert shown["last_error"] == "probe: no answer within 0.5 s"
        backend.go_on()
        until_state(proxy, service, backend.port, "ready")


def head_without_end(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        peer.send(b"X: y\r\n" * 100)


def body_without_end(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        peer.send(bytes(100_000))


def drip(peer: Peer) -> None:
    peer.read_request()
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10_000:
        peer.send(bytes([byte]))
        if peer.closed.wait(0.05):
            return


def say_nothing(peer: Peer) -> None:
    peer.wait_closed()


def test_every_kind_of_answer_ends_in_a_state_and_none_keeps_another_waiting(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = started(start_proxy, "1", IMPATIENT)
    cases: dict[str, tuple[Script, str, str]] = {
        "good": (answer_with(ok(b"")), "ready", ""),
        "endless-body": (body_without_end, "ready", ""),
        "redirect": (
            answer_with(b"HTTP/1.1 302 Found\r\nLocation: /up2\r\nContent-Length: 0\r\n\r\n"),
            "starting",
            "probe: status 302 at /up",
        ),
        "broken": (
            answer_with(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"),
            "starting",
            "probe: status 500 at /up",
        ),
        "garbage": (answer_with(b"\x00\x01garbage\n"), "starting", "probe: the answer is no HTTP"),
        "endless-head": (head_without_end, "starting", "probe: the answer is no HTTP"),
        "drip": (drip, "starting", "probe: no answer within 0.5 s"),
        "silence": (say_nothing, "starting", "probe: no answer within 0.5 s"),
    }
    ports = {}
    for name, (script, _, _) in cases.items():
        backend = start_backend(script)
        ports[name] = backend.port
        proxy.register(f"{name}.{service}", backend.host, backend.port, health_path="/up")
    for name, (_, state, error) in cases.items():
        if state == "ready":
            until_state(proxy, f"{name}.{service}", ports[name], "ready")
            continue
        shown = eventually(
            lambda name=name, error=error: (
                (  # type: ignore[misc]
                    found := backend_of(proxy, f"{name}.{service}", ports[name])
                )["last_error"].startswith(error)
                and found
            ),
            f"{name}: {error}",
        )
        assert shown["state"] == "starting", name
    for result in ("ok", "bad_status", "bad_response", "timeout"):
        assert proxy.metric("portero_probes_total", result=result) >= 1, result


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_backends_that_speak_tls_are_probed_over_it_and_held_to_their_pin(
    start_proxy: StartProxy,
    start_backend: StartBackend,
    authority: Authority,
    service: str,
    host: str,
    tmp_path: Path,
) -> None:
    proxy = started(start_proxy, "1")
    pair = authority.issue("whatever.test")
    folder = pair.write(tmp_path / "pair")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "fullchain.pem", folder / "privkey.pem")
    backend = start_backend(Patient(), host=host, tls=context)
    fields = {"use_tls": True, "health_path": "/up"}
    proxy.register(service, host, backend.port, tls_fingerprint=pair.fingerprint, **fields)
    proxy.register(f"wrong.{service}", host, backend.port, tls_fingerprint="ab" * 32, **fields)
    until_state(proxy, service, backend.port, "ready")
    shown = eventually(
        lambda: (found := backend_of(proxy, f"wrong.{service}", backend.port))["last_error"] and found,
        "the wrong pin is found",
    )
    assert shown["state"] == "starting"
    assert "pinned" in shown["last_error"]
    assert proxy.metric("portero_probes_total", result="tls") >= 1


@both
def test_300_backends_are_ready_and_go_on_being_probed(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    proxy = started(start_proxy, workers, QUICK.replace("0.2", "2"))
    health = Patient()
    backend = start_backend(health)
    for number in range(300):
        proxy.register(f"{number}.{service}", backend.host, backend.port, health_path="/up")
    eventually(
        lambda: proxy.call("GET", "/metrics").body.count(b'state="ready"} 1.0') == 300, "300 are ready"
    )
    probes = health.probes
    eventually(lambda: health.probes >= probes + 600, "all are probed again")
    assert proxy.metric("portero_probes_total", result="ok") >= 900
    assert proxy.metric("portero_faults_total") == 0


def test_states_outlive_a_control_process_and_probes_go_on_at_once(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    proxy = started(start_proxy, "2")
    good, bad = Patient("good"), Patient("bad")
    well, ill = start_backend(good), start_backend(bad)
    for backend in (well, ill):
        proxy.register(service, backend.host, backend.port, health_path="/up")
        until_state(proxy, service, backend.port, "ready")
    bad.status = 500
    before = until_state(proxy, service, ill.port, "down")
    control = processes(proxy)["control"]
    os.kill(control, signal.SIGKILL)
    eventually(lambda: replaced(proxy, "control", control), "another control process")
    eventually(lambda: answers(proxy), "it serves the API")
    after = backend_of(proxy, service, ill.port)
    assert after["state"] == "down"
    seconds = [dt.datetime.fromisoformat(shown["since"]).timestamp() for shown in (before, after)]
    assert abs(seconds[0] - seconds[1]) <= 1
    probes = good.probes
    eventually(lambda: good.probes > probes, "probes go on")
    bad.status = 200
    until_state(proxy, service, ill.port, "ready")


def answers(proxy: ProxyProcess) -> bool:
    """Whether the registration API answers."""
    try:
        return proxy.call("GET", "/readyz").status == 200
    except OSError:
        return False


@both
def test_other_times_of_probes_hold_after_a_reload(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    proxy = started(start_proxy, workers, QUICK.replace("0.2", "3600"))
    health = Patient()
    backend = start_backend(health)
    proxy.register(service, backend.host, backend.port, health_path="/up")
    until_state(proxy, service, backend.port, "ready")
    assert health.probes == 1
    health.status = 500
    (proxy.folder / "portero.toml").write_text(f"{QUICK}fall = 1\n")
    proxy.signal(signal.SIGHUP)
    shown = until_state(proxy, service, backend.port, "down")
    assert shown["last_error"] == "probe: status 500 at /up"
    said = f"down: {service} at http://127.0.0.1:{backend.port}: a probe failed"
    eventually(lambda: said in proxy.operator_log(), "it is logged")


@both
def test_one_that_is_released_is_not_probed_any_more(
    start_proxy: StartProxy, start_backend: StartBackend, service: str, workers: str
) -> None:
    proxy = started(start_proxy, workers)
    leaving, staying = Patient(), Patient()
    backend, other = start_backend(leaving), start_backend(staying)
    for each in (backend, other):
        proxy.register(service, each.host, each.port, health_path="/up")
        until_state(proxy, service, each.port, "ready")
    proxy.deregister(service, host=backend.host, port=backend.port)
    eventually(lambda: all(peer.closed.is_set() for peer in backend.peers), "what was going on has ended")
    probes, beside = leaving.probes, staying.probes
    eventually(lambda: staying.probes >= beside + 5, "the other is probed")
    assert leaving.probes == probes
    proxy.register(service, backend.host, backend.port, health_path="/up")
    until_state(proxy, service, backend.port, "ready")
    assert leaving.probes > probes
