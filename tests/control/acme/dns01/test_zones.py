"""Which servers of a zone are asked, where its delegation is not tidy."""

from __future__ import annotations

from collections.abc import Sequence

import dns.message
import dns.rrset
import pytest

from portero_py.config.model import Address
from portero_py.control.acme.dns01 import zones as module
from portero_py.control.acme.dns01.zones import Server, Zones
from portero_py.errors import DnsFailed

NEAR, FAR = "192.0.2.1", "2001:db8::1"
ZONE = {
    ("a.example", "SOA"): ["ns1.test. root.test. 1 2 3 4 5"],
    ("a.example", "NS"): ["ns1.test.", "ns2.test."],
}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[str]]:
    """What the resolver answers. IPv6 goes nowhere."""
    said: dict[tuple[str, str], list[str]] = dict(ZONE)

    def ask(servers: Sequence[Address], name: str, kind: str) -> dns.message.Message:
        answer = dns.message.make_response(dns.message.make_query(name, kind))
        texts = said.get((name, kind), [])
        if texts == ["SERVFAIL"]:
            raise DnsFailed(f"no name server says what {kind} {name} has")
        if texts:
            answer.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", kind, *texts))
        return answer

    monkeypatch.setattr(module, "ask", ask)
    monkeypatch.setattr(module, "_has_route", lambda address: address.host == NEAR)
    return said


def servers() -> list[Server]:
    return Zones((Address("192.0.2.53", 53),)).servers_of("_acme-challenge.a.example")


@pytest.mark.parametrize(
    "other", [{}, {("ns2.test", "AAAA"): [FAR]}, {("ns2.test", "A"): ["SERVFAIL"]}], ids=str
)
def test_a_server_that_cannot_be_asked_from_here_is_left_out_where_another_can(
    world: dict[tuple[str, str], list[str]],
    other: dict[tuple[str, str], list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    world.update({("ns1.test", "A"): [NEAR], ("ns1.test", "AAAA"): [FAR], **other})
    assert servers() == [Server("ns1.test", (Address(NEAR, 53),))]
    assert "a.example: not asked, without an address that can be reached: ns2.test" in caplog.text


def test_servers_that_are_all_out_of_reach_are_tried_to_say_so(
    world: dict[tuple[str, str], list[str]],
) -> None:
    world["ns2.test", "AAAA"] = [FAR]
    assert servers() == [Server("ns2.test", (Address(FAR, 53),))]


def test_a_zone_whose_servers_have_no_address_is_an_error_that_names_them(
    world: dict[tuple[str, str], list[str]],
) -> None:
    with pytest.raises(DnsFailed, match=r"no name server of a\.example has an address: ns1\.test, ns2\.test"):
        servers()
    world["ns1.test", "A"] = ["SERVFAIL"]
    with pytest.raises(DnsFailed, match=r"has an address: no name server says what A ns1\.test has"):
        servers()
