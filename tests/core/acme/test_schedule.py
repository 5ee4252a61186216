"""When to order, renew, ask and wait, with the time as an argument."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.core.acme.progress import Progress, Step
from portero_py.core.acme.schedule import (
    AT_ONCE,
    LATER_AT_ONCE,
    MAX_RETRY_AFTER,
    Act,
    Decision,
    Held,
    Turn,
    admitted,
    challenges_for,
    choose_challenge,
    decide,
    drawn,
    ends_soon,
    next_question,
    reach_time,
    renewal_time,
    retry_time,
    turn,
)

DAY = 86400.0
NAMES = ("a.example", "www.a.example")
#: 90 days, from day 0 on.
KEPT = Held(frozenset(NAMES), 0.0, 90 * DAY, "ab")
DONE = Progress(names=NAMES, fingerprint="ab", installed_at=10.0, ask_at=6 * DAY)


def decided(
    now: float,
    progress: Progress = DONE,
    kept: Held | None = KEPT,
    served: Held | None = KEPT,
    *,
    is_ours: bool = True,
    adoptable: Held | None = None,
) -> Decision:
    return decide(NAMES, progress, kept, served, now, is_ours=is_ours, adoptable=adoptable)


# What to do


def test_without_a_certificate_one_is_ordered() -> None:
    assert decided(0, Progress(), None, None) == Decision(Act.ORDER)


def test_a_hand_made_certificate_is_left_alone_whatever_else_is_true() -> None:
    for progress in (DONE, Progress(), replace(DONE, step=Step.ISSUED), replace(DONE, revoked=True)):
        assert decided(89 * DAY, progress, None, is_ours=False) == Decision(Act.LEAVE)


def test_nothing_happens_before_the_pause_is_over() -> None:
    for progress in (Progress(), replace(DONE, step=Step.ORDERED), replace(DONE, revoked=True)):
        waiting = replace(progress, retry_at=100.0)
        assert decided(99.9, waiting, None, None) == Decision(Act.WAIT, 100.0)
        assert decided(100.0, waiting, None, None).act is not Act.WAIT


def test_a_time_that_only_a_clock_that_was_ahead_can_have_made_counts_as_come() -> None:
    years = 4 * 365 * DAY
    far = Progress().failed("unreachable", "x", years, reach_time(years, 0, 0.5), was_heard=False)
    assert decided(5, far, None, None) == Decision(Act.ORDER)
    longest = Progress(retry_at=retry_time(5, 9, MAX_RETRY_AFTER, 1.0))
    assert decided(5, longest, None, None) == Decision(Act.WAIT, longest.retry_at)
    assert decided(5, replace(DONE, ask_at=years)) == Decision(Act.ASK)


def test_an_order_that_was_begun_is_carried_on() -> None:
    for step in (Step.ORDERED, Step.FINALIZED):
        assert decided(5, replace(DONE, step=step), None, None) == Decision(Act.RESUME)
        assert decided(5, replace(DONE, step=step)) == Decision(Act.RESUME)


def test_an_order_for_other_names_is_not() -> None:
    other = replace(DONE, step=Step.ORDERED, names=("a.example",))
    assert decided(5, other, None, None) == Decision(Act.ORDER)


def test_an_issued_certificate_is_installed_first() -> None:
    assert decided(89 * DAY, replace(DONE, step=Step.ISSUED)) == Decision(Act.INSTALL)


def test_a_certificate_that_vanished_from_its_folder_is_installed_again() -> None:
    assert decided(5, served=None) == Decision(Act.INSTALL)
    assert decided(5, served=replace(KEPT, fingerprint="older")) == Decision(Act.INSTALL)


def test_names_that_were_added_want_a_new_certificate_and_names_taken_away_do_not() -> None:
    assert decided(5, kept=replace(KEPT, names=frozenset({"a.example"}))) == Decision(Act.ORDER)
    assert decided(5, kept=replace(KEPT, names=KEPT.names | {"more.example"})).act is Act.WAIT


def test_a_pair_of_its_own_is_adopted_when_the_state_is_lost() -> None:
    assert decided(5, Progress(), None, adoptable=KEPT) == Decision(Act.ADOPT)
    assert decided(5, replace(Progress(), failures=3), None, adoptable=KEPT) == Decision(Act.ADOPT)


def test_no_pair_is_adopted_that_would_have_to_be_replaced_at_once() -> None:
    other = replace(KEPT, names=frozenset({"a.example"}))
    revoked = replace(Progress(), revoked=True)
    assert decided(60 * DAY, Progress(), None, adoptable=KEPT) == Decision(Act.ORDER)
    assert decided(5, Progress(), None, adoptable=other) == Decision(Act.ORDER)
    assert decided(5, revoked, None, adoptable=KEPT) == Decision(Act.ORDER)


def test_what_another_instance_renewed_is_adopted_and_what_is_older_is_replaced() -> None:
    newer = Held(frozenset(NAMES), 60 * DAY, 150 * DAY, "cd")
    older = Held(frozenset(NAMES), -30 * DAY, 60 * DAY, "ef")
    assert decided(61 * DAY, served=newer, adoptable=newer) == Decision(Act.ADOPT)
    assert decided(1 * DAY, served=older, adoptable=older) == Decision(Act.INSTALL)


def test_a_revoked_certificate_is_replaced_at_once() -> None:
    assert decided(5, replace(DONE, revoked=True)) == Decision(Act.ORDER)


def test_an_expired_certificate_is_replaced_even_soon_after_its_installation() -> None:
    late = replace(DONE, installed_at=90 * DAY - 1)
    assert decided(90 * DAY, late) == Decision(Act.ORDER)


def test_renewal_is_at_two_thirds_of_the_lifetime() -> None:
    late = replace(DONE, ask_at=61 * DAY)
    assert decided(60 * DAY - 1, late) == Decision(Act.WAIT, 60 * DAY)
    assert decided(60 * DAY, late) == Decision(Act.ORDER)


def test_the_ca_s_moment_counts_instead() -> None:
    wanted = replace(DONE, renew_at=40 * DAY, ask_at=41 * DAY)
    assert decided(40 * DAY - 1, wanted) == Decision(Act.WAIT, 40 * DAY)
    assert decided(40 * DAY, wanted) == Decision(Act.ORDER)


def test_renewal_information_is_asked_for_in_its_time() -> None:
    asking = replace(DONE, ask_at=20 * DAY)
    assert decided(20 * DAY - 1, asking) == Decision(Act.WAIT, 20 * DAY)
    assert decided(20 * DAY, asking) == Decision(Act.ASK)


# When


def test_a_ca_cannot_put_renewal_off_until_it_is_too_late() -> None:
    assert renewal_time(KEPT, replace(DONE, renew_at=1e12)) == 81 * DAY


def test_a_ca_cannot_make_portero_order_in_a_loop() -> None:
    assert renewal_time(KEPT, replace(DONE, renew_at=1.0, installed_at=50 * DAY)) == 50 * DAY + 3600
    short = Held(frozenset(NAMES), 0.0, 1000.0, "ab")
    assert renewal_time(short, replace(DONE, renew_at=1.0, installed_at=50.0)) == 150.0


def test_the_renewal_of_a_revoked_certificate_was_due_always() -> None:
    assert renewal_time(KEPT, replace(DONE, revoked=True)) == 10.0


@given(st.floats(0, 0.999999), st.floats(0, 1e9), st.floats(1, 1e6))
def test_the_moment_lies_in_the_window(chance: float, start: float, length: float) -> None:
    assert start <= drawn(start, start + length, chance) <= start + length


def test_the_next_question_comes_between_a_minute_and_a_day() -> None:
    assert next_question(10.0, 0.0) == 10 + 6 * 3600
    assert next_question(10.0, 5.0) == 70.0
    assert next_question(10.0, 3600.0) == 3610.0
    assert next_question(10.0, 1e9) == 10 + DAY


def test_pauses_double_up_to_twelve_hours() -> None:
    assert [retry_time(0, n, 0, 0.5) for n in (0, 1, 2, 7, 8, 1000)] == [300, 600, 1200, 38400, 43200, 43200]


def test_where_the_ca_never_heard_of_the_attempt_pauses_are_seconds() -> None:
    assert [reach_time(1, n, 0.5) for n in (0, 1, 2, 7, 8, 1000)] == [3, 5, 9, 257, 301, 301]
    assert reach_time(0, 0, 0.0) == pytest.approx(1.8)


# Whose turn it is


def test_the_turn_is_by_what_there_is_and_what_has_failed() -> None:
    failed = Progress(failures=1)
    assert turn(Act.INSTALL, failed, None) is turn(Act.ADOPT, Progress(), None) is Turn.LOCAL
    assert turn(Act.ORDER, Progress(unheard=5), None) is Turn.FIRST
    assert turn(Act.ORDER, Progress(), KEPT) is turn(Act.ASK, Progress(), KEPT) is Turn.RENEWAL
    assert turn(Act.RESUME, failed, None) is turn(Act.ORDER, failed, KEPT) is Turn.RETRY


def test_first_certificates_come_first() -> None:
    due = [Turn.RETRY, Turn.RENEWAL, Turn.FIRST, Turn.LOCAL, Turn.FIRST]
    assert admitted(due, []) == [3, 2, 4, 1, 0]


def test_those_that_come_later_never_take_all_places() -> None:
    many = [Turn.RETRY] * 2 * AT_ONCE
    assert admitted(many, []) == list(range(LATER_AT_ONCE))
    assert admitted(many, [Turn.RENEWAL] * LATER_AT_ONCE) == []
    assert admitted([*many, Turn.FIRST], [Turn.RETRY] * LATER_AT_ONCE) == [len(many)]


def test_there_is_an_end_to_first_certificates_too() -> None:
    assert admitted([Turn.FIRST] * 2 * AT_ONCE, [Turn.FIRST]) == list(range(AT_ONCE - 1))


@given(st.lists(st.sampled_from(Turn)), st.lists(st.sampled_from(Turn), max_size=AT_ONCE))
def test_there_are_never_more_than_there_is_room_for(due: list[Turn], going_on: list[Turn]) -> None:
    found = admitted(due, going_on)
    assert len(found) == len(set(found)) <= AT_ONCE - len(going_on)
    left = [due[place] for place in range(len(due)) if place not in found]
    if len(found) + len(going_on) < AT_ONCE:
        assert all(each > Turn.FIRST for each in left)


def test_a_pause_has_a_fifth_of_jitter() -> None:
    assert retry_time(0, 0, 0, 0.0) == pytest.approx(270)
    assert retry_time(0, 0, 0, 1.0) == pytest.approx(330)


def test_retry_after_is_respected_up_to_eight_days() -> None:
    assert retry_time(1.0, 0, 7200.0, 0.5) == 7201.0
    assert retry_time(1.0, 0, 10.0, 0.5) == 301.0
    assert retry_time(0.0, 0, 1e12, 0.5) == 8 * DAY


# How


@pytest.mark.parametrize(
    ("wanted", "answerable", "tried", "chosen"),
    [
        ("auto", ("tls-alpn-01", "http-01"), (), "tls-alpn-01"),
        ("auto", ("tls-alpn-01", "http-01"), ("tls-alpn-01",), "http-01"),
        ("auto", ("tls-alpn-01", "http-01"), ("tls-alpn-01", "http-01"), ""),
        ("auto", ("tls-alpn-01",), ("tls-alpn-01",), ""),
        ("http-01", ("tls-alpn-01", "http-01"), (), "http-01"),
        ("http-01", ("tls-alpn-01", "http-01"), ("http-01",), ""),
        ("http-01", ("tls-alpn-01",), (), ""),
    ],
)
def test_challenges_alternate(
    wanted: str, answerable: tuple[str, ...], tried: tuple[str, ...], chosen: str
) -> None:
    assert choose_challenge(wanted, answerable, tried) == chosen


@pytest.mark.parametrize(
    ("names", "usual", "has_dns", "kinds"),
    [
        (("a.example",), ("tls-alpn-01", "http-01"), False, ("tls-alpn-01", "http-01")),
        (("a.example",), ("http-01",), False, ("tls-alpn-01", "http-01")),
        (("a.example",), ("tls-alpn-01", "http-01"), True, ("tls-alpn-01", "http-01", "dns-01")),
        (("a.example",), ("http-01",), True, ("http-01", "dns-01", "tls-alpn-01")),
        (("a.example",), (), True, ("dns-01", "tls-alpn-01", "http-01")),
        (("a.example", "*.a.example"), ("tls-alpn-01", "http-01"), True, ("dns-01",)),
        (("*.a.example",), ("tls-alpn-01", "http-01"), False, ()),
    ],
)
def test_a_record_in_dns_goes_before_a_port_that_a_ca_may_not_reach(
    names: tuple[str, ...], usual: tuple[str, ...], has_dns: bool, kinds: tuple[str, ...]
) -> None:
    assert challenges_for(names, ("tls-alpn-01", "http-01"), usual, has_dns=has_dns) == kinds


def test_somebody_is_warned_when_a_sixth_of_the_lifetime_is_left_or_two_weeks() -> None:
    assert not ends_soon(0, 90 * DAY, 76 * DAY)
    assert ends_soon(0, 90 * DAY, 76 * DAY + 1)
    assert not ends_soon(0, 6 * DAY, 5 * DAY)
    assert ends_soon(0, 6 * DAY, 5 * DAY + 1)
