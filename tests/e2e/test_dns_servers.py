"""Updates and questions against BIND: what it says when all is well, and when it is not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import dns.message
import pytest

from portero_py.cli import challenges
from portero_py.config.model import Acme, Address, Config
from portero_py.control.acme.dns01 import questions, updates
from portero_py.control.acme.dns01.updates import Updates
from portero_py.control.acme.dns01.zones import Server, Zones
from portero_py.core.acme.dns_records import TxtRecord
from portero_py.errors import DnsFailed
from tests.e2e.name_servers import KEY, SECRET, NameServer
from tests.e2e.proxy_process import free_port
from tests.e2e.waiting import eventually


@pytest.fixture(scope="module")
def primary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NameServer]:
    made = NameServer(tmp_path_factory.mktemp("dns") / "primary").start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def secondary(primary: NameServer) -> Iterator[NameServer]:
    made = NameServer(primary.folder.with_name("secondary"), primary).start()
    yield made
    made.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody answers anyway."""
    monkeypatch.setattr(questions, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(updates, "UDP_SECONDS", 0.5)


@pytest.fixture
def zones(primary: NameServer) -> Zones:
    return Zones((Address(primary.host, primary.port),), port=primary.port)


@pytest.fixture
def config(primary: NameServer) -> Acme:
    return Acme(dns_server=Address(primary.host, primary.port), dns_tsig_name=KEY, dns_tsig_secret=SECRET)


# Updates


def test_values_are_added_and_exactly_one_is_removed(primary: NameServer, zones: Zones, config: Acme) -> None:
    name = "_acme-challenge.two.a.example"
    server = Updates(config, zones.zone_of)
    one, two = TxtRecord(name, "one"), TxtRecord(name, "two_-9")
    server.present(one)
    server.present(two)
    server.present(two)  # as after an answer that got lost
    assert sorted(primary.texts(name)) == ["one", "two_-9"]
    server.cleanup(one)
    assert primary.texts(name) == ["two_-9"]
    server.cleanup(one)
    server.cleanup(two)
    assert primary.texts(name) == []


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"dns_tsig_secret": "d3Jvbmc="}, "a.example", "its key of this name is another one"),
        ({"dns_tsig_name": "nobody"}, "a.example", r"does not know the key .*\(BADKEY\)"),
        ({"dns_tsig_algorithm": "hmac-sha512"}, "a.example", "another one|BADKEY"),
        ({"dns_tsig_name": "stranger"}, "a.example", r"does not let this key .*a\.example \(REFUSED\)"),
        ({"dns_tsig_name": "", "dns_tsig_secret": ""}, "a.example", r"\(REFUSED\)"),
        ({}, "static.test", r"\(REFUSED\)"),
        ({"dns_tsig_secret": "no base64"}, "a.example", "no base64"),
        ({"dns_server": Address("no-such-host.invalid", 53)}, "a.example", "cannot be looked up"),
    ],
)
def test_a_server_that_takes_no_update_is_understood(
    zones: Zones, config: Acme, changes: dict[str, object], name: str, said: str
) -> None:
    changed = replace(config, **changes)  # type: ignore[arg-type]
    with pytest.raises(DnsFailed, match=said):
        Updates(changed, zones.zone_of).present(TxtRecord(f"_acme-challenge.{name}", "x"))


def test_a_zone_that_the_server_does_not_have_is_understood(config: Acme) -> None:
    server = Updates(config, lambda name: "nowhere.invalid")
    with pytest.raises(DnsFailed, match=r"not the primary of nowhere\.invalid.*\(NOTAUTH\)"):
        server.present(TxtRecord("_acme-challenge.nowhere.invalid", "x"))
    server = Updates(config, lambda name: "a.example")
    with pytest.raises(DnsFailed, match=r"\(NOTZONE\)"):
        server.present(TxtRecord("_acme-challenge.b.example", "x"))


def test_clocks_that_differ_are_said_to(zones: Zones, config: Acme, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Updates(config, zones.zone_of)

    class Ahead:
        @staticmethod
        def time() -> float:
            return 4_000_000_000.0

    monkeypatch.setattr(dns.message, "time", Ahead)
    with pytest.raises(DnsFailed, match="differ by more than five minutes"):
        server.present(TxtRecord("_acme-challenge.a.example", "x"))


def test_a_rehearsal_says_what_an_update_would_and_changes_nothing(
    primary: NameServer, zones: Zones, config: Acme
) -> None:
    before = primary.serial("a.example")
    assert Updates(config, zones.zone_of).rehearse("_acme-challenge.x.a.example") == "a.example"
    for changed in (replace(config, dns_tsig_name="stranger"), replace(config, dns_tsig_secret="d3Jvbmc=")):
        with pytest.raises(DnsFailed):
            Updates(changed, zones.zone_of).rehearse("_acme-challenge.a.example")
    assert primary.serial("a.example") == before


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_said_to_be(config: Acme) -> None:
    server = Updates(replace(config, dns_server=Address("127.0.0.1", free_port())), lambda name: "a.example")
    with pytest.raises(DnsFailed, match="no answer: Connection refused"):
        server.present(TxtRecord("_acme-challenge.a.example", "x"))


@pytest.mark.parametrize("answer", [b"", b"\0\5hello", b"\xff\xff"])
@pytest.mark.usefixtures("impatient")
def test_a_server_that_speaks_no_dns_is_survived(config: Acme, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = Address("127.0.0.1", listener.getsockname()[1])
        server = Updates(replace(config, dns_server=address), lambda name: "a.example")
        with pytest.raises(DnsFailed, match="no answer: "):
            server.present(TxtRecord("_acme-challenge.a.example", "x"))
        thread.join()


def test_an_update_goes_by_udp_where_tcp_finds_nobody(
    zones: Zones, config: Acme, primary: NameServer
) -> None:
    """A relay that has a port for UDP only."""
    with socket.socket(type=socket.SOCK_DGRAM) as front, socket.socket(type=socket.SOCK_DGRAM) as back:
        front.bind(("127.0.0.1", 0))
        front.settimeout(60)
        back.settimeout(60)
        back.connect((primary.host, primary.port))

        def relay() -> None:
            asked, client = front.recvfrom(65535)
            back.send(asked)
            front.sendto(back.recv(65535), client)

        thread = threading.Thread(target=relay)
        thread.start()
        address = Address("127.0.0.1", front.getsockname()[1])
        record = TxtRecord("_acme-challenge.udp.a.example", "x")
        Updates(replace(config, dns_server=address), zones.zone_of).present(record)
        thread.join()
    assert primary.texts(record.name) == ["x"]


# Where a record belongs


def test_aliases_are_followed_into_another_zone(zones: Zones) -> None:
    chain = ["_acme-challenge.c.b.example", "_acme-challenge.b.example", "b.acme.example"]
    assert zones.aliases("_acme-challenge.c.b.example") == chain
    assert zones.zone_of(chain[-1]) == "acme.example"
    assert zones.aliases("_acme-challenge.x.a.example") == ["_acme-challenge.x.a.example"]
    with pytest.raises(DnsFailed, match="leads back to"):
        zones.aliases("_acme-challenge.round.b.example")


def test_the_zone_is_the_nearest_above_or_the_one_that_was_told(primary: NameServer, zones: Zones) -> None:
    assert zones.zone_of("_acme-challenge.deep.down.a.example") == "a.example"
    with pytest.raises(DnsFailed, match="is in no zone"):
        zones.zone_of("_acme-challenge.nowhere")
    told = Zones((Address(primary.host, primary.port),), zone="a.example")
    assert told.zone_of("a.example") == told.zone_of("x.a.example") == "a.example"
    with pytest.raises(DnsFailed, match=r"xa\.example is not in acme\.dns_zone, a\.example"):
        told.zone_of("xa.example")


def test_the_servers_of_a_zone_are_all_that_it_names(primary: NameServer, zones: Zones) -> None:
    assert zones.servers_of("_acme-challenge.a.example") == [
        Server("ns1.test", (Address("127.0.0.1", primary.port),)),
        Server("ns2.test", (Address("127.0.0.2", primary.port),)),
    ]
    check = (Address("127.0.0.1", 1),)
    assert Zones((), check=check).servers_of("x") == [Server("", check)]


@pytest.mark.usefixtures("impatient")
def test_a_resolver_that_is_silent_is_passed_over(primary: NameServer) -> None:
    dead = Address("127.0.0.1", free_port())
    zones = Zones((dead, Address(primary.host, primary.port)))
    assert zones.zone_of("a.example") == "a.example"
    with pytest.raises(DnsFailed, match=f"no name server says what SOA a.example has: {dead}"):
        Zones((dead,)).zone_of("a.example")


# Whether it has arrived


def test_a_record_has_arrived_when_the_server_that_lags_has_it_too(
    primary: NameServer, secondary: NameServer, zones: Zones, config: Acme
) -> None:
    name = "_acme-challenge.late.a.example"
    late = Address(secondary.host, secondary.port)
    servers = [
        Server("ns1.test", (Address(primary.host, primary.port),)),
        Server("ns2.test", (late,)),
    ]
    server = Updates(config, zones.zone_of)
    assert "ns1.test (127.0.0.1:" in zones.missing(name, ["one"], servers)
    server.present(TxtRecord(name, "one"))
    assert zones.missing(name, ["one"], servers) == f"ns2.test ({late}) does not have it"
    secondary.notify("a.example")
    eventually(lambda: not zones.missing(name, ["one"], servers), "the other one has it")
    server.present(TxtRecord(name, "two"))
    assert zones.missing(name, ["one", "two"], servers) == f"ns2.test ({late}) has another value"
    secondary.notify("a.example")
    eventually(lambda: not zones.missing(name, ["one", "two"], servers), "it has both")


def test_a_record_is_looked_for_at_the_servers_that_the_zone_names(zones: Zones, config: Acme) -> None:
    record = TxtRecord("x.acme.example", "x")
    servers = zones.servers_of(record.name)
    assert [server.name for server in servers] == ["ns1.test"]
    assert zones.missing(record.name, ["x"], servers)
    Updates(config, zones.zone_of).present(record)
    assert not zones.missing(record.name, ["x"], servers)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_does_not_answer_is_named(zones: Zones) -> None:
    dead = Address("127.0.0.1", free_port())
    said = zones.missing("a.example", ["x"], [Server("ns9.test", (dead,))])
    assert said.startswith(f"ns9.test ({dead}): no name server says")


# What `certs check` says


class Said:
    """Findings that are kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def good(self, text: str) -> None:
        self.lines.append(f"ok: {text}")

    def bad(self, text: str) -> None:
        self.lines.append(f"bad: {text}")


@pytest.fixture
def examined(primary: NameServer, config: Acme) -> Callable[..., list[str]]:
    here = Address(primary.host, primary.port)

    def examine(host: str, **changes: object) -> list[str]:
        told = replace(
            config, domains=(("*.a.example", "a.example"), ("b.example",)), on_register=("*.c.example",)
        )
        acme = replace(told, **{"dns_resolver": (here,), "dns_check": (here,), **changes})  # type: ignore[arg-type]
        said = Said()
        challenges.examine(said, Config(acme=acme), host)
        return said.lines

    return examine


def test_all_that_a_record_needs_is_tried_without_making_one(
    primary: NameServer, examined: Callable[..., list[str]]
) -> None:
    before = primary.serial("a.example")
    assert (
        examined("x.a.example")
        == examined("a.example")
        == [
            "ok: ACME validates it by dns-01",
            f"ok: {primary.address} takes updates of a.example, signed by {KEY}",
            f"ok: the record _acme-challenge.a.example is looked for at {primary.address}",
        ]
    )
    assert primary.serial("a.example") == before
    lines = examined("b.example")
    assert lines[0] == "ok: ACME validates it by tls-alpn-01, after a failure by dns-01"
    assert lines[1] == "ok: _acme-challenge.b.example is an alias of b.acme.example: the record is made there"
    assert examined("x.c.example")[0].startswith("ok: ACME validates it by")
    assert examined("nobody.example") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dns_tsig_secret": "d3Jvbmc="}, "its key of this name is another one"),
        ({"dns_tsig_name": "stranger"}, "(REFUSED)"),
        (
            {"dns_server": None, "dns_hook": ("/no/such/hook",)},
            "bad: acme.dns_hook: /no/such/hook is not there",
        ),
        ({"dns_server": None}, "bad: ACME has no challenge for it"),
        ({"challenge": "http-01"}, "bad: ACME has no challenge for it: --acme-challenge http-01"),
        (
            {"dns_check": (Address("127.0.0.1", 1),)},
            "must be at all of 127.0.0.1:1: 127.0.0.1:1: no name server",
        ),
        ({"dns_zone": "b.example"}, "bad: _acme-challenge.a.example is not in acme.dns_zone, b.example"),
        ({"dns_resolver": (Address("127.0.0.1", 1),)}, "127.0.0.1:1 does not answer"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_what_would_fail_is_said_before(
    examined: Callable[..., list[str]], changes: dict[str, object], said: str
) -> None:
    bad = [line for line in examined("a.example", **changes) if line.startswith("bad: ")]
    assert len(bad) == 1
    assert said in bad[0]
