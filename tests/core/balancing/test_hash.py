"""The same key meets the same backend; who moves when one leaves, and when one has too much to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.core.balancing.hash import BOUND, FREE, Hash
from portero_py.core.balancing.source import MAX_KNOWN, Source
from portero_py.core.health import Health
from portero_py.core.model import Lease, Service
from portero_py.core.policies import ServicePolicy
from portero_py.wire.message import Fields, RequestHead
from tests.core.balancing.fleet import HEAD, Busy, lease, service

KEYS = 10_000
TEN = "ABCDEFGHIJ"


def on(key: str) -> ServicePolicy:
    return ServicePolicy(balance="hash", hash_on=key)


def hashing(start: int = 0, **claims: int) -> Hash:
    return Hash(start, Busy(**claims), Health())


def for_path(path: str) -> RequestHead:
    return RequestHead(b"GET", path.encode(), b"app.example", b"1.1", [])


def with_fields(*fields: tuple[bytes, bytes], authority: bytes = b"app.example") -> RequestHead:
    known: Fields = list(fields)
    return RequestHead(b"GET", b"/", authority, b"1.1", known)


def who(policy: Hash, of: Service, head: RequestHead, passed: Collection[str] = ()) -> str:
    found = policy.pick(of, 0.0, passed, head, False)
    return found.instance_id if found else "-"


def homes(of: Service, keys: int = KEYS) -> list[str]:
    policy = hashing()
    return [who(policy, of, for_path(f"/{number}")) for number in range(keys)]


def moved(before: list[str], after: list[str]) -> float:
    return sum(one != other for one, other in zip(before, after, strict=True)) / len(before)


# Disturbance


def test_a_backend_less_of_ten_moves_its_own_keys_only_and_back_they_come() -> None:
    ten, nine = service(*TEN, policy=on("path")), service(*TEN[:-1], policy=on("path"))
    before, after = homes(ten), homes(nine)
    assert all(one == other for one, other in zip(before, after, strict=True) if one != "J")
    assert 0.08 < moved(before, after) <= 0.15
    policy = hashing()
    for of in (ten, nine, ten):
        found = [who(policy, of, for_path(f"/{number}")) for number in range(KEYS)]
    assert found == before


def test_the_keys_of_who_left_are_spread_over_all_others() -> None:
    before = homes(service(*TEN, policy=on("path")))
    after = homes(service(*TEN[:-1], policy=on("path")))
    heirs = Counter(other for one, other in zip(before, after, strict=True) if one == "J")
    assert set(heirs) == set(TEN[:-1])
    assert max(heirs.values()) < 2 * min(heirs.values())


def test_who_is_passed_over_moves_as_if_it_had_left() -> None:
    ten, nine = service(*TEN, policy=on("path")), service(*TEN[:-1], policy=on("path"))
    policy = hashing()
    found = [who(policy, ten, for_path(f"/{number}"), {"J"}) for number in range(1000)]
    assert found == homes(nine, 1000)


@pytest.mark.parametrize("weight", [1, 3])
def test_keys_are_spread_by_weight(weight: int) -> None:
    of = service(lease("A", weight=weight), *TEN[1:], policy=on("path"))
    counts = Counter(homes(of))
    share = KEYS / (9 + weight)
    assert counts["A"] == pytest.approx(weight * share, rel=0.1)
    assert all(counts[name] == pytest.approx(share, rel=0.15) for name in TEN[1:])


def test_more_weight_only_takes_keys() -> None:
    light = homes(service(lease("A", weight=2), *TEN[1:], policy=on("path")))
    heavy = homes(service(lease("A", weight=4), *TEN[1:], policy=on("path")))
    changed = {(one, other) for one, other in zip(light, heavy, strict=True) if one != other}
    assert {other for _, other in changed} == {"A"}


def test_equal_weights_whatever_they_are_change_nothing() -> None:
    of = service(*(lease(name, weight=7) for name in TEN), policy=on("path"))
    assert homes(of, 500) == homes(service(*TEN, policy=on("path")), 500)


def test_it_is_the_same_everywhere() -> None:
    # Known values: other workers, generations and nodes, of this version and the next, have to agree.
    assert "".join(homes(service(*TEN, policy=on("path")), 20)) == "JJBICAHAIHDIIADDDDDI"
    of = service(*TEN, policy=on("path"))
    backwards = service(*reversed(TEN), policy=on("path"))
    assert homes(of, 500) == homes(backwards, 500)
    assert "".join(homes(of, 20)) == "".join(who(hashing(start=7), of, for_path(f"/{n}")) for n in range(20))


# The key


def test_each_kind_of_key() -> None:
    def spread(hash_on: str, heads: list[RequestHead]) -> int:
        of, policy = service(*TEN, policy=on(hash_on)), hashing()
        for head in heads:
            assert len({who(policy, of, head) for _ in range(5)}) == 1
        return len({who(policy, of, head) for head in heads})

    many = [b"%d" % number for number in range(50)]
    assert spread("header:X-User", [with_fields((b"x-UsEr", key)) for key in many]) > 5
    assert spread("cookie:id", [with_fields((b"Cookie", b"a=b; id=%b" % key)) for key in many]) > 5
    assert spread("host", [with_fields(authority=key + b".example") for key in many]) > 5
    assert spread("header:Host", [with_fields(authority=key + b".example") for key in many]) > 5
    assert spread("host", [with_fields(authority=key) for key in (b"APP.example", b"app.EXAMPLE")]) == 1
    assert spread("path", [for_path(f"/{number}") for number in range(50)]) > 5
    assert spread("path", [for_path(f"/same?{number}") for number in range(50)]) == 1


@pytest.mark.parametrize("hash_on", ["header:X-User", "cookie:id", ""])
def test_who_has_no_key_has_a_turn(hash_on: str) -> None:
    of, policy = service(*"ABC", policy=on(hash_on)), hashing()
    heads = [
        HEAD,
        with_fields((b"X-User", b""), (b"Cookie", b"id=")),
        with_fields((b"X-Us-r", b"1"), (b"Cookie", b"xid=1")),
    ]
    assert "".join(who(policy, of, head) for head in heads * 2) == "ABCABC"
    assert who(policy, service(*"ABC"), HEAD) == "A"


def test_another_key_is_taken_up_with_the_next_table() -> None:
    policy = hashing()
    head = RequestHead(b"GET", b"/x", b"app.example", b"1.1", [(b"X-User", b"u")])
    by_path, by_user = service(*TEN, policy=on("path")), service(*TEN, policy=on("header:x-user"))
    found = [who(policy, of, head) for of in (by_path, by_user, by_path)]
    assert found == [who(hashing(), of, head) for of in (by_path, by_user, by_path)]
    assert found[0] != found[1]


# Bounded load


def test_nobody_holds_more_than_a_quarter_over_his_share() -> None:
    of, policy = service(*TEN, policy=on("path")), hashing()
    busy = policy.claims
    assert isinstance(busy, Busy)
    busy.claims = dict.fromkeys(TEN, 0)
    for number in range(1, 501):
        busy.claims[who(policy, of, for_path("/hot"))] += 1
        assert max(busy.claims.values()) <= max(FREE, math.ceil(BOUND * number / 10))
    assert sum(busy.claims.values()) == 500


def test_the_first_claims_are_free() -> None:
    of, policy = service(*TEN, policy=on("path")), hashing()
    home = who(policy, of, for_path("/page"))
    policy = hashing(**{home: FREE - 1})
    assert who(policy, of, for_path("/page")) == home
    policy = hashing(**{home: FREE})
    assert who(policy, of, for_path("/page")) != home


def test_what_is_over_goes_to_the_next_of_the_key_always() -> None:
    of = service(*TEN, policy=on("path"))
    home = who(hashing(), of, for_path("/hot"))
    policy = hashing(**{home: 50})
    assert {who(policy, of, for_path("/hot")) for _ in range(10)} == {
        who(hashing(), of, for_path("/hot"), {home}),
    }


def test_a_bound_is_by_weight_and_who_is_passed_over_has_no_share() -> None:
    of = service(lease("A", weight=9), "B", policy=on("path"))
    home_a = next(f"/{n}" for n in range(99) if who(hashing(), of, for_path(f"/{n}")) == "A")
    assert who(hashing(A=90, B=10), of, for_path(home_a)) == "A"
    three = service("A", "B", "C", policy=on("path"))
    home_a = next(f"/{n}" for n in range(99) if who(hashing(), three, for_path(f"/{n}")) == "A")
    assert who(hashing(A=90, B=90, C=10), three, for_path(home_a)) == "C"
    assert who(hashing(A=90, B=90, C=10), three, for_path(home_a), {"C"}) == "A"
    assert who(hashing(A=90), of, for_path(home_a), {"B"}) == "A"


@given(
    st.dictionaries(st.sampled_from(TEN), st.tuples(st.integers(1, 5), st.integers(0, 60)), min_size=1),
    st.sets(st.sampled_from(TEN)),
    st.integers(0, 99),
)
def test_somebody_is_always_below_the_bound(
    fleet: dict[str, tuple[int, int]], passed: set[str], key: int
) -> None:
    of = service(*(lease(name, weight=weight) for name, (weight, _) in fleet.items()), policy=on("path"))
    policy = hashing(**{name: claims for name, (_, claims) in fleet.items()})
    left = {name: fleet[name] for name in fleet if name not in passed}
    found = who(policy, of, for_path(f"/{key}"), passed)
    if not left:
        assert found == "-"
        return
    weight, claims = left[found]
    total = 1 + sum(each for _, each in left.values())
    share = BOUND * total * weight / sum(each for each, _ in left.values())
    assert claims + 1 <= max(FREE, math.ceil(share))


# Source


def sources(of: Service, clients: list[str], passed: Collection[str] = ()) -> list[str]:
    policy = Source(0, Busy(A=1000), Health())
    found: list[Lease | None] = [policy.pick(of, 0.0, passed, HEAD, False, client) for client in clients]
    return [each.instance_id if each else "-" for each in found]


def test_a_client_stays_with_its_backend_however_busy_that_is() -> None:
    clients = [f"192.0.2.{number}" for number in range(250)]
    once = sources(service(*TEN), clients)
    assert sources(service(*TEN), clients * 2) == once * 2
    assert set(once) == set(TEN)
    fewer = sources(service(*TEN[1:]), clients)
    assert all(one == other for one, other in zip(once, fewer, strict=True) if one != "A")
    assert sources(service(*TEN), clients, set(TEN)) == ["-"] * 250


def test_an_ipv6_client_is_its_network() -> None:
    of = service(*TEN)
    assert len(set(sources(of, [f"2001:db8::{number:x}" for number in range(50)]))) == 1
    assert len(set(sources(of, [f"2001:db8:{number:x}::1" for number in range(50)]))) > 5
    assert len(set(sources(of, ["::ffff:192.0.2.1", "192.0.2.1"]))) == 1


def test_clients_that_nobody_knows_take_turns() -> None:
    assert sources(service(*"ABC"), [""] * 6) == list("ABCABC")


def test_it_remembers_so_many_addresses_and_no_more() -> None:
    clients = [f"10.0.{number // 256}.{number % 256}" for number in range(MAX_KNOWN + 10)]
    policy = Source(0, Busy(), Health())
    of = service(*TEN)
    for client in clients:
        policy.pick(of, 0.0, (), HEAD, False, client)
    assert len(policy._numbers) == 10
    found = policy.pick(of, 0.0, (), HEAD, False, clients[0])
    assert found is not None
    assert [found.instance_id] == sources(of, clients[:1])
