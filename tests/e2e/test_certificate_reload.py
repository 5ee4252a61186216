"""Certificates that change while clients are connected."""

from __future__ import annotations

import os
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import SHORT_GOODBYE, StartBackend
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.test_workers import processes, replaced
from tests.e2e.waiting import eventually
from tests.odd_pairs import odd_name, odd_version, signed


def _serial(proxy: ProxyProcess, authority: Authority, name: str) -> int:
    tls = client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", proxy.port), tls=tls, sni=name) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        found = client.socket.getpeercert()
        assert found is not None
        return int(str(found["serialNumber"]), 16)


@pytest.fixture
def own_certificates(tmp_path: Path, authority: Authority) -> Path:
    """A certificate directory that the test may change."""
    folder = tmp_path / "own-certificates"
    authority.issue("a.own.test").write(folder / "a.own.test")
    return folder


@pytest.fixture
def own_proxy(tmp_path: Path, own_certificates: Path) -> Iterator[ProxyProcess]:
    """A TLS proxy on it."""
    proxy = ProxyProcess(
        tmp_path / "own-proxy", certificates=own_certificates, toml="[timeouts]\ndrain = 1\nshutdown = 1\n"
    )
    proxy.start()
    try:
        yield proxy
        proxy.stop()
    finally:
        proxy.kill()


@pytest.mark.parametrize("told", [True, False], ids=["after SIGHUP", "by itself"])
def test_a_changed_certificate_is_served_and_live_connections_go_on(
    told: bool,
    own_proxy: ProxyProcess,
    own_certificates: Path,
    authority: Authority,
    start_backend: StartBackend,
) -> None:
    backend = start_backend()
    own_proxy.register("a.own.test", backend.host, backend.port)
    tls = client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", own_proxy.port), tls=tls, sni="a.own.test") as live:
        assert live.ask(get("a.own.test", "/1")).status == 200
        pair = authority.issue("a.own.test")
        pair.write(own_certificates / "a.own.test")
        authority.issue("b.own.test").write(own_certificates / "b.own.test")
        if told:
            own_proxy.signal(signal.SIGHUP)
        eventually(lambda: _serial(own_proxy, authority, "a.own.test") == pair.serial, "the new certificate")
        eventually(lambda: _covers(own_proxy, authority, "b.own.test"), "the added certificate")
        assert live.ask(get("a.own.test", "/2")).status == 200


def _covers(proxy: ProxyProcess, authority: Authority, name: str) -> bool:
    try:
        return _serial(proxy, authority, name) > 0
    except ssl.SSLCertVerificationError:
        return False


def test_a_bad_pair_never_replaces_a_good_one(
    own_proxy: ProxyProcess, own_certificates: Path, authority: Authority
) -> None:
    before = _serial(own_proxy, authority, "a.own.test")
    folder = own_certificates / "a.own.test"
    (folder / "privkey.pem").write_bytes(authority.issue("a.own.test").key)  # of another certificate
    authority.issue("b.own.test").write(own_certificates / "b.own.test")
    own_proxy.signal(signal.SIGHUP)
    eventually(lambda: _covers(own_proxy, authority, "b.own.test"), "the others are loaded all the same")
    assert _serial(own_proxy, authority, "a.own.test") == before
    (folder / "fullchain.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")
    own_proxy.signal(signal.SIGHUP)
    eventually(lambda: _errors_about(own_proxy, "a.own.test"), "the log says why")
    assert _serial(own_proxy, authority, "a.own.test") == before


def test_a_pair_that_no_client_could_use_never_replaces_a_good_one(
    own_proxy: ProxyProcess, own_certificates: Path, authority: Authority
) -> None:
    before = _serial(own_proxy, authority, "a.own.test")
    signed("a.own.test", ec.SECP256K1()).write(own_certificates / "a.own.test")
    own_proxy.signal(signal.SIGHUP)
    eventually(lambda: _errors_about(own_proxy, "OpenSSL cannot serve it"), "the log says why")
    assert _serial(own_proxy, authority, "a.own.test") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_one_odd_certificate_leaves_the_others_alone(
    tmp_path: Path, own_certificates: Path, authority: Authority, workers: int
) -> None:
    proxy = ProxyProcess(
        tmp_path / "own-proxy",
        certificates=own_certificates,
        toml="[timeouts]\ndrain = 1\n",
        flags=("--workers", str(workers)),
    )
    # A name of a kind (x400Address) that the library which parses certificates does not know, and a version.
    odd = {
        "x400.own.test": odd_name("x400.own.test"),
        "version.own.test": odd_version("version.own.test"),
        "curve.own.test": signed("curve.own.test", ec.SECP256K1()),
    }
    odd["x400.own.test"].write(own_certificates / "x400.own.test")  # at the start
    proxy.start()
    try:
        for name, pair in odd.items():
            pair.write(own_certificates / name)
            fresh = f"with-{name}"
            authority.issue(fresh).write(own_certificates / fresh)
            eventually(lambda fresh=fresh: _covers(proxy, authority, fresh), "the others are loaded")  # type: ignore[misc]
            eventually(lambda name=name: _errors_about(proxy, name), "the log says why")  # type: ignore[misc]
        proxy.stop()
    finally:
        proxy.kill()


@pytest.mark.slow
def test_no_handshake_fails_while_certificates_change_under_load(
    own_proxy: ProxyProcess, own_certificates: Path, authority: Authority, start_backend: StartBackend
) -> None:
    backend = start_backend()
    own_proxy.register("a.own.test", backend.host, backend.port)
    pairs = [authority.issue("a.own.test") for _ in range(10)]
    failures: list[BaseException] = []
    done = threading.Event()
    served = [0]

    def load() -> None:
        tls = client_context(authority.pem, "http/1.1")
        while not done.is_set():
            try:
                with Http1Client(("127.0.0.1", own_proxy.port), tls=tls, sni="a.own.test") as client:
                    assert client.ask(get("a.own.test")).status == 200
                served[0] += 1
            except (AssertionError, Closed, Truncated, OSError) as failure:
                failures.append(failure)
                return

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        for pair in pairs:
            pair.write(own_certificates / "a.own.test")
            own_proxy.signal(signal.SIGHUP)
            eventually(
                lambda wanted=pair.serial: _serial(own_proxy, authority, "a.own.test") == wanted,  # type: ignore[misc]
                "the new certificate",
            )
    finally:
        done.set()
        thread.join(60)
    assert not failures
    assert served[0] > 10


# Private


def _errors_about(proxy: ProxyProcess, name: str) -> list[str]:
    return [line for line in proxy.operator_log().splitlines() if " ERROR " in line and name in line]


def test_a_good_pair_outlives_the_control_process_when_its_files_are_spoilt(
    tmp_path: Path, own_certificates: Path, authority: Authority
) -> None:
    proxy = ProxyProcess(
        tmp_path / "two", certificates=own_certificates, toml=SHORT_GOODBYE, flags=("--workers", "2")
    ).start()
    try:
        good = _serial(proxy, authority, "a.own.test")
        authority.issue("b.own.test").write(own_certificates / "b.own.test")  # what the others would get
        eventually(lambda: _covers(proxy, authority, "b.own.test"), "the added certificate")
        (own_certificates / "a.own.test" / "fullchain.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
        for name in ("control", "work0", "control"):  # a new worker gets it from the new control
            _replace(proxy, name)
            assert {_serial(proxy, authority, "a.own.test") for _ in range(20)} == {good}
        pair = authority.issue("a.own.test")
        pair.write(own_certificates / "a.own.test")
        eventually(lambda: _serial(proxy, authority, "a.own.test") == pair.serial, "the new certificate")
        proxy.stop()
    finally:
        proxy.kill()


def _replace(proxy: ProxyProcess, name: str) -> None:
    """Kill a process and wait until its successor does its work."""
    victim = processes(proxy)[name]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: replaced(proxy, name, victim), f"another {name}")
    eventually(lambda: _answers(proxy), "the registration API answers")
    eventually(lambda: proxy.metric("portero_feed_subscribers") == 2, "both workers are fed")


def _answers(proxy: ProxyProcess) -> bool:
    try:
        return proxy.call("GET", "/readyz").status == 200
    except OSError:
        return False
