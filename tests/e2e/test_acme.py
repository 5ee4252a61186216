"""Certificates from Pebble, the CA for tests: `-strict`, with nonces refused at random."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.e2e.acme_site import AcmeSite, presented
from tests.e2e.certificates import Authority
from tests.e2e.conftest import StartBackend
from tests.e2e.pebble import EAB_HMAC, EAB_KID, Pebble
from tests.e2e.proxy_process import ProxyProcess, clean_environment, free_port
from tests.e2e.waiting import eventually

StartPebble = Callable[..., Pebble]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[AcmeSite]:
    made = AcmeSite(tmp_path / "site")
    yield made
    made.end()


@pytest.fixture
def start_pebble(tmp_path: Path, site: AcmeSite) -> Iterator[StartPebble]:
    """Start a CA that validates at the site's ports; it ends with the test."""
    started: list[Pebble] = []

    def start(http_port: int = 0, tls_port: int = 0, **options: object) -> Pebble:
        pebble = Pebble(
            tmp_path / f"pebble-{len(started)}",
            http_port or site.http_port,
            tls_port or site.tls_port,
            **options,  # type: ignore[arg-type]
        )
        started.append(pebble)
        site.use(pebble.start())
        return pebble

    yield start
    for pebble in started:
        pebble.stop()


def portero(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run a command; its exit status, and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "portero_py", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=clean_environment(environment),
    )
    return done.returncode, done.stdout + done.stderr


def metrics(proxy: ProxyProcess) -> str:
    return proxy.call("GET", "/metrics").body.decode()


def names_of(certificate: x509.Certificate) -> list[str]:
    listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return sorted(str(name) for name in listed.value.get_values_for_type(x509.DNSName))


# Issuance


@pytest.mark.parametrize(
    ("challenge", "nonce_reject"),
    [("tls-alpn-01", 15), ("http-01", 15), ("tls-alpn-01", 60), ("http-01", 60)],
)
def test_names_on_one_certificate_are_validated_and_served(
    site: AcmeSite, start_pebble: StartPebble, tmp_path: Path, challenge: str, nonce_reject: int
) -> None:
    pebble = start_pebble(nonce_reject=nonce_reject)
    proxy = site.start(
        "a.example,www.a.example", "b.example", challenge=challenge, http=challenge == "http-01"
    )
    assert names_of(site.issued("a.example")) == ["a.example", "www.a.example"]
    assert names_of(site.issued("b.example")) == ["b.example"]
    eventually(lambda: proxy.metric("portero_acme_attempts_total", result="issued") == 2, "both count")
    assert 'portero_certificate_expiry_timestamp_seconds{name="a.example"}' in metrics(proxy)
    assert "terms of service, agreed to: data:text/plain" in proxy.log()
    roots = tmp_path / "roots.pem"
    roots.write_bytes(pebble.root())
    status, said = portero("certs", *site.flags()[:6])
    assert status == 0
    assert re.search(
        r"a\.example, www\.a\.example; until .*\n  issuer: Pebble.*; by ACME; next renewal: 20", said
    )
    for name in ("a.example", "www.a.example"):
        status, said = portero(
            *("certs", "check", name, *site.flags()[:6], "--listen-addr", f"127.0.0.1:{site.tls_port}"),
            SSL_CERT_FILE=str(roots),
        )
        assert (status, "bad:" in said) == (0, False), said
    proxy.stop()
    for path in site.state.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600) or path.name == "leases.json", path
    assert stat.S_IMODE((site.certs / "a.example" / "privkey.pem").stat().st_mode) == 0o600


def test_until_the_first_certificate_is_there_the_default_one_is_served(
    site: AcmeSite, start_pebble: StartPebble
) -> None:
    Authority().issue("default.example").write(site.certs / "default.example")
    default = site.leaf("default.example")
    site.use(start_pebble())
    dead = free_port()
    site.directory = f"https://127.0.0.1:{dead}/dir"
    proxy = site.start("a.example")
    assert presented(site.tls_port, "a.example") == default
    said = eventually(
        lambda: re.search("a.example has no certificate yet: .* default one .default.example", proxy.log()),
        "it",
    )
    assert said
    eventually(lambda: "cannot be reached" in proxy.log(), "it says why")
    status, listed = portero("certs", *site.flags()[:6], "--acme-domain", "a.example")
    assert status == 0
    assert "no certificate yet for a.example" in listed
    assert "(ca_unreachable)" in listed
    proxy.stop()


def test_a_hand_made_certificate_is_never_overwritten(site: AcmeSite, start_pebble: StartPebble) -> None:
    start_pebble()
    pair = Authority().issue("mine.example")
    pair.write(site.certs / "mine.example")
    proxy = site.start("mine.example", "other.example")
    other = site.issued("other.example")
    # Hand-made ones take over even where ACME was first.
    pair.write(site.certs / "other.example")
    site.change_progress("other.example", revoked=True)
    proxy.signal(signal.SIGHUP)
    eventually(lambda: proxy.log().count("leaves it alone") == 2, "both are left alone")
    for name in ("mine.example", "other.example"):
        assert (site.certs / name / "fullchain.pem").read_bytes() == pair.chain
        assert (site.certs / name / "privkey.pem").read_bytes() == pair.key
    eventually(lambda: presented(site.tls_port, "other.example") != other, "the hand-made one is presented")
    proxy.stop()


def test_a_ca_that_wants_external_accounts_gets_one(
    site: AcmeSite, start_pebble: StartPebble, tmp_path: Path
) -> None:
    start_pebble(eab=True)
    proxy = site.start("a.example")
    eventually(lambda: "--acme-eab-kid and --acme-eab-hmac-file" in proxy.log(), "it says what is missing")
    proxy.stop()
    site.change_progress("a.example", retry_at=0)
    key = tmp_path / "hmac"
    key.write_text(EAB_HMAC + "\n")
    proxy = site.start("a.example", more=("--acme-eab-kid", EAB_KID, "--acme-eab-hmac-file", str(key)))
    site.issued("a.example")
    proxy.stop()
    assert EAB_HMAC not in proxy.log()


# The account


def test_the_account_is_used_again_and_its_key_can_be_changed(
    site: AcmeSite, start_pebble: StartPebble
) -> None:
    pebble = start_pebble()
    proxy = site.start("a.example")
    first = site.issued("a.example")
    proxy.stop()
    before = site.account()
    proxy = site.start("a.example", "b.example")
    site.issued("b.example")
    assert site.account() == before
    assert pebble.log().count("There are now 1 accounts in memory") <= 1
    assert "There are now 2 accounts" not in pebble.log()
    status, said = portero("certs", "rollover", *site.flags()[2:])
    assert (status, before["url"] in said) == (0, True), said
    after = site.account()
    assert after["url"] == before["url"]
    assert after["key"] != before["key"]
    # The running proxy goes on with the new key.
    status, said = portero("certs", "revoke", "a.example", *site.flags()[2:])
    assert status == 0, said
    assert pebble.status_of(first.serial_number) == "Revoked"
    proxy.signal(signal.SIGHUP)
    site.issued("a.example", other_than=first.serial_number)
    assert "There are now 2 accounts" not in pebble.log()
    assert not site.progress("a.example")["revoked"]
    proxy.stop()


@pytest.mark.parametrize("was_taken", [True, False])
def test_a_change_of_the_key_that_broke_off_is_decided_later(
    site: AcmeSite, start_pebble: StartPebble, was_taken: bool
) -> None:
    pebble = start_pebble()
    site.start("a.example").stop()
    proxy = site.start("a.example")
    site.issued("a.example")
    proxy.stop()
    old = site.account()
    assert portero("certs", "rollover", *site.flags()[2:])[0] == 0
    new = site.account()
    # As the file was between the two writes; the CA has the new key. In the other case it has the old one.
    keys = (old["key"], new["key"]) if was_taken else (new["key"], old["key"])
    path = next(site.state.glob("acme/*/account.json"))
    path.write_text(json.dumps({"url": old["url"], "key": keys[0], "next_key": keys[1]}))
    proxy = site.start("a.example", "b.example")
    site.issued("b.example")
    proxy.stop()
    assert site.account() == {"url": old["url"], "key": new["key"]}
    assert "There are now 2 accounts" not in pebble.log()


# Failures


def test_a_failed_validation_is_tried_the_other_way(site: AcmeSite, start_pebble: StartPebble) -> None:
    # The CA reaches something else on the port for tls-alpn-01.
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        start_pebble(tls_port=elsewhere.getsockname()[1])
        threading.Thread(target=_hang_up, args=(elsewhere,), daemon=True).start()
        proxy = site.start("a.example,www.a.example")
        site.issued("a.example")
        assert "tls-alpn-01 failed, http-01 is next" in proxy.log()
        assert site.progress("a.example")["failures"] == 0
        proxy.stop()


def test_a_name_that_leads_elsewhere_is_explained_and_tried_again_later(
    site: AcmeSite, start_pebble: StartPebble
) -> None:
    dead = free_port()
    start_pebble(http_port=dead, tls_port=dead)
    proxy = site.start("a.example")
    eventually(lambda: site.progress("a.example").get("failures"), "it failed")
    progress = site.progress("a.example")
    assert progress["step"] == "idle"
    assert progress["reason"] == "validation_failed"
    assert 240 < progress["retry_at"] - time.time() < 360
    assert proxy.metric("portero_acme_attempts_total", result="validation_failed") == 1
    status, said = portero("certs", "check", "a.example", *site.flags()[:6])
    assert status == 1
    assert "the CA could not connect: is the name's address this machine" in said
    proxy.stop()


def test_names_that_lead_nowhere_do_not_delay_one_that_is_good(
    site: AcmeSite, start_pebble: StartPebble
) -> None:
    pebble = start_pebble()
    dead = [f"dead{number}.example" for number in range(24)]
    for name in dead:
        pebble.lead(name, "127.0.0.2")
    # There the CA's connections are taken, and nothing is ever said.
    with (
        socket.create_server(("127.0.0.2", site.tls_port), backlog=1000),
        socket.create_server(("127.0.0.2", site.http_port), backlog=1000),
    ):
        proxy = site.start(*dead, "good.example")
        site.issued("good.example")
        failed = [name for name in dead if site.progress(name).get("failures")]
        assert len(failed) < len(dead) / 2
    proxy.stop()


def test_the_state_directory_may_be_lost_at_every_start(site: AcmeSite, start_pebble: StartPebble) -> None:
    pebble = start_pebble()
    proxy = site.start("a.example,www.a.example")
    first = site.issued("a.example")
    proxy.stop()
    for _ in range(2):
        shutil.rmtree(site.state / "acme")
        proxy = site.start("a.example,www.a.example")
        eventually(lambda: "nothing is ordered: a.example" in proxy.log(), "it is taken over")  # noqa: B023
        assert site.issued("a.example") == first
        eventually(lambda: site.progress("a.example").get("fingerprint"), "it is written down")
        proxy.stop()
    assert pebble.log().count("Issued certificate serial") == 1
    status, said = portero("certs", *site.flags()[:6])
    assert (status, "by ACME; next renewal: 20" in said) == (0, True), said


def test_a_ca_that_comes_up_late_is_found_within_seconds(
    site: AcmeSite, start_pebble: StartPebble, tmp_path: Path
) -> None:
    pebble = Pebble(tmp_path / "late", site.http_port, site.tls_port)
    site.use(pebble)
    proxy = site.start("a.example")
    eventually(lambda: site.progress("a.example").get("unheard"), "nobody was there")
    assert site.progress("a.example")["retry_at"] - time.time() < 10
    pebble.start()
    try:
        site.issued("a.example")
        assert site.progress("a.example")["failures"] == 0
    finally:
        pebble.stop()
    proxy.stop()


# Services that bring their domain along


def test_a_service_that_registers_brings_its_certificate_along(
    site: AcmeSite, start_pebble: StartPebble, start_backend: StartBackend
) -> None:
    pebble = start_pebble()
    backend = start_backend()
    proxy = site.start(more=("--acme-on-register", "*.apps.example"))
    assert presented(site.tls_port, "sni.apps.example") is None
    for service in ("shop.apps.example", "shop.example", "deep.shop.apps.example", "*.apps.example"):
        proxy.register(service, "127.0.0.1", backend.port, ttl_seconds=60, use_tls=False)
    assert names_of(site.issued("shop.apps.example")) == ["shop.apps.example"]
    assert pebble.log().count("Issued certificate serial") == 1
    assert sorted(path.name for path in site.certs.iterdir()) == ["shop.apps.example"]
    proxy.stop()


# Several workers, and load


@pytest.mark.parametrize("workers", [1, 2])
def test_renewals_under_load_break_no_connection(
    site: AcmeSite,
    start_pebble: StartPebble,
    start_backend: StartBackend,
    need: Callable[[str], str],
    workers: int,
) -> None:
    h2load = need("h2load")
    start_pebble(nonce_reject=15)
    backend = start_backend()
    proxy = site.start(
        "a.example",
        challenge="tls-alpn-01",
        http=False,
        more=("--workers", str(workers), "--access-log", "off"),
    )
    serial = site.issued("a.example").serial_number
    proxy.register("a.example", "127.0.0.1", backend.port, ttl_seconds=600, use_tls=False)
    url = f"https://a.example:{site.tls_port}/"
    common = [h2load, f"--connect-to=127.0.0.1:{site.tls_port}", "-D", "8", "-c", "4"]
    said: list[str] = []
    fresh = _FreshConnections(site.tls_port)
    fresh.start()
    renewals = 0
    try:
        while renewals < 2:  # more than that come within one load, but on a machine that has no time
            loads = [
                subprocess.Popen(
                    [*common, *kind, url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
                for kind in (("-m", "4"), ("--h1",))
            ]
            try:
                while any(load.poll() is None for load in loads) and renewals < 20:
                    assert portero("certs", "revoke", "a.example", *site.flags()[2:])[0] == 0
                    proxy.signal(signal.SIGHUP)
                    serial = site.issued("a.example", other_than=serial).serial_number
                    renewals += 1
                said += [load.communicate(timeout=60)[0] for load in loads]
            finally:
                for load in loads:
                    load.kill()
                    load.wait()
    finally:
        fresh.stop()
    assert fresh.made > 20
    assert fresh.broken == []
    for text in said:
        done = re.search(r"(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", text)
        assert done, text
        assert int(done[1]) > 100
        assert done.groups()[2:] == ("0", "0", "0"), text
        assert done[1] == done[2], text
    proxy.stop()


class _FreshConnections:
    """One client after the other, each with a handshake: none may see a challenge's certificate."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.made = 0
        self.broken: list[str] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            found = presented(self._port, "a.example", *(("h2",), ("http/1.1",), ())[self.made % 3])
            self.made += 1
            if found is None:
                self.broken.append("refused")
            elif "Pebble" not in found.issuer.rfc4514_string():
                self.broken.append(found.public_bytes(Encoding.PEM).decode())


# Private


def _hang_up(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.close()
