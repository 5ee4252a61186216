"""Backends that come, renew and go while load runs: no request fails."""

from __future__ import annotations

import random
import threading

import pytest

from tests.e2e.backends import Peer, RecordingBackend, Script, in_turn, ok
from tests.e2e.conftest import StartBackend, StartProxy
from tests.e2e.http1_client import get
from tests.e2e.proxy_process import registration


def _wait_for(gate: threading.Event) -> Script:
    """Answer each request when the gate is open."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            gate.wait(60)
            peer.send(ok(b"%b done" % request.path, request))

    return script


@pytest.mark.slow
def test_no_request_fails_while_a_hundred_backends_renew_a_thousand_leases(
    start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    proxy = start_proxy(environment={"PORTERO_ACCESS_LOG": "off"})
    # One listener on every loopback address plays a hundred backends of ten services each.
    backend: RecordingBackend = start_backend(host="0.0.0.0")
    leases = [(f"s{i}.churn.test", f"127.0.0.{1 + i % 100}") for i in range(1000)]
    for name, host in leases:
        proxy.register(name, host, backend.port, ttl_seconds=60)
    assert proxy.metric("portero_registry_services") == 1000
    failures: list[str] = []
    renewed, served = [0], [0]
    done = threading.Event()
    source = random.Random(7)  # the same order in every run

    def load(number: int) -> None:
        names = [name for name, _ in leases]
        source.shuffle(names)
        with proxy.connect() as client:
            while not done.is_set():
                name = names[served[0] % 1000]
                response = client.ask(get(name, f"/{number}"))
                served[0] += 1
                if (response.status, response.body) != (200, b"GET /%d " % number):
                    failures.append(f"{name}: {response.status} {response.body!r}")
                    return

    threads = [threading.Thread(target=load, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for name, host in leases:
            body = registration(name, host, backend.port, ttl_seconds=60)
            assert proxy.call("POST", "/register", body).status == 200
            renewed[0] += 1
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert renewed[0] == 1000
    assert served[0] > 500
    assert proxy.metric("portero_registry_services") == 1000


def test_a_restart_of_a_backend_costs_no_request_while_another_one_serves(
    start_proxy: StartProxy, start_backend: StartBackend, service: str
) -> None:
    """Deregister, close, start anew, register: as a rolling update does."""
    proxy = start_proxy()
    steady = start_backend()
    proxy.serve(service, steady)
    with proxy.connect() as client:
        for turn in range(5):
            backend = RecordingBackend(in_turn(_wait_for(_open_gate())))
            proxy.register(service, backend.host, backend.port, instance_id="rolling")
            for i in range(10):
                assert client.ask(get(service, f"/{turn}/{i}")).status == 200
            proxy.deregister(service, instance_id="rolling")
            backend.close()
            for i in range(10):
                assert client.ask(get(service, f"/{turn}/after/{i}")).status == 200


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate
