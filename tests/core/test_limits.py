"""Who is one client, how many connections it has, how fast it opens them: against a model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portero_py.core.limits import COLUMNS, Clients, Rates, SharedCounts, client_of


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("unknown", "unknown"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(address: str, client: str) -> None:
    assert client_of(address) == client


def test_ten_thousand_connections_of_one_network_leave_nothing_behind() -> None:
    clients, rates = Clients(), Rates()
    for number in range(10_000):
        client = client_of(f"2001:db8::{number:x}")
        assert clients.enter(client, 1)
        clients.leave(client)
        assert rates.take(client, 1000.0, 1000.0, number / 1000)
    assert len(clients) == 0
    assert len(rates) == 1
    rates.forget_quiet(11.0)
    assert len(rates) == 0


def test_a_connection_that_was_never_counted_cannot_be_given_back() -> None:
    with pytest.raises(KeyError):
        Clients().leave("192.0.2.1")


def test_a_burst_is_let_in_and_then_the_rate() -> None:
    rates = Rates()
    assert [rates.take("a", 2.0, 5.0, 100.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert not rates.take("a", 2.0, 5.0, 100.4)
    assert rates.take("a", 2.0, 5.0, 100.5)
    assert not rates.take("a", 2.0, 5.0, 100.5)
    assert rates.take("b", 2.0, 5.0, 100.5), "another client has a bucket of its own"


def test_the_table_of_rates_is_bounded_and_forgets_whoever_was_quiet_longest() -> None:
    rates = Rates(3)
    for client in "abcab":
        assert rates.take(client, 0.01, 9.0, 0.0)
    rates.take("d", 0.01, 9.0, 0.0)
    assert len(rates) == 3
    # "c" was forgotten: its bucket is full again, and the others' are not.
    assert sum(rates.take("c", 0.01, 9.0, 0.0) for _ in range(20)) == 9
    assert sum(rates.take("b", 0.01, 9.0, 0.0) for _ in range(20)) == 7


def test_those_that_are_not_quiet_yet_are_remembered() -> None:
    rates = Rates()
    rates.take("a", 1.0, 9.0, 0.0)
    rates.take("b", 1.0, 9.0, 5.0)
    rates.forget_quiet(5.5)
    assert len(rates) == 1
    rates.forget_quiet(6.0)
    assert len(rates) == 0


def test_a_worker_that_takes_the_place_of_a_dead_one_begins_at_zero() -> None:
    memory = memoryview(bytearray(SharedCounts.size(2)))
    one, two = Clients(SharedCounts(memory, 0)), Clients(SharedCounts(memory, 1))
    assert [one.enter("a", 3) for _ in range(3)] == [True] * 3
    assert not two.enter("a", 3)
    Clients(SharedCounts(memory, 0))
    assert two.enter("a", 3)


def test_two_clients_with_one_cell_in_common_are_told_apart_by_the_other() -> None:
    memory = memoryview(bytearray(SharedCounts.size(2)))
    mine, others = SharedCounts(memory, 0), SharedCounts(memory, 1)
    first = "192.0.2.1"
    second = next(
        name
        for name in (f"client {number}" for number in range(1_000_000))
        if hash(name) % COLUMNS == hash(first) % COLUMNS
        and (hash(name) >> 24) % COLUMNS != (hash(first) >> 24) % COLUMNS
    )
    others.change(first, 5)
    assert mine.elsewhere(first) == 5
    assert mine.elsewhere(second) == 0


CLIENTS = st.sampled_from(["a", "b", "c"])
MOST = 4


class Workers(RuleBasedStateMachine):
    """Three workers with one memory, any of which may die, against one plain counter of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = memoryview(bytearray(SharedCounts.size(3)))
        self.workers = [Clients(SharedCounts(self.memory, number)) for number in range(3)]
        self.model: list[Counter[str]] = [Counter() for _ in range(3)]

    def total(self, client: str) -> int:
        return sum(counted[client] for counted in self.model)

    @rule(worker=st.integers(0, 2), client=CLIENTS)
    def enter(self, worker: int, client: str) -> None:
        expected = self.total(client) < MOST
        assert self.workers[worker].enter(client, MOST) == expected
        self.model[worker][client] += expected

    @precondition(lambda self: any(counted.total() for counted in self.model))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        there = [(n, c) for n, counted in enumerate(self.model) for c in counted.elements()]
        worker, client = data.draw(st.sampled_from(there))
        self.workers[worker].leave(client)
        self.model[worker][client] -= 1

    @rule(worker=st.integers(0, 2))
    def die(self, worker: int) -> None:
        self.workers[worker] = Clients(SharedCounts(self.memory, worker))
        self.model[worker].clear()

    @invariant()
    def nobody_without_a_connection_is_remembered(self) -> None:
        for clients, counted in zip(self.workers, self.model, strict=True):
            assert len(clients) == len(+counted)


class Buckets(RuleBasedStateMachine):
    """Buckets that are refilled all the time, as one would write them down."""

    RATE, BURST = 2.0, 3.0

    def __init__(self) -> None:
        super().__init__()
        self.rates = Rates()
        self.now = 0.0
        self.tokens: dict[str, float] = dict.fromkeys("abc", self.BURST)

    @rule(quarters=st.integers(0, 12))
    def time_passes(self, quarters: int) -> None:
        self.now += quarters / 4
        for client in self.tokens:
            self.tokens[client] = min(self.tokens[client] + self.RATE * quarters / 4, self.BURST)

    @rule(client=CLIENTS)
    def take(self, client: str) -> None:
        expected = self.tokens[client] >= 1
        assert self.rates.take(client, self.RATE, self.BURST, self.now) == expected
        self.tokens[client] -= expected

    @rule()
    def forget(self) -> None:
        self.rates.forget_quiet(self.now)
        assert len(self.rates) >= sum(tokens < self.BURST for tokens in self.tokens.values())


TestWorkers = Workers.TestCase
TestBuckets = Buckets.TestCase
