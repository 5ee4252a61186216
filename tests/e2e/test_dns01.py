"""Certificates by dns-01 from Pebble: wildcards, with BIND's updates and with a program of the operator's."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.acme_front import AcmeFront
from tests.e2e.acme_site import AcmeSite, presented
from tests.e2e.conftest import StartBackend
from tests.e2e.name_servers import NameServer, update_flags
from tests.e2e.pebble import Pebble
from tests.e2e.proxy_process import PROXY, ProxyProcess
from tests.e2e.test_acme import names_of, portero
from tests.e2e.test_acme_faults import Killer
from tests.e2e.test_imports import TELLING, modules
from tests.e2e.test_workers import processes
from tests.e2e.waiting import eventually

TOML = "[timeouts]\ndrain = 2\nshutdown = 5\n"


@pytest.fixture(scope="module")
def bind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NameServer]:
    made = NameServer(tmp_path_factory.mktemp("dns") / "primary").start()
    yield made
    made.stop()


@pytest.fixture
def late(tmp_path: Path, bind: NameServer) -> Iterator[NameServer]:
    """A copy of a.example that lags until it is told."""
    made = NameServer(tmp_path / "secondary", bind).start()
    yield made
    made.stop()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[AcmeSite]:
    made = AcmeSite(tmp_path / "site")
    yield made
    made.end()


StartCa = Callable[..., AcmeFront]


@pytest.fixture
def start_ca(tmp_path: Path, site: AcmeSite) -> Iterator[StartCa]:
    """Start Pebble behind its double; `dns` is the name server that it asks."""
    started: list[tuple[AcmeFront, Pebble]] = []

    def start(dns: str = "", nonce_reject: int = 0) -> AcmeFront:
        folder = tmp_path / f"ca-{len(started)}"
        pebble = Pebble(
            folder / "pebble", site.http_port, site.tls_port, nonce_reject=nonce_reject, dns=dns
        ).start()
        front = AcmeFront(folder / "front", pebble).start()
        started.append((front, pebble))
        site.directory, site.ca_file = front.directory, front.ca_file
        return front

    yield start
    for front, pebble in started:
        front.stop()
        pebble.stop()


class Hook:
    """A program that changes the records of Pebble's own DNS server, and writes down what it did."""

    def __init__(self, folder: Path, pebble: Pebble) -> None:
        self.folder = folder
        folder.mkdir()
        self.program, self._calls = folder / "hook", folder / "calls"
        self.program.write_text(
            f"#!{sys.executable} -IS\n"
            "import json, os, pathlib, sys, time, urllib.request\n"
            "word, verb, name, value = sys.argv[1:]\n"
            f"here = pathlib.Path({str(folder)!r})\n"
            "def write(line):\n"
            "    with (here / 'calls').open('a') as file:\n"
            "        file.write(line + '\\n')\n"
            "write(f'begin {verb} {name} {value} {word}')\n"
            "mood = here / f'{verb}-mood'\n"
            "mood = mood.read_text() if mood.exists() else ''\n"
            "if mood == 'fail': sys.exit('the provider says no')\n"
            "while mood == 'hang' and not (here / 'go').exists(): time.sleep(0.02)\n"
            "path = {'present': '/set-txt', 'cleanup': '/clear-txt'}[verb]\n"
            "body = json.dumps({'host': name + '.', 'value': value}).encode()\n"
            "opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))\n"
            f"opener.open({pebble.dns_management!r} + path, body, timeout=30)\n"
            "write(f'end {verb} {name} {value} {word}')\n"
            "print(verb, 'is done')\n"
        )
        self.program.chmod(0o755)
        self.flags = [
            *("--acme-dns-hook", f"{self.program} word"),
            *("--acme-dns-resolver", pebble.dns, "--acme-dns-check", pebble.dns),
        ]

    def mood(self, verb: str, word: str) -> None:
        """Let it `fail` or `hang`, "" for neither."""
        (self.folder / f"{verb}-mood").write_text(word)

    def calls(self, words: str = "") -> list[list[str]]:
        """What it did, a line each: begin or end, verb, name, value, word."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line.split() for line in lines if line.startswith(words)]


# By updates


def test_a_wildcard_and_its_parent_are_validated_served_and_renewed(
    site: AcmeSite, start_ca: StartCa, bind: NameServer, start_backend: StartBackend, tmp_path: Path
) -> None:
    front = start_ca(bind.address, nonce_reject=15)
    flags = update_flags(tmp_path, [bind])
    proxy = site.start(
        "*.a.example,a.example,other.a.b.example",
        more=(*flags, "--acme-on-register", "*.a.example"),
    )
    backend = start_backend()
    proxy.register("shop.a.example", "127.0.0.1", backend.port, ttl_seconds=60, use_tls=False)
    first = eventually(lambda: presented(site.tls_port, "shop.a.example"), "it is served")
    assert first is not None
    assert names_of(first) == ["*.a.example", "a.example", "other.a.b.example"]
    assert presented(site.tls_port, "a.example") == first
    eventually(lambda: site.progress("_wildcard.a.example").get("step") == "idle", "it is done")
    assert sorted(path.name for path in site.certs.iterdir()) == ["_wildcard.a.example"]
    assert {each.payload["identifiers"][0]["value"] for each in front.asked if each.what == "order-plz"} == {
        "*.a.example"
    }
    eventually(lambda: not bind.texts("_acme-challenge.a.example"), "both values are gone")
    eventually(lambda: not list(site.state.rglob("dns.json")), "and that is written down")
    check = (*site.flags()[:6], *flags, "--acme-domain", "*.a.example,a.example,other.a.b.example")
    roots = tmp_path / "roots.pem"
    roots.write_bytes(front.pebble.root())
    listen = ("--listen-addr", f"127.0.0.1:{site.tls_port}")
    status, said = portero("certs", "check", "shop.a.example", *check, *listen, SSL_CERT_FILE=str(roots))
    assert (status, "bad:" in said) == (0, False), said
    assert "ok: ACME validates it by dns-01\n" in said
    assert f"ok: {bind.address} takes updates of a.example, signed by portero-test" in said
    # Renewal.
    assert portero("certs", "revoke", "*.a.example", *site.flags()[2:])[0] == 0
    proxy.signal(signal.SIGHUP)
    eventually(lambda: presented(site.tls_port, "x.a.example") not in (None, first), "it is replaced")
    proxy.stop()
    assert "dGhlIHNl" not in proxy.log()


def test_the_record_is_made_where_the_aliases_end(
    site: AcmeSite, start_ca: StartCa, bind: NameServer, tmp_path: Path
) -> None:
    front = start_ca(bind.address)
    before = bind.serial("b.example")
    seen: list[list[str]] = []
    front.rules.append(
        lambda asked: seen.append(bind.texts("b.acme.example")) if asked.what == "chalZ" else None
    )
    flags = update_flags(tmp_path, [bind])
    site.start("b.example", challenge="dns-01", http=False, more=flags)
    site.issued("b.example")
    assert [len(values) for values in seen] == [1]
    eventually(lambda: not bind.texts("b.acme.example"), "it is gone")
    # Only where it was said to be: the name's own zone never changed.
    assert bind.serial("b.example") == before
    _, said = portero(
        *("certs", "check", "b.example", *site.flags()[:6], *flags, "--acme-domain", "b.example"),
        *("--acme-challenge", "dns-01"),
    )
    assert "ok: _acme-challenge.b.example is an alias of b.acme.example: the record is made there" in said
    assert "takes updates of acme.example" in said


def test_the_ca_is_not_told_before_all_servers_have_the_record(
    site: AcmeSite, start_ca: StartCa, bind: NameServer, late: NameServer, tmp_path: Path
) -> None:
    front = start_ca(bind.address)
    seen: list[list[str]] = []
    front.rules.append(
        lambda asked: (
            seen.append(late.texts("_acme-challenge.late.a.example")) if asked.what == "chalZ" else None
        )
    )
    flags = update_flags(tmp_path, [bind, late])
    toml = f"{TOML}[acme]\ndns_seconds = 1\n"
    proxy = site.start("*.late.a.example", http=False, more=flags, toml=toml)
    eventually(lambda: site.progress("_wildcard.late.a.example").get("failures"), "it was not there in time")
    failed = site.progress("_wildcard.late.a.example")
    assert failed["reason"] == "dns_failed"
    assert f"not at all servers of its zone within 1 s: {late.address} does not have it" in failed["error"]
    assert front.count("chalZ") == 0
    assert failed["step"] == "ordered"
    eventually(lambda: not bind.texts("_acme-challenge.late.a.example"), "it is removed again")
    assert proxy.metric("portero_acme_attempts_total", result="dns_failed") == 1
    proxy.stop()
    # The same order goes on, and waits for the server that lags.
    site.change_progress("_wildcard.late.a.example", retry_at=0)
    site.start("*.late.a.example", http=False, more=flags)
    eventually(lambda: bind.texts("_acme-challenge.late.a.example"), "it is made again")
    assert front.count("chalZ") == 0
    late.notify("a.example")
    site.issued_wildcard("late.a.example")
    assert [len(values) for values in seen] == [1]
    assert front.count("order-plz") == 1


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "step",
    [
        "chalZ",
        *(
            pytest.param(step, marks=pytest.mark.minutes)
            for step in ("order-plz", "authZ", "finalize-order", "certZ")
        ),
    ],
)
def test_a_crash_at_any_step_goes_on_with_the_same_order_and_removes_the_record(
    site: AcmeSite, start_ca: StartCa, bind: NameServer, tmp_path: Path, step: str, before: bool
) -> None:
    front = start_ca(bind.address)
    killer = Killer(front, step, before=before)
    flags = update_flags(tmp_path, [bind])
    proxy = site.start("*.a.example", http=False, more=flags)
    killer.arm(proxy)
    eventually(lambda: not proxy.is_running, "it is dead")
    if step == "chalZ":
        assert bind.texts("_acme-challenge.a.example")
    site.start("*.a.example", http=False, more=flags)
    site.issued_wildcard("a.example")
    eventually(lambda: not bind.texts("_acme-challenge.a.example"), "the record is gone")
    eventually(lambda: not list(site.state.rglob("dns.json")), "and that is written down")
    # Lost is an order whose address never arrived. The record is there for a CA that comes when all are dead.
    assert front.count("order-plz") == (2 if step == "order-plz" else 1)
    assert front.pebble.log().count("Issued certificate serial") == 1


def test_what_a_crash_left_is_removed_where_nobody_wants_the_certificate_any_more(
    site: AcmeSite, start_ca: StartCa, bind: NameServer, tmp_path: Path
) -> None:
    front = start_ca(bind.address)
    killer = Killer(front, "chalZ", before=True)
    flags = update_flags(tmp_path, [bind])
    proxy = site.start("*.a.example", http=False, more=flags)
    killer.arm(proxy)
    eventually(lambda: not proxy.is_running, "it is dead")
    assert bind.texts("_acme-challenge.a.example")
    proxy = site.start("b.example", http=False, more=flags)
    eventually(lambda: not bind.texts("_acme-challenge.a.example"), "the record is gone")
    proxy.stop()


# By a program


def test_a_program_makes_the_records_and_removes_them(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path
) -> None:
    front = start_ca(nonce_reject=15)
    hook = Hook(tmp_path / "hook", front.pebble)
    proxy = site.start("a.example,*.a.example", http=False, more=hook.flags)
    assert names_of(site.issued("a.example")) == ["*.a.example", "a.example"]
    eventually(lambda: len(hook.calls("end cleanup")) == 2, "both are removed")
    calls = hook.calls("end")
    assert [call[1] for call in calls] == ["present", "present", "cleanup", "cleanup"]
    assert {(call[2], call[4]) for call in calls} == {("_acme-challenge.a.example", "word")}
    assert len({call[3] for call in calls}) == 2
    proxy.stop()
    assert "acme.dns_hook present _acme-challenge.a.example: present is done" in proxy.log()
    status, said = portero(
        *("certs", "check", "x.a.example", *site.flags()[:6], *hook.flags, "--acme-domain", "*.a.example")
    )
    assert status == 1  # nothing listens
    assert f"ok: acme.dns_hook: {hook.program} can be run" in said
    assert "ok: ACME validates it by dns-01\n" in said


def test_a_program_that_fails_is_explained_and_the_order_goes_on_when_it_does_not(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path
) -> None:
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    hook.mood("present", "fail")
    proxy = site.start("*.a.example", http=False, more=hook.flags)
    eventually(lambda: site.progress("_wildcard.a.example").get("failures"), "it has failed")
    failed = site.progress("_wildcard.a.example")
    assert failed["reason"] == "dns_failed"
    assert failed["error"].endswith("exit status 1: the provider says no")
    assert failed["step"] == "ordered"
    assert len(hook.calls("end cleanup")) == 1  # whatever the failed one may have done
    hook.mood("present", "")
    site.change_progress("_wildcard.a.example", retry_at=0)
    proxy.signal(signal.SIGHUP)
    site.issued_wildcard("a.example")
    assert front.count("order-plz") == 1


def test_a_program_that_hangs_is_killed_when_its_time_is_up(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path
) -> None:
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    hook.mood("present", "hang")
    toml = f"{TOML}[acme]\ndns_hook_seconds = 3\n"
    proxy = site.start("*.a.example", http=False, more=hook.flags, toml=toml)
    eventually(lambda: site.progress("_wildcard.a.example").get("failures"), "it has failed")
    assert "no end within 3 s, it was killed" in site.progress("_wildcard.a.example")["error"]
    proxy.stop()


def test_the_exit_does_not_wait_for_a_program_and_leaves_none_behind(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path
) -> None:
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    hook.mood("present", "hang")
    proxy = site.start("*.a.example", http=False, more=hook.flags)
    eventually(lambda: hook.calls("begin present"), "it was called")
    proxy.signal(signal.SIGTERM)
    assert proxy.wait(30) == 0
    (hook.folder / "go").touch()
    hook.mood("present", "")
    site.start("*.a.example", http=False, more=hook.flags)
    site.issued_wildcard("a.example")
    assert len(hook.calls("end present")) == 1  # the first was killed
    assert front.count("order-plz") == 1


def test_a_program_that_outlives_a_crash_is_waited_for(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path
) -> None:
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    hook.mood("present", "hang")
    proxy = site.start("*.a.example", http=False, more=hook.flags)
    eventually(lambda: hook.calls("begin present"), "it was called")
    proxy.crash()
    proxy = site.start("*.a.example", http=False, more=hook.flags)
    eventually(lambda: "https on" in proxy.log(), "it runs again")
    assert len(hook.calls("begin")) == 1
    hook.mood("present", "")
    (hook.folder / "go").touch()
    site.issued_wildcard("a.example")
    eventually(lambda: hook.calls("end cleanup"), "it is removed")
    # Never two at a time.
    verbs = [call[0] for call in hook.calls()]
    assert verbs == ["begin", "end"] * (len(verbs) // 2)
    assert front.count("order-plz") == 1


def test_a_removal_that_failed_is_made_up_for_at_the_next_start(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path
) -> None:
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    hook.mood("cleanup", "fail")
    proxy = site.start("*.a.example", http=False, more=hook.flags)
    site.issued_wildcard("a.example")  # that is none of the certificate's business
    said = eventually(
        lambda: re.search(r"not removed yet, again in 60 s: .*says no", proxy.log()), "it is said"
    )
    assert said
    proxy.stop()
    assert list(site.state.rglob("dns.json"))
    hook.mood("cleanup", "")
    proxy = site.start("*.a.example", http=False, more=hook.flags)
    eventually(lambda: not list(site.state.rglob("dns.json")), "it is made up for")
    assert len(hook.calls("end cleanup")) == 1
    proxy.stop()


def test_where_the_ports_are_not_reached_a_record_is_tried_first_and_a_listener_after_it(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path
) -> None:
    """The ports here are none of 443 and 80."""
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    hook.mood("present", "fail")
    proxy = site.start("a.example", http=False, more=hook.flags)
    site.issued("a.example")
    assert front.count("order-plz") == 1  # the CA was told nothing: the same order
    assert "dns-01 failed, tls-alpn-01 is next: acme.dns_hook" in proxy.log()
    proxy.stop()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_program_sees_no_secret_of_ours_and_all_signals(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path, workers: str
) -> None:
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    spy = tmp_path / "spy"
    spy.write_text(
        f"#!/bin/sh\nenv > {tmp_path}/env\ngrep -h SigBlk /proc/self/status > {tmp_path}/blocked\n"
        f'exec {hook.program} "$@"\n'
    )
    spy.chmod(0o755)
    flags = ["--acme-dns-hook", f"{spy} word", *hook.flags[2:]]
    proxy = site.start("*.a.example", http=False, more=[*flags, "--workers", workers])
    site.issued_wildcard("a.example")
    assert re.fullmatch(r"SigBlk:\s+0+\n", (tmp_path / "blocked").read_text())  # no signal is kept from it
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names <= {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "PWD", "OLDPWD", "SHLVL", "_"}
    proxy.stop()


# What it costs


@pytest.mark.parametrize("by_dns", [True, False])
def test_only_the_control_process_loads_what_makes_records_and_only_for_a_record(
    site: AcmeSite, start_ca: StartCa, tmp_path: Path, by_dns: bool
) -> None:
    front = start_ca()
    hook = Hook(tmp_path / "hook", front.pebble)
    told = tmp_path / "told"
    told.mkdir()
    proxy = ProxyProcess(
        tmp_path / "proxy",
        certificates=site.certs,
        toml=TOML,
        flags=[
            *("--listen-addr", f"127.0.0.1:{site.tls_port}", "--workers", "2", *site.flags()[2:]),
            *("--acme-agree-tos", "--acme-domain", "a.example", *hook.flags),
            *("--acme-challenge", "dns-01" if by_dns else "tls-alpn-01"),
        ],
    )
    proxy.start((PROXY[0], "-P", "-c", TELLING, str(told)))
    try:
        site.issued("a.example")
        pids = {"first": proxy.generation, **processes(proxy)}
        found = {name for name, pid in pids.items() if "dns" in modules(pid, told)}
        assert found == ({"control"} if by_dns else set())
        proxy.stop()
    finally:
        proxy.kill()
