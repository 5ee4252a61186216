"""Every message comes out as it went in, and a table grows by what was said about it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.core.challenges import Challenges
from portero_py.core.counters import Counters, ServiceCounters
from portero_py.core.health import Evidence
from portero_py.core.model import (
    NEVER,
    Backend,
    Halt,
    Lease,
    LeaseRequest,
    LeaseState,
    Service,
    Standing,
)
from portero_py.core.registry import Registry
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import FeedError
from portero_py.feed import messages
from portero_py.feed.messages import (
    Ack,
    Ask,
    AskCertificates,
    AskStandings,
    CertificateUpdate,
    Counted,
    Departed,
    FrameReader,
    Hello,
    Message,
    Serving,
    Standings,
    TableUpdate,
    encode,
    lease_from,
)


def lease(service: str, number: int = 0) -> Lease:
    backend = Backend("fe80::1%eth0", 8000 + number, use_tls=True, protocol="h2", tls_fingerprint="ab" * 32)
    return Lease(service, f"i-{number} ✓", backend, 1234.567891234, 60, weight=3, health_path="/up")


def table(version: int, *names: str) -> RoutingTable:
    return RoutingTable(version, {name: Service(name, (lease(name), lease(name, 1))) for name in names}, "d")


def certificate(name: str, key: bytes = b"key\n") -> Certificate:
    return Certificate(
        name, b"chain\n", key, (name, "*.x.example"), 1.5, 2.5, "ab", "Some CA", 2, False, f"/certs/{name}"
    )


def counters() -> Counters:
    found = Counters(bytes_in=1 << 40, connections_open=3)
    found.exchange_done("a.example", b"GET", 200, 0.1)
    found.exchange_done("", b"BREW", 404, 99.0)
    found.handshakes["TLSv1.3", "h2", "ok"] += 2
    found.errors["no_backend"] += 1
    return found


def passed_on(message: Message, number: int = 7) -> Message:
    """What comes out at the other end."""
    [(got, found)] = FrameReader().feed(encode(message, number))
    assert got == number
    return found


UPDATE = TableUpdate.between(None, table(9, "a.example", "*.b.example"))

MESSAGES: list[Message] = [
    UPDATE,
    TableUpdate(3, "", (), ("gone.example",)),
    CertificateUpdate(4, (certificate("a.example"),), ("b.example",), whole=True),
    Challenges(2, {"a.example": (b"chain", b"key")}, {"token": "token.thumb"}),
    Departed(5, counters()),
    Ask(),
    AskCertificates(("a.example", "*.b.example")),
    AskStandings("a.example"),
    Standings((Standing("a.example", "::1", 80, 3, True, "refused"),)),
    Evidence("a.example", "::1", 80, True, "took too long"),
    TableUpdate(4, "", (Service("a.example", (), Halt(30.0)), Service("b.example", (), Halt(None, "soon")))),
    Hello(1, True, UPDATE, counters(), Departed(1, counters())),
    Serving(),
    Counted(counters()),
    Ack(),
]


def test_a_lease_keeps_its_source_its_state_and_an_end_that_is_never() -> None:
    other = replace(lease("a.example"), source="static", expires_at=NEVER, ttl_seconds=None)
    full = replace(lease("a.example"), source="docker", state=LeaseState.DRAINING, also=(other,))
    update = TableUpdate(1, "", (Service("a.example", (full, other)),))
    found = passed_on(update)
    assert found == update
    assert isinstance(found, TableUpdate)
    [first, second] = found.changed[0].leases
    assert (first.serves_until, first.ends_at, second.serves_until) == (-NEVER, NEVER, NEVER)
    assert orjson.loads(orjson.dumps(other))["expires_at"] is None


def test_a_lease_may_have_been_written_before_there_were_sources() -> None:
    written = orjson.loads(orjson.dumps(lease("a.example")))
    for name in ("source", "state", "also", "serves_until"):
        del written[name]
    assert lease_from(written) == lease("a.example")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    assert passed_on(message) == message


def test_every_kind_of_message_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(messages.Message.__args__) - {messages.Unknown}


def test_what_only_another_version_says_is_skipped_and_the_rest_of_it_is_understood() -> None:
    def added(value: object) -> object:
        """`value` with a field more in every object."""
        if isinstance(value, dict):
            return {**{name: added(each) for name, each in value.items()}, "of_another_version": [1]}
        return list(map(added, value)) if isinstance(value, list) else value

    for message in (UPDATE, TableUpdate.between(None, UPDATE.applied_to(RoutingTable()))):
        kind, number, content = json.loads(encode(message, 7)[4:])
        payload = json.dumps([kind, number, added(content)]).encode()
        assert FrameReader().feed(len(payload).to_bytes(4, "big") + payload) == [(7, message)]
    payload = b'["Nothing",3,{"of":"this"}]'
    assert FrameReader().feed(len(payload).to_bytes(4, "big") + payload) == [(3, messages.Unknown())]


def test_every_counter_is_passed_on_with_its_type() -> None:
    full = Counters()
    for number, each in enumerate(fields(Counters), 1):
        value = getattr(full, each.name)
        if isinstance(value, Counter):
            value["a", "b", number] = number
        elif isinstance(value, dict):
            value["a"] = ServiceCounters({("GET", number, 3): number}, seconds=0.5)
        else:
            setattr(full, each.name, number)
    found = passed_on(Counted(full))
    assert isinstance(found, Counted)
    assert found.counters == full
    for each in fields(Counters):
        assert type(getattr(found.counters, each.name)) is type(getattr(full, each.name))
    found.counters.merge(full)  # what came out can be counted with


def test_frames_may_come_in_any_pieces() -> None:
    stream = b"".join(encode(message, number) for number, message in enumerate(MESSAGES))
    for size in (1, 3, 1000, len(stream)):
        reader = FrameReader()
        found = [each for at in range(0, len(stream), size) for each in reader.feed(stream[at : at + size])]
        assert found == list(enumerate(MESSAGES))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"nonsense",
        b'[["Ack"],1,{}]',
        b'["Ack","x",{}]',
        b'["Counted",1,{"bytes_in":[3]}]',
        b'["TableUpdate",1,{"version":1}]',
        b'["TableUpdate",1,{"changed":[{"leases":[{}]}],"dropped":[]}]',
        b'["CertificateUpdate",1,null]',
        b'["Challenges",1,{"version":1,"tls_alpn":[],"http":{}}]',
    ],
)
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    with pytest.raises(FeedError):
        FrameReader().feed(len(payload).to_bytes(4, "big") + payload)


def test_a_frame_has_a_longest_length_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = encode(Challenges(1, {}, {"token": "x" * 200}))
    monkeypatch.setattr(messages, "MAX_FRAME", 100)
    with pytest.raises(FeedError, match="too long"):
        encode(Challenges(1, {}, {"token": "x" * 200}))
    with pytest.raises(FeedError, match="too long"):
        FrameReader().feed(frame[:4])


def test_a_file_name_that_is_no_utf_8_does_no_harm() -> None:
    odd = replace(certificate("a.example"), origin="/certs/caf\udce9")
    found = passed_on(CertificateUpdate(1, (odd,)))
    assert isinstance(found, CertificateUpdate)
    assert found.changed[0].same_bytes(odd)


# From one table to the next


def request(service: str, number: int) -> LeaseRequest:
    return LeaseRequest(service, Backend("::1", 8000 + number), ttl_seconds=10 + number)


@given(st.lists(st.tuples(st.sampled_from(["register", "release", "look", "expire"]), st.integers(0, 5))))
def test_a_follower_that_is_told_the_differences_has_the_registry_s_table(
    steps: list[tuple[str, int]],
) -> None:
    registry, now = Registry("d.example"), 0.0
    sent: RoutingTable | None = None
    follower = table(99, "left.over.example")
    for verb, number in steps:
        now += 1
        service = f"s{number % 3}.example"
        if verb == "register":
            registry.register(request(service, number), now)
        elif verb == "release" and registry.find(service, "", "::1", 8000 + number):
            registry.release(service, "", "::1", 8000 + number, now=now)
        elif verb == "expire":
            registry.expire(now + 300 * number)
        elif verb == "look":
            assert registry.table is not None  # a table that the follower is not told of
        if number:
            update = TableUpdate.between(sent, registry.table)
            sent = registry.table
            found = passed_on(update)
            assert isinstance(found, TableUpdate)
            follower = found.applied_to(follower)
            assert follower == registry.table


def test_a_renewal_is_one_service_however_many_there_are() -> None:
    registry = Registry()
    for number in range(100):
        registry.register(request(f"s{number}.example", 1), 0.0)
    former = registry.table
    renewed = registry.register(request("s7.example", 1), 5.0)
    update = TableUpdate.between(former, registry.table)
    assert update == TableUpdate(101, "", (Service("s7.example", (renewed,)),), ())


def test_between_tables_that_know_nothing_of_each_other_everything_is_compared() -> None:
    same = Service("same.example", ())
    former = RoutingTable(1, {"same.example": same, "gone.example": Service("gone.example", ())})
    new = Service("new.example", ())
    following = RoutingTable(9, {"same.example": same, "new.example": new}, "new.example")
    update = TableUpdate.between(former, following)
    assert (update.changed, update.dropped, update.whole) == ((new,), ("gone.example",), False)
    assert update.applied_to(former) == following


def test_what_comes_out_says_in_what_it_differs_from_the_table_before() -> None:
    former = RoutingTable(1, {name: Service(name, ()) for name in ("same.example", "gone.example")})
    new = Service("new.example", ())
    found = TableUpdate(9, "", (new,), ("gone.example",)).applied_to(former)
    assert (found.since, set(found.changed)) == (1, {"new.example", "gone.example"})
    found = TableUpdate(9, "", (new,), whole=True).applied_to(former)
    assert found.since == -1


def test_only_certificates_that_changed_are_sent() -> None:
    one, two, three = certificate("1.example"), certificate("2.example"), certificate("3.example")
    former = CertificateTable([one, two, three], 1)
    renewed = replace(two, key_pem=b"another key\n")
    following = CertificateTable([one, renewed], 2)
    update = CertificateUpdate.between(former, following)
    assert update == CertificateUpdate(2, (renewed,), ("3.example",))
    found = update.applied_to(former)
    assert (found.certificates, found.version) == (following.certificates, 2)
    first = CertificateUpdate.between(None, former).applied_to(following)
    assert first.certificates == former.certificates
