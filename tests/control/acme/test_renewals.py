"""Looking after certificates, against a CA in memory: what is ordered, what is shown, what survives."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from portero_py.config.model import Acme as AcmeConfig
from portero_py.control.acme import renewals
from portero_py.control.acme.files import AcmeFiles
from portero_py.control.acme.folder import CertificateFolder
from portero_py.control.acme.renewals import MAX_SAID, Acme
from portero_py.control.acme.replies import Authorization, Challenge, Order
from portero_py.control.acme.wanted import FORGET_SECONDS, MAX_BROUGHT
from portero_py.core.acme.progress import Progress, Step
from portero_py.core.acme.schedule import AT_ONCE, LATER_AT_ONCE
from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import CertificateTable
from portero_py.core.challenges import Challenges
from portero_py.demo.self_signed import Authority
from portero_py.errors import CaOutOfReach, CaRefused, CaUnreachable, StateUnwritable, ValidationFailed
from tests.waiting import until

NAME = "a.example"
DIRECTORY = "https://ca.example/dir"


class Ca:
    """A CA that validates by looking at what is published."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.published = Challenges()
        self.seen: list[str] = []  # the types that were answered
        self.refuses: set[str] = set()  # the types that it does not find answered
        self.is_down = False
        self.out_of_reach = False
        self.undecided: set[str] = set()  # names that it never comes to look at
        self._lock = threading.Lock()  # several orders ask at a time
        self._names: dict[str, tuple[str, ...]] = {}  # by the order's address
        self._orders: dict[str, str] = {}  # status
        self._status: dict[str, str] = {}  # of names
        self._kind = ""
        self._chains: dict[str, bytes] = {}

    # What portero calls

    has_renewal_info = False

    def close(self) -> None:
        self.asked["close"] += 1

    def key_authorization(self, token: str) -> str:
        return f"{token}.thumbprint"

    def new_order(self, names: tuple[str, ...], replaces: str = "") -> Order:
        self._ask("new_order")
        url = f"https://ca.example/{names[0]}/{self.asked['new_order']}"
        self._names[url], self._orders[url] = names, "pending"
        self._status.update(dict.fromkeys(names, "pending"))
        return self.order(url)

    def order(self, url: str) -> Order:
        self._ask("order")
        names = self._names[url]
        if self._orders[url] == "pending" and all(self._status[name] == "valid" for name in names):
            self._orders[url] = "ready"
        return Order(url, self._orders[url], names, url, url, None, 0.0)

    def authorization(self, url: str) -> Authorization:
        self._ask("authorization")
        failed = self._status[url] == "invalid"
        error = ValidationFailed("not found") if failed else None
        status = self._status[url]
        kinds = [self._kind] if failed else ["http-01", "tls-alpn-01", "dns-01"]
        challenges = tuple(Challenge(kind, f"{kind} {url}", f"{kind}-{url}", status, error) for kind in kinds)
        return Authorization(url, url, status, challenges, 0.0)

    def answer(self, challenge: Challenge) -> None:
        self._ask("answer")
        self._kind, name = challenge.url.split()
        self.seen.append(self._kind)
        is_shown = name in self.published.tls_alpn or challenge.token in self.published.http
        assert is_shown, "the CA is called before every listener answers"
        if name not in self.undecided:
            self._status[name] = "invalid" if self._kind in self.refuses else "valid"

    def finalize(self, order: Order, key_pem: bytes, names: tuple[str, ...]) -> None:
        self._ask("finalize")
        key: Any = load_pem_private_key(key_pem, None)
        now = dt.datetime.now(dt.UTC)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test ca")])
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + dt.timedelta(days=90))
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        self._chains[order.url], self._orders[order.url] = leaf.public_bytes(Encoding.PEM), "valid"

    def certificate(self, order: Order) -> bytes:
        self._ask("certificate")
        return self._chains[order.url]

    # Private

    def _ask(self, what: str) -> None:
        if self.is_down:
            raise CaUnreachable("the CA is down")
        if self.out_of_reach:
            raise CaOutOfReach("connection refused")
        with self._lock:
            self.asked[what] += 1


class Desk:
    """Folders, a CA, and portero's side of it."""

    def __init__(self, folder: Path) -> None:
        self.certs, self.state = folder / "certs", folder / "state"
        self.certs.mkdir()
        self.state.mkdir()
        self.ca = Ca()
        self.results: Counter[str] = Counter()
        self.faults: list[str] = []
        self.table = CertificateTable()
        self.services: set[str] = set()
        self.now = time.time()

    @property
    def files(self) -> AcmeFiles:
        return AcmeFiles(self.state, DIRECTORY)

    def acme(
        self,
        *groups: tuple[str, ...],
        on_register: tuple[str, ...] = (),
        http: bool = True,
        directory: str = DIRECTORY,
        **more: Any,
    ) -> Acme:
        async def publish(challenges: Challenges) -> None:
            assert challenges.version > self.ca.published.version
            self.ca.published = challenges

        made = Acme(
            AcmeConfig(domains=groups, on_register=on_register, directory=directory, agree_tos=True, **more),
            str(self.state),
            str(self.certs),
            publish=publish,
            table=lambda: self.table,
            count=lambda result: self.results.update([result]),
            has_service=lambda name: name in self.services,
            has_plain_http=http,
            at_usual_port=("tls-alpn-01",),
            count_fault=self.faults.append,
            clock=lambda: self.now,
            chance=lambda: 0.5,
        )
        made._open_client = lambda: self.ca  # type: ignore[method-assign,assignment,return-value]
        return made

    @asynccontextmanager
    async def running(self, acme: Acme) -> AsyncIterator[None]:
        await acme.recover()
        task = asyncio.create_task(acme.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            acme.close()
            assert not self.ca.published, "challenges are still shown"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_a_certificate_is_ordered_and_installed_once(desk: Desk) -> None:
    acme = desk.acme((NAME, "www.a.example"))
    async with desk.running(acme):
        await until(lambda: desk.results)
        for _ in range(3):
            acme.look()
            await asyncio.sleep(0.02)
    assert desk.results == {"issued": 1}
    assert desk.ca.seen == ["tls-alpn-01"] * 2
    chain, key = ((desk.certs / NAME / part).read_bytes() for part in ("fullchain.pem", "privkey.pem"))
    assert parse_pair(NAME, chain, key, "here").names == (NAME, "www.a.example")
    assert desk.ca.asked["new_order"] == desk.ca.asked["finalize"] == 1


async def test_http_01_is_answered_by_token_while_it_is_pending(desk: Desk) -> None:
    desk.ca.refuses = {"tls-alpn-01"}
    acme = desk.acme((NAME,))
    shown: list[str | None] = []
    answer = desk.ca.answer

    def look_then_answer(challenge: Challenge) -> None:
        shown.append(acme.http_challenge(challenge.token))
        answer(challenge)

    desk.ca.answer = look_then_answer  # type: ignore[method-assign]
    async with desk.running(acme):
        await until(lambda: desk.results)
    assert desk.ca.seen == ["tls-alpn-01", "http-01"]
    assert shown == [None, f"http-01-{NAME}.thumbprint"]
    assert acme.http_challenge(f"http-01-{NAME}") is None
    assert desk.results == {"issued": 1}


async def test_after_both_challenges_failed_there_is_a_pause_that_grows(desk: Desk) -> None:
    desk.ca.refuses = {"tls-alpn-01", "http-01"}
    acme = desk.acme((NAME,))
    async with desk.running(acme):
        for failures, pause in ((1, 300), (2, 600), (3, 1200)):
            acme.look()
            await until(lambda: desk.results["validation_failed"] == failures)  # noqa: B023
            await until(lambda: desk.files.progress(NAME).failures == failures)  # noqa: B023
            progress = desk.files.progress(NAME)
            assert progress.retry_at == pytest.approx(desk.now + pause)
            assert progress.step is Step.IDLE
            desk.now = progress.retry_at - 1
            acme.look()
            await asyncio.sleep(0.02)
            assert desk.ca.asked["new_order"] == 2 * failures
            desk.now = progress.retry_at
        desk.ca.refuses = set()
        acme.look()
        await until(lambda: desk.results["issued"])
    assert desk.files.progress(NAME).failures == 0


async def test_an_order_outlives_a_ca_that_is_down(desk: Desk) -> None:
    acme = desk.acme((NAME,))
    finalize = desk.ca.finalize

    def fall_over(*arguments: Any) -> None:
        finalize(*arguments)
        desk.ca.is_down = True

    desk.ca.finalize = fall_over  # type: ignore[method-assign,assignment]
    async with desk.running(acme):
        await until(lambda: desk.results["ca_unreachable"])
        await until(lambda: desk.files.progress(NAME).failures)
        assert desk.files.progress(NAME).step is Step.FINALIZED
        desk.ca.is_down = False
        desk.now += 400
        acme.look()
        await until(lambda: desk.results["issued"])
    assert desk.ca.asked["new_order"] == 1


async def test_nothing_is_ordered_when_the_key_cannot_be_kept(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = desk.acme((NAME,))
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", _full)
    async with desk.running(acme):
        await until(lambda: desk.results["state_unwritable"])
        for _ in range(3):  # the failure itself could not be written down, and counts all the same
            acme.look()
            await asyncio.sleep(0.02)
        assert desk.results == {"state_unwritable": 1}
        assert desk.ca.asked["new_order"] == 0
        monkeypatch.setattr(os, "fsync", fsync)
        desk.now += 400
        acme.look()
        await until(lambda: desk.results["issued"])


async def test_a_disk_that_is_full_when_the_certificate_comes_loses_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = desk.acme((NAME,))
    fsync, certificate = os.fsync, desk.ca.certificate

    def fill(order: Order) -> bytes:
        monkeypatch.setattr(os, "fsync", _full)
        return certificate(order)

    desk.ca.certificate = fill  # type: ignore[method-assign]
    async with desk.running(acme):
        await until(lambda: desk.results["state_unwritable"])
        desk.ca.certificate = certificate  # type: ignore[method-assign]
        monkeypatch.setattr(os, "fsync", fsync)
        desk.now += 400
        acme.look()
        await until(lambda: desk.results["issued"])
    assert desk.ca.asked["new_order"] == desk.ca.asked["finalize"] == 1


async def test_an_installation_that_the_full_disk_kept_back_is_done_once_when_there_is_room(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pair = Authority().issue(NAME)
    desk.files.save_pair(NAME, pair.chain_pem, pair.key_pem)
    desk.files.save_progress(NAME, Progress((NAME,), Step.ISSUED, "https://ca.example/1"))
    acme = desk.acme((NAME,))
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", _full)
    async with desk.running(acme):
        await until(lambda: desk.results["state_unwritable"])
        await until(lambda: not acme._acting)
        monkeypatch.setattr(os, "fsync", fsync)
        desk.now += 400
        acme.look()
        await until(lambda: desk.files.progress(NAME).installed_at and not acme._unkept)
        for _ in range(3):
            desk.now += 1000
            acme.look()
            await asyncio.sleep(0.02)
        await until(lambda: not acme._unkept)
    assert desk.files.progress(NAME).step is Step.IDLE
    assert caplog.text.count("certificate installed") == 1


async def test_a_question_that_the_full_disk_kept_back_is_asked_once_when_there_is_room(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = desk.acme((NAME,))
    async with desk.running(acme):
        await until(lambda: desk.results["issued"])
        await until(lambda: desk.files.progress(NAME).ask_at)
        save, opened = AcmeFiles.save_progress, []

        def full(files: AcmeFiles, name: str, progress: Progress) -> None:
            opened.append(progress.ask_at)
            raise StateUnwritable("no space left")

        monkeypatch.setattr(AcmeFiles, "save_progress", full)
        desk.now = desk.files.progress(NAME).ask_at
        acme.look()
        await until(lambda: opened and not acme._acting)
        monkeypatch.setattr(AcmeFiles, "save_progress", save)
        for _ in range(100):
            if not acme._unkept:
                break
            desk.now += 3700
            acme.look()
            await asyncio.sleep(0.02)
            await until(lambda: not acme._sooner.is_set() and not acme._acting)
        assert not acme._unkept
        assert desk.files.progress(NAME).ask_at > desk.now


async def test_what_changes_nothing_is_not_done_over_and_over(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = desk.acme((NAME,))
    begun: list[float] = []

    async def to_no_avail(name: str, progress: Progress) -> None:
        begun.append(desk.now)

    looks, look_round = 0, acme._look_round

    async def counted() -> float:
        nonlocal looks
        until = await look_round()
        looks += 1
        return until

    monkeypatch.setattr(acme, "_look_round", counted)
    async with desk.running(acme):
        await until(lambda: desk.results["issued"])
        await until(lambda: desk.files.progress(NAME).ask_at and not acme._acting)
        monkeypatch.setattr(acme, "_install", to_no_avail)
        (desk.certs / NAME / "fullchain.pem").unlink()
        start = desk.now
        for _ in range(60):
            before = looks
            acme.look()
            await until(lambda before=before: looks > before and not acme._acting)  # type: ignore[misc]
            desk.now += 0.25
    assert [moment - start for moment in begun][:4] == pytest.approx([0, 1, 3, 7], abs=0.5)


async def test_one_that_fails_does_not_keep_the_others_waiting(desk: Desk) -> None:
    (desk.certs / "bad.example").write_text("a file in the place of the folder")
    acme = desk.acme(("bad.example",), (NAME,))
    async with desk.running(acme):
        await until(lambda: desk.results["issued"])
        await until(lambda: desk.results["state_unwritable"])
    assert (desk.certs / NAME / "fullchain.pem").exists()


async def test_names_that_nobody_validates_do_not_keep_one_waiting_that_is_new(desk: Desk) -> None:
    dead = [f"dead{number}.example" for number in range(24)]
    desk.ca.undecided = set(dead)
    async with desk.running(desk.acme(*((name,) for name in dead), (NAME,))):
        await until(lambda: desk.results["issued"])
        assert desk.results == {"issued": 1}
    assert (desk.certs / NAME / "fullchain.pem").exists()


async def test_names_that_have_failed_leave_room_for_one_that_registers(desk: Desk) -> None:
    dead = [f"dead{number}.example" for number in range(AT_ONCE + 8)]
    desk.ca.refuses = {"tls-alpn-01", "http-01"}
    acme = desk.acme(*((name,) for name in dead), on_register=("*.apps.example",))
    async with desk.running(acme):
        await until(lambda: desk.results["validation_failed"] == len(dead))
        desk.ca.refuses, desk.ca.undecided = set(), set(dead)
        desk.now += 400
        asked = desk.ca.asked["new_order"]
        acme.look()
        await until(lambda: desk.ca.asked["new_order"] == asked + LATER_AT_ONCE)
        acme.registered("new.apps.example")
        await until(lambda: desk.results["issued"])
        assert desk.ca.asked["new_order"] == asked + LATER_AT_ONCE + 1


async def test_a_ca_that_hangs_holds_up_neither_the_disk_nor_the_end(desk: Desk) -> None:
    acme = desk.acme((NAME,))
    async with desk.running(acme):
        await until(lambda: desk.results["issued"])
    hung, release = threading.Event(), threading.Event()

    def hang(names: tuple[str, ...], replaces: str = "") -> Order:
        hung.set()
        release.wait()
        raise CaUnreachable("at last")

    desk.ca.new_order = hang  # type: ignore[method-assign]
    acme = desk.acme((NAME,), *((f"{number}.example",) for number in range(8)))
    try:
        async with desk.running(acme):
            await until(hung.is_set)
            (desk.certs / NAME / "fullchain.pem").unlink()
            acme.look()
            await until((desk.certs / NAME / "fullchain.pem").exists)
        assert not release.is_set()
    finally:
        release.set()


async def test_a_ca_out_of_reach_is_tried_again_after_seconds(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.ca.out_of_reach = True
    acme = desk.acme((NAME,))
    async with desk.running(acme):
        for attempt, pause in ((1, 2), (2, 4), (3, 8)):
            await until(lambda: desk.results["ca_unreachable"] == attempt)  # noqa: B023
            await until(lambda: desk.files.progress(NAME).unheard == attempt)  # noqa: B023
            progress = desk.files.progress(NAME)
            assert progress.retry_at == pytest.approx(desk.now + pause)
            desk.now = progress.retry_at
            acme.look()
        desk.ca.out_of_reach, desk.ca.is_down = False, True
        desk.now += 400
        acme.look()
        await until(lambda: desk.files.progress(NAME).failures == 1)
        # What the CA heard of counts from the beginning.
        assert desk.files.progress(NAME).retry_at == pytest.approx(desk.now + 300)
    assert caplog.text.count("connection refused") == 1


async def test_the_client_is_opened_once_for_all_that_ask_at_a_time(desk: Desk) -> None:
    acme = desk.acme(*((f"{number}.example",) for number in range(10)))
    opened: list[int] = []
    acme._open_client = lambda: opened.append(1) or desk.ca  # type: ignore[method-assign,assignment,func-returns-value,return-value]
    desk.ca.undecided = {f"{number}.example" for number in range(10)}
    async with desk.running(acme):
        await until(lambda: desk.ca.asked["answer"] == 10)
    assert len(opened) == desk.ca.asked["close"] == 1


async def test_an_account_that_is_gone_is_opened_anew_while_others_still_use_it(desk: Desk) -> None:
    desk.ca.undecided = {"slow.example"}
    acme = desk.acme(("slow.example",), (NAME,))
    opened: list[int] = []
    acme._open_client = lambda: opened.append(1) or desk.ca  # type: ignore[method-assign,assignment,func-returns-value,return-value]
    ordered_with: dict[str, int] = {}  # the first or the second client
    new_order = desk.ca.new_order

    def unknown(names: tuple[str, ...], replaces: str = "") -> Order:
        if names == (NAME,) and len(opened) == 1:
            raise CaRefused("who is that?", 0.0, "accountDoesNotExist")
        ordered_with[names[0]] = len(opened)
        return new_order(names, replaces)

    desk.ca.new_order = unknown  # type: ignore[method-assign]
    async with desk.running(acme):
        await until(lambda: desk.results["ca_refused"])
        await until(lambda: desk.files.progress(NAME).failures)
        desk.now += 2
        acme.look()
        await until(lambda: desk.files.progress(NAME).ask_at and list(acme._acting) == ["slow.example"])
    assert ordered_with == {"slow.example": 1, NAME: 2}
    assert desk.ca.asked["close"] == len(opened)


async def test_a_state_directory_that_was_lost_costs_no_certificate(desk: Desk) -> None:
    for _ in range(3):
        async with desk.running(desk.acme((NAME, "www.a.example"))):
            await until(lambda: desk.files.pair(NAME) is not None)
            await until(lambda: desk.files.progress(NAME).installed_at)
            await until(lambda: desk.results["issued"])  # counted after it was written down
        assert desk.files.progress(NAME).names == (NAME, "www.a.example")
        shutil.rmtree(desk.state)
        desk.state.mkdir()
        desk.now += 10
    assert desk.results == {"issued": 1}
    # But it is renewed when that is due, and when it is not whole.
    desk.now += 61 * 86400
    async with desk.running(desk.acme((NAME, "www.a.example"))):
        await until(lambda: desk.results["issued"] == 2)
    shutil.rmtree(desk.state)
    desk.now += 10
    (desk.certs / NAME / "privkey.pem").write_bytes(Authority().issue(NAME).key_pem)
    async with desk.running(desk.acme((NAME, "www.a.example"))):
        await until(lambda: desk.results["issued"] == 3)


async def test_a_certificate_of_the_test_ca_is_not_taken_for_one_of_the_real_ca(desk: Desk) -> None:
    async with desk.running(desk.acme((NAME,))):
        await until(lambda: desk.results["issued"])
    desk.now += 10
    async with desk.running(desk.acme((NAME,), directory="https://real.example/dir")):
        await until(lambda: desk.results["issued"] == 2)


async def test_what_cannot_be_read_of_one_name_holds_up_no_other(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    (desk.files.root / "bad.example" / "progress.json").mkdir(parents=True)
    async with desk.running(desk.acme(("bad.example",), (NAME,))):
        await until(lambda: desk.results["issued"])
    assert "progress.json is not a regular file" in caplog.text


async def test_a_disk_that_does_not_answer_is_a_fault_until_it_does(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, go_on = threading.Event(), threading.Event()
    names = CertificateFolder.entries

    def hang(folder: CertificateFolder) -> Any:
        hung.set()
        go_on.wait()
        return names(folder)

    monkeypatch.setattr(CertificateFolder, "entries", hang)
    monkeypatch.setattr(renewals, "DISK_SECONDS", 0.01)
    acme = desk.acme((NAME,))
    try:
        async with desk.running(acme):
            await until(lambda: acme.faults and hung.is_set())
            assert set(desk.faults) == {"acme"}
            monkeypatch.setattr(renewals, "DISK_SECONDS", 60.0)
            go_on.set()
            acme.look()
            await until(lambda: desk.results["issued"])
            assert not acme.faults
    finally:
        go_on.set()


async def test_a_fault_at_one_name_leaves_the_others_to_be_completed_at_the_start(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Authority().issue(NAME)
    desk.files.save_pair(NAME, pair.chain_pem, pair.key_pem)
    for name in ("0.example", NAME):
        desk.files.save_progress(name, Progress((name,), Step.ISSUED, "https://ca.example/1"))
    acme = desk.acme((NAME,))
    install = acme._install

    async def odd(name: str, progress: Progress) -> None:
        if name != NAME:
            raise RecursionError
        await install(name, progress)

    monkeypatch.setattr(acme, "_install", odd)
    await acme.recover()
    acme.close()
    assert desk.results == {"acme_failed": 1}
    assert "0.example: what was interrupted" in caplog.text
    assert desk.files.progress(NAME).step is Step.IDLE


async def test_a_name_whose_look_breaks_off_is_passed_over(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = desk.acme(("odd.example",), (NAME,))
    look_at = acme._looks.at

    def odd(names: tuple[str, ...], *more: Any) -> Any:
        if names == ("odd.example",):
            raise ZeroDivisionError
        return look_at(names, *more)

    monkeypatch.setattr(acme._looks, "at", odd)
    async with desk.running(acme):
        await until(lambda: desk.results["issued"])
    assert caplog.text.count("odd.example is passed over") == 1


async def test_a_fault_where_nobody_expects_it_ends_one_task_only(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = desk.acme((NAME,))
    settle = acme._settle

    async def fall_over(*arguments: Any) -> None:
        monkeypatch.setattr(acme, "_settle", settle)
        raise ZeroDivisionError

    monkeypatch.setattr(acme, "_settle", fall_over)
    acme._open_client = fall_over  # type: ignore[method-assign,assignment]
    with caplog.at_level(logging.ERROR):
        async with desk.running(acme):
            await until(lambda: "ZeroDivisionError" in caplog.text)
            acme._open_client = lambda: desk.ca  # type: ignore[method-assign,assignment,return-value]
            desk.now += 400
            acme.look()
            await until(lambda: desk.results["issued"])


async def test_a_name_is_forgotten_some_time_after_its_service_is_gone(desk: Desk) -> None:
    acme = desk.acme(on_register=("*.apps.example",))
    acme.registered("one.apps.example")
    acme.registered("two.apps.example")
    desk.services = {"two.apps.example"}
    desk.now += FORGET_SECONDS - 1
    assert acme._groups() == [("one.apps.example",), ("two.apps.example",)]
    desk.now += 1
    assert acme._groups() == [("two.apps.example",)]
    desk.services = set()
    desk.now += FORGET_SECONDS - 1
    assert acme._groups() == [("two.apps.example",)]
    acme.registered("one.apps.example")
    desk.now += 1
    assert acme._groups() == [("one.apps.example",)]
    acme.close()


def test_what_was_said_is_not_remembered_for_ever(desk: Desk) -> None:
    acme = desk.acme()
    for number in range(3 * MAX_SAID):
        acme._say_once(str(number))
    assert len(acme._said) <= MAX_SAID
    acme.close()


async def test_a_certificate_that_vanished_is_installed_without_the_ca(desk: Desk) -> None:
    acme = desk.acme((NAME,))
    async with desk.running(acme):
        await until(lambda: desk.results["issued"])
        (desk.certs / NAME / "fullchain.pem").unlink()
        acme.look()
        await until((desk.certs / NAME / "fullchain.pem").exists)
    assert desk.ca.asked["new_order"] == 1


async def test_names_that_backends_bring_are_bounded_and_allowed(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    acme = desk.acme((NAME,), on_register=("*.apps.example", NAME))
    pair = Authority().issue("*.apps.example")
    for name in (NAME, "other.example", "a.b.apps.example", "*.apps.example", "A_B.apps.example"):
        acme.registered(name)
    assert acme._groups() == [(NAME,)]
    for number in range(MAX_BROUGHT + 5):
        acme.registered(f"n{number}.apps.example")
    assert len(acme._groups()) == 1 + MAX_BROUGHT
    assert caplog.text.count("brought 1000 names already") == 5
    # A wildcard certificate that somebody put there covers them all.
    desk.table = CertificateTable([parse_pair("*.apps.example", pair.chain_pem, pair.key_pem, "certs")], 1)
    assert acme._groups() == [(NAME,)]
    acme.close()


async def test_a_fault_of_ours_ends_neither_the_task_nor_the_others(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    acme = desk.acme((NAME,))
    new_order = desk.ca.new_order

    def fall_over(*arguments: Any) -> Order:
        desk.ca.new_order = new_order  # type: ignore[method-assign]
        raise ZeroDivisionError

    desk.ca.new_order = fall_over  # type: ignore[method-assign,assignment]
    with caplog.at_level(logging.ERROR):
        async with desk.running(acme):
            await until(lambda: desk.results["acme_failed"])
            desk.now += 400
            acme.look()
            await until(lambda: desk.results["issued"])
    assert "ACME for a.example failed" in caplog.text


def test_the_library_is_loaded_only_when_a_ca_is_asked() -> None:
    code = "import sys, portero_py.cli; sys.exit('acme' in sys.modules or 'requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_what_a_wildcard_covers_brings_none_of_its_own_even_before_that_is_there(desk: Desk) -> None:
    acme = desk.acme(("*.apps.example",), on_register=("*.apps.example",))
    async with desk.running(acme):
        acme.registered("shop.apps.example")
        await until(lambda: desk.results["validation_failed"])
        acme.look()
        await asyncio.sleep(0.02)
    assert set(desk.ca._names.values()) == {("*.apps.example",)}
    assert "does not offer dns-01" in desk.files.progress("*.apps.example").error


async def test_a_name_that_a_program_cannot_make_a_record_for_is_validated_otherwise_in_the_same_order(
    desk: Desk, tmp_path: Path
) -> None:
    program = tmp_path / "hook"
    program.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/verbs\nexit 3\n')
    program.chmod(0o755)
    acme = desk.acme((NAME,), dns_hook=(str(program),))
    acme._dns._tools = (SimpleNamespace(aliases=lambda name: [name]), None)  # type: ignore[assignment]
    desk.ca.refuses = {"tls-alpn-01"}
    async with desk.running(acme):
        await until(lambda: desk.results["issued"])
    assert desk.ca.seen == ["tls-alpn-01", "http-01"]
    assert desk.ca.asked["new_order"] == 2  # the first was dead, the second went on
    assert (tmp_path / "verbs").read_text().split() == ["present", "cleanup"]
    assert [record.name for record in desk.files.dns_records(NAME)] == [f"_acme-challenge.{NAME}"]
