"""How many retries a service may have: by hand, and against a model that counts each exchange."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.retry_budget import LEAST, SHARE, UNREMARKABLE, WINDOW, RetryBudget, RetryBudgets


def taken(budget: RetryBudget, finished: int, now: float, times: int = 10_000) -> int:
    """How many of so many retries are granted."""
    return sum(budget.take(finished, now) for _ in range(times))


def test_a_service_that_nobody_asks_has_three_a_second() -> None:
    budget = RetryBudget(0, 100.0)
    assert taken(budget, 0, 100.0) == LEAST * WINDOW
    assert taken(budget, 0, 109.9) == 0
    assert taken(budget, 0, 110.0) == LEAST * WINDOW


def test_a_busy_service_has_a_fifth_of_its_last_ten_seconds() -> None:
    budget = RetryBudget(0, 100.0)
    assert taken(budget, 2000, 110.0) in range(int(SHARE * 2000 * 0.9), int(SHARE * 2000) + 1)
    assert taken(budget, 2000, 110.5) == 0
    assert taken(budget, 2000, 125.0) == LEAST * WINDOW


def test_fifty_requests_of_a_backend_that_died_are_all_sent_again_at_200_a_second() -> None:
    budgets = RetryBudgets(0.0)
    budgets.look({"app.example": 0}, 3600.0)
    assert [budgets.take("app.example", 200 * 2, 3602.0) for _ in range(50)] == [True] * 50


def test_what_came_in_an_hour_is_scaled_to_ten_seconds() -> None:
    budget = RetryBudget(0, 0.0)
    budget.look(3600 * 100, 3600.0)
    assert taken(budget, 3600 * 100, 3600.0) in range(180, 201)


def test_counts_that_begin_anew_are_new_exchanges() -> None:
    budget = RetryBudget(1_000_000, 100.0)
    assert taken(budget, 500, 105.0) == int(SHARE * 500)


def test_a_clock_that_stands_still_counts_at_once() -> None:
    budget = RetryBudget(0, 100.0)
    budget.look(1000, 100.0)
    assert taken(budget, 1000, 100.0) == int(SHARE * 1000)


def test_before_its_first_retry_a_service_is_known_by_the_last_look() -> None:
    budgets = RetryBudgets(0.0)
    budgets.look({"busy.example": 1_000_000}, 1000.0)
    granted = sum(budgets.take("busy.example", 1_000_400, 1002.0) for _ in range(1000))
    assert granted == int(SHARE * 400)
    budgets.look({"busy.example": 1_000_800, "other.example": 5000}, 1004.0)
    assert sum(budgets.take("busy.example", 1_000_800, 1004.0) for _ in range(1000)) == int(SHARE * 400)
    granted = sum(budgets.take("quiet.example", UNREMARKABLE, 1004.5) for _ in range(1000))
    assert granted == LEAST * WINDOW
    assert len(budgets) == 2
    budgets.look({}, 1005.0)
    assert not budgets.take("quiet.example", UNREMARKABLE, 1005.0)
    budgets.keep_only({"quiet.example"})
    assert len(budgets) == 1


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.125, 0.5, 1.0, 4.0]), st.integers(0, 300), st.integers(0, 50)),
        max_size=30,
    )
)
def test_retries_are_held_to_a_fifth_or_three_a_second_of_any_ten_seconds(
    steps: list[tuple[float, int, int]],
) -> None:
    budget = RetryBudget(0, 1000.0)
    now, finished = 1000.0, 0
    exchanges: list[tuple[float, float, int]] = []  # from, to, how many, evenly in between
    retries: list[float] = []
    for seconds, came, asked in steps:
        exchanges.append((now, now + seconds, came))
        now, finished = now + seconds, finished + came
        budget.look(finished, now)
        oldest = int(now) - WINDOW + 1
        known = sum(
            count * max(0.0, end - max(begin, oldest)) / (end - begin) for begin, end, count in exchanges
        )
        allowed = max(SHARE * known, LEAST * WINDOW)
        for _ in range(asked):
            recent = sum(at >= oldest for at in retries)
            granted = budget.take(finished, now)
            if abs(recent - allowed) > 1e-6:
                assert granted is (recent < allowed)
            if granted:
                retries.append(now)
