"""ACME when things go wrong: crashes at every step, limits, replies that are no ACME, and renewal on request.

An HTTPS double of the CA stands before Pebble (`acme_front`).
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from portero_py.core.acme.ari import certificate_id
from tests.e2e.acme_front import AcmeFront, Asked, problem
from tests.e2e.acme_site import AcmeSite
from tests.e2e.certificates import Authority, server_context
from tests.e2e.pebble import Answer, Pebble
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually

NAME = "a.example"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[AcmeSite]:
    made = AcmeSite(tmp_path / "site")
    yield made
    made.end()


@pytest.fixture
def front(tmp_path: Path, site: AcmeSite) -> Iterator[AcmeFront]:
    """Pebble behind its double; no nonce is refused, so that requests can be counted."""
    pebble = Pebble(tmp_path / "pebble", site.http_port, site.tls_port, nonce_reject=0).start()
    made = AcmeFront(tmp_path / "front", pebble).start()
    site.directory, site.ca_file = made.directory, made.ca_file
    yield made
    made.stop()
    pebble.stop()


def issued_by(front: AcmeFront) -> int:
    return front.pebble.log().count("Issued certificate serial")


class Killer:
    """Ends the proxy with SIGKILL when a request of one kind is there, or has its answer, which gets lost."""

    def __init__(self, front: AcmeFront, what: str, *, before: bool) -> None:
        self._proxy: ProxyProcess | None = None
        self._is_armed = threading.Event()
        self._what = what
        if before:
            front.rules.append(self._lose)
        else:
            front.after.append(self._kill)

    def arm(self, proxy: ProxyProcess) -> None:
        self._proxy = proxy
        self._is_armed.set()

    def _lose(self, asked: Asked) -> Answer | None:
        return Answer(500, {}, b"") if self._kill(asked) else None

    def _kill(self, asked: Asked) -> bool:
        if asked.what != self._what:
            return False
        self._is_armed.wait(20)
        proxy, self._proxy = self._proxy, None
        if proxy is not None:
            proxy.crash()
        return proxy is not None


# Crashes


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "step",
    [
        "order-plz",
        "finalize-order",
        *(
            pytest.param(step, marks=pytest.mark.minutes)
            for step in ("sign-me-up", "authZ", "chalZ", "certZ")
        ),
    ],
)
def test_a_crash_at_any_step_goes_on_with_the_same_order(
    site: AcmeSite, front: AcmeFront, step: str, before: bool
) -> None:
    killer = Killer(front, step, before=before)
    proxy = site.start(NAME, challenge="tls-alpn-01", http=False)
    killer.arm(proxy)
    eventually(lambda: not proxy.is_running, "it is dead")
    site.start(NAME, challenge="tls-alpn-01", http=False)
    site.issued(NAME)
    assert issued_by(front) == 1
    # Lost are an order whose address never arrived, and one that the CA came to validate when all were dead:
    # it comes when it likes, perhaps when the next one is there.
    orders = front.count("order-plz")
    if step == "chalZ" and not before:
        assert orders in (1, 2)
    else:
        assert orders == (2 if step == "order-plz" else 1)
    assert "There are now 2 accounts" not in front.pebble.log()
    assert site.progress(NAME)["step"] == "idle"


def test_a_crash_between_issuance_and_installation_is_completed_at_the_start(
    site: AcmeSite, front: AcmeFront
) -> None:
    proxy = site.start(NAME)
    site.issued(NAME)
    proxy.crash()
    (site.certs / NAME / "fullchain.pem").unlink()
    site.change_progress(NAME, step="issued")
    asked = len(front.asked)
    proxy = site.start(NAME)
    site.issued(NAME)
    assert proxy.log().index("certificate installed") < proxy.log().index("https on")
    assert [each for each in front.asked[asked:] if each.method == "POST"] == []


# What the CA says


def test_a_rate_limit_is_respected_and_explained(site: AcmeSite, front: AcmeFront) -> None:
    limit = problem(429, "rateLimited", "too many certificates already issued", retry_after="7200")
    front.rules.append(lambda asked: limit if asked.what == "order-plz" else None)
    proxy = site.start(NAME)
    eventually(lambda: site.progress(NAME).get("failures"), "it was refused")
    progress = site.progress(NAME)
    assert progress["reason"] == "ca_rate_limited"
    assert 7100 < progress["retry_at"] - time.time() <= 7200
    assert (
        "rate limit is reached (too many certificates already issued); the next attempt is at" in proxy.log()
    )
    for _ in range(3):  # nothing makes it ask again before
        proxy.signal(signal.SIGHUP)
        time.sleep(0.2)
    assert front.count("order-plz") == 1
    assert proxy.metric("portero_acme_attempts_total", result="ca_rate_limited") == 1
    front.rules.clear()
    site.change_progress(NAME, retry_at=0)
    proxy.signal(signal.SIGHUP)
    site.issued(NAME)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Answer(200, {"content-type": "application/json"}, b"[1]"), "bad_ca_reply"),
        (Answer(200, {"content-type": "application/json"}, b"{" * 100_000), "bad_ca_reply"),
        (Answer(200, {"content-type": "application/json"}, b" " * 300_000), "bad_ca_reply"),
        (
            Answer(200, {"content-type": "application/json"}, b'{"newNonce": "file:///etc/passwd"}'),
            "bad_ca_reply",
        ),
        (Answer(302, {"location": "https://127.0.0.1:1/"}, b""), "ca_refused"),
        (Answer(503, {"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, b"busy"), "ca_unreachable"),
    ],
    ids=["a list", "deep", "long", "another scheme", "a redirect", "no service"],
)
def test_a_directory_that_is_none_is_survived(
    site: AcmeSite, front: AcmeFront, reply: Answer, reason: str
) -> None:
    front.rules.append(lambda asked: reply if asked.what == "dir" else None)
    proxy = site.start(NAME)
    eventually(lambda: site.progress(NAME).get("failures"), "it was refused")
    progress = site.progress(NAME)
    assert progress["reason"] == reason
    assert progress["retry_at"] - time.time() < 8 * 86400 + 1
    front.rules.clear()
    site.change_progress(NAME, retry_at=0)
    proxy.signal(signal.SIGHUP)
    site.issued(NAME)


def test_an_account_that_the_ca_has_forgotten_is_made_again(site: AcmeSite, front: AcmeFront) -> None:
    gone = problem(400, "accountDoesNotExist", "unknown account")
    refused: list[Asked] = []

    def forgotten(asked: Asked) -> Answer | None:
        if asked.what == "order-plz" and not refused:
            refused.append(asked)
            return gone
        return None

    front.rules.append(forgotten)
    site.start(NAME)
    site.issued(NAME)
    assert front.count("sign-me-up") == 2
    assert "There are now 2 accounts" not in front.pebble.log()  # the key is the same


# Renewal when the CA wants it


@pytest.mark.parametrize("is_replaced_already", [False, True])
def test_the_ca_says_when_to_renew_and_is_told_what_is_replaced(
    site: AcmeSite, front: AcmeFront, is_replaced_already: bool
) -> None:
    front.window = ("2044-01-01T00:00:00Z", "2044-01-02T00:00:00Z")
    proxy = site.start(NAME)
    first = site.issued(NAME)
    eventually(lambda: site.progress(NAME)["window"], "it has asked")
    progress = site.progress(NAME)
    assert progress["window"][0] <= progress["renew_at"] < progress["window"][1]
    assert progress["why"] == "https://ca.example/why"
    assert 21_000 < progress["ask_at"] - time.time() <= 21_600
    if is_replaced_already:
        conflict = problem(409, "alreadyReplaced", "has a successor")
        front.rules.append(
            lambda asked: conflict if asked.what == "order-plz" and "replaces" in asked.payload else None
        )
    # Time passes, and the CA changes its mind.
    front.window = ("2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")
    site.change_progress(NAME, ask_at=0, installed_at=time.time() - 86400)
    proxy.signal(signal.SIGHUP)
    site.issued(NAME, other_than=first.serial_number)
    orders = [asked.payload for asked in front.asked if asked.what == "order-plz"]
    assert "replaces" not in orders[0]
    assert orders[1]["replaces"] == certificate_id(first)
    assert len(orders) == (3 if is_replaced_already else 2)
    assert is_replaced_already == ("replaces" not in orders[-1])
    asked = [each.path for each in front.asked if each.what == "renewal-info"]
    assert asked[0] == f"/renewal-info/{certificate_id(first)}"
    # A window in the past does not make it order again and again.
    eventually(lambda: site.progress(NAME)["window"], "it has asked about the new one")
    proxy.signal(signal.SIGHUP)
    time.sleep(0.5)
    assert len([each for each in front.asked if each.what == "order-plz"]) == len(orders)


# A CA that hangs


@pytest.mark.parametrize("workers", [0, 2])
def test_the_exit_does_not_wait_for_a_ca_that_never_ends_its_reply(site: AcmeSite, workers: int) -> None:
    authority = Authority()
    authority.issue("127.0.0.1").write(site.folder / "ca")
    site.ca_file = site.folder / "ca.pem"
    site.ca_file.write_bytes(authority.pem)
    over = threading.Event()
    asked = threading.Semaphore(0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tls = server_context(site.folder / "ca")

        def trickle() -> None:
            connection = tls.wrap_socket(listener.accept()[0], server_side=True)
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            asked.release()
            try:
                while not over.wait(0.5):  # never silent for long
                    connection.sendall(b" ")
            except OSError:
                pass  # the proxy is gone
            connection.close()

        site.directory = f"https://127.0.0.1:{listener.getsockname()[1]}/dir"
        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        try:
            proxy = site.start(NAME, more=("--workers", str(workers)) if workers else ())
            assert asked.acquire(timeout=60)
            proxy.signal(signal.SIGTERM)
            assert proxy.wait(25) == 0  # the reply would go on for twice as long
        finally:
            over.set()


# Several instances


def test_two_instances_that_share_their_folders_order_once(site: AcmeSite, front: AcmeFront) -> None:
    # Both begin at once; the CA reaches the listener of either.
    first = site.start(NAME, challenge="tls-alpn-01", http=False)
    other = ProxyProcess(
        site.folder / "other",
        certificates=site.certs,
        flags=[*site.flags()[2:], "--acme-agree-tos", "--acme-domain", NAME],
    ).start()
    try:
        site.issued(NAME)
        eventually(lambda: "certificate loaded" in other.log(), "the other one serves it too")
    finally:
        other.kill()
    assert issued_by(front) == 1
    first.kill()
