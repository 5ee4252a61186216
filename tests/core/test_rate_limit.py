"""Rate limits: against buckets of exact fractions, by one worker and by several."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.core import rate_limit
from portero_py.core.policies import RateLimit
from portero_py.core.rate_limit import SECOND, WAYS, Buckets, Limiter, Table, take

NOW = 1_000_000 * SECOND  # some time of a monotonic clock


def workers(count: int) -> list[Buckets]:
    """The buckets of so many workers, in one memory."""
    memory = memoryview(bytearray(Buckets.size(count)))
    return [Buckets(memory, count, own) for own in range(count)]


def table(sets: int = 1, *, of: int = 1) -> list[Table]:
    memory = memoryview(bytearray(of * sets * 2 * WAYS * 8))
    return [Table(memory, of, own) for own in range(of)]


class Model:
    """A bucket as it is explained: tokens that come back at a steady pace."""

    def __init__(self, limit: RateLimit) -> None:
        self.most = limit.requests
        self.gap = max(int(limit.seconds * SECOND) // limit.requests, 1)
        self.tokens = Fraction(limit.requests)
        self.at = 0

    def has_one(self, now: int) -> bool:
        self.tokens = min(self.tokens + Fraction(now - self.at, self.gap), Fraction(self.most))
        self.at = now
        return self.tokens >= 1


limits = st.builds(
    RateLimit,
    requests=st.integers(1, 5),
    seconds=st.sampled_from([0.001, 0.3, 1.0, 7.0, 60.0]),
    key=st.sampled_from(["client", "service", "header:X-User"]),
)
steps = st.lists(
    st.tuples(
        st.integers(0, 2),  # the worker
        st.sampled_from(["a", "b"]),  # the client
        st.one_of(st.just(0), st.integers(0, 2 * SECOND), st.integers(0, 100 * SECOND)),  # time since
    ),
    max_size=40,
)


@given(st.lists(limits, min_size=1, max_size=3, unique=True), steps)
def test_what_goes_on_is_what_a_bucket_of_tokens_lets_go_on(
    listed: list[RateLimit], played: list[tuple[int, str, int]]
) -> None:
    every = [[Limiter("app.example", limit, buckets) for limit in listed] for buckets in workers(3)]
    models: dict[tuple[int, str], Model] = {}
    now = NOW
    for worker, client, passed in played:
        now += passed
        keys = ["" if limit.key == "service" else client for limit in listed]
        asked = [
            models.setdefault((number, key), Model(limit))
            for number, (limit, key) in enumerate(zip(listed, keys, strict=True))
        ]
        expected = [model.has_one(now) for model in asked].count(False) == 0
        limiters = every[worker]
        waits = [limiter.wait(limiter.find(key), now) for limiter, key in zip(limiters, keys, strict=True)]
        found = take(limiters, keys, now)
        assert (found == 0) is expected
        if expected:
            for model in asked:
                model.tokens -= 1
        else:
            assert found == max(waits)  # a nanosecond less is too early, for this limit at least
            assert all(wait <= found for wait in waits)


def test_a_limit_lets_as_many_through_as_it_says_to_the_request() -> None:
    [buckets] = workers(1)
    limiters = [Limiter("app.example", RateLimit(100), buckets)]
    assert [take(limiters, ["c"], NOW) for _ in range(101)] == [0] * 100 + [SECOND // 100]
    assert [take(limiters, ["c"], NOW + SECOND // 2) == 0 for _ in range(60)] == [True] * 50 + [False] * 10
    assert [take(limiters, ["c"], NOW + 9 * SECOND) == 0 for _ in range(110)] == [True] * 100 + [False] * 10
    assert take(limiters, ["d"], NOW) == 0


def test_over_a_long_time_the_pace_is_the_limits() -> None:
    [buckets] = workers(1)
    limiters = [Limiter("app.example", RateLimit(7, 3.0), buckets)]
    passed = sum(take(limiters, ["c"], NOW + step * (SECOND // 100)) == 0 for step in range(30_000))
    assert passed == 7 + 699  # 299.99 s, and what the bucket held


def test_a_client_on_one_connection_has_all_of_its_limit_though_there_are_several_workers() -> None:
    [first, *_] = workers(4)
    limiters = [Limiter("app.example", RateLimit(10), first)]
    assert [take(limiters, ["c"], NOW) == 0 for _ in range(11)] == [True] * 10 + [False]


def test_workers_have_one_limit_together() -> None:
    every = [[Limiter("app.example", RateLimit(100), buckets)] for buckets in workers(4)]
    assert sum(take(every[turn % 4], ["c"], NOW) == 0 for turn in range(1000)) == 100


def test_who_is_refused_by_one_limit_uses_up_nothing_of_the_others() -> None:
    [buckets] = workers(1)
    by_client, by_service = RateLimit(2, 1.0, "client"), RateLimit(3, 1.0, "service")
    limiters = [Limiter("app.example", limit, buckets) for limit in (by_service, by_client)]
    assert [take(limiters, ["", "greedy"], NOW) == 0 for _ in range(50)] == [True] * 2 + [False] * 48
    assert take(limiters, ["", "modest"], NOW) == 0
    assert take(limiters, ["", "late"], NOW) > 0


def test_who_waits_as_long_as_he_is_told_goes_on_and_a_nanosecond_less_is_too_early() -> None:
    [buckets] = workers(1)
    limiters = [Limiter("app.example", RateLimit(1, 10.0), buckets)]
    assert take(limiters, ["c"], NOW) == 0
    waits = [take(limiters, ["c"], NOW + after) for after in (0, SECOND, 10 * SECOND - 1, 10 * SECOND)]
    assert waits == [10 * SECOND, 9 * SECOND, 1, 0]


def test_limits_of_services_and_of_other_numbers_are_others() -> None:
    [buckets] = workers(1)
    for service, limit in (
        ("one.example", RateLimit(1)),
        ("two.example", RateLimit(1)),
        ("one.example", RateLimit(1, 2.0)),
        ("one.example", RateLimit(1, 1.0, "service")),
        ("one.example", RateLimit(1, 1.0, "header:a")),
    ):
        limiters = [Limiter(service, limit, buckets)]
        assert take(limiters, ["c"], NOW) == 0
        assert take([Limiter(service, limit, buckets)], ["c"], NOW) > 0, "a limit that stays keeps its count"


def test_more_requests_than_nanoseconds_are_a_token_each_nanosecond() -> None:
    [buckets] = workers(1)
    limiters = [Limiter("app.example", RateLimit(10, 1e-9), buckets)]
    assert [take(limiters, ["c"], NOW) for _ in range(11)] == [0] * 10 + [1]


# The table


def test_workers_that_admit_at_the_same_time_count_one_too_few_and_undo_nothing() -> None:
    one, other = table(of=2)
    seen = one.full_at(7)
    for number in range(1, 101):
        other.put(7, number)  # the first one stands still meanwhile
    one.put(7, seen + 1)
    assert one.full_at(7) == other.full_at(7) == 100


def test_a_table_that_is_full_forgets_who_is_nearest_to_a_full_bucket() -> None:
    [places] = table()
    for key in range(1, WAYS + 1):
        places.put(key, 100 + key)
    places.put(3, 50)
    places.put(99, 60)
    assert places.full_at(3) == 0
    assert places.full_at(99) == 60
    assert [places.full_at(key) for key in (1, 2, 4)] == [101, 102, 104]


def test_keys_that_clients_choose_displace_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "SETS", (1, 1, 1))
    [buckets] = workers(1)
    clients = [Limiter("app.example", RateLimit(1, 60.0), buckets)]
    headers = [Limiter("app.example", RateLimit(1, 3600.0, "header:X-User"), buckets)]
    assert take(clients, ["c"], NOW) == 0
    for number in range(100):
        assert take(headers, [b"%d" % number], NOW) == 0
    assert take(clients, ["c"], NOW) == 60 * SECOND


def test_a_worker_that_takes_anothers_place_goes_on_with_its_counts() -> None:
    memory = memoryview(bytearray(Buckets.size(2)))
    for _ in range(2):
        limiters = [Limiter("app.example", RateLimit(2), Buckets(memory, 2, 1))]
        assert take(limiters, ["c"], NOW) == 0
    assert take(limiters, ["c"], NOW) > 0


def test_as_many_keys_as_are_promised_are_remembered() -> None:
    [buckets] = workers(1)
    limiters = [Limiter("app.example", RateLimit(1, 60.0), buckets)]
    names = [str(number) for number in range(65_536)]
    for name in names:
        assert take(limiters, [name], NOW) == 0
    forgotten = sum(take(limiters, [name], NOW) == 0 for name in names[::16])
    assert forgotten < 0.05 * len(names[::16])
