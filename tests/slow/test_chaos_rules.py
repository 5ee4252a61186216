"""The rules by which a chaos run is judged: what is explained, what is promised. No proxy, no waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.slow import chaos_ledger
from tests.slow.chaos_backends import FAILING
from tests.slow.chaos_journal import Breakage, Death, Journal, Trouble
from tests.slow.chaos_judge import FAILS, HANGS, MOST_EACH, SLOW_TO_HANG, Verdict, explanation
from tests.slow.chaos_ledger import DEFAULT, LAG, SWEEP, Certificates, Leases

BROKEN = Breakage("broken", "keep-alive", 9.0, 10.0, "reset", port=4000, opened=5.0, answered=3)
STATUS = Breakage("status", "keep-alive", 9.0, 10.0, "", service="fleeting-0.chaos.test", status=503, port=1)
API = Breakage("api broken", "agent", 9.0, 10.0, "reset")
NAME = ("a.test", "one")


class Clock:
    """The ledger's."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(chaos_ledger, "now", found)
    return found


# The judge


def test_only_connections_that_a_killed_worker_had_are_its_exchanges() -> None:
    journal = Journal(deaths=[Death(9.5, "worker 0", 77, frozenset({4000}))])
    assert explanation(journal, BROKEN) == "worker was killed"
    assert explanation(journal, replace(BROKEN, port=4001)) == ""  # somebody else's
    assert explanation(journal, replace(BROKEN, opened=9.6)) == ""  # the port was used again
    assert explanation(journal, replace(BROKEN, at=9.4)) == ""  # before the death


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_no_trouble_explains_an_answer_of_5xx_from_a_steady_service(status: int) -> None:
    names = ("worker 0", "control", "supervisor", "descriptors", "registration port")
    journal = Journal(troubles=[Trouble(name, 0.0) for name in names])
    assert explanation(journal, replace(STATUS, service="steady-0.chaos.test", status=status)) == ""
    assert explanation(journal, replace(STATUS, kind="api refused", status=status)) == ""


def test_a_lease_of_seconds_may_be_missed_by_a_worker_that_was_stopped() -> None:
    assert explanation(Journal(), STATUS) == ""
    assert explanation(Journal(troubles=[Trouble("worker 1", 3.0, 8.9)]), STATUS) == ""
    journal = Journal(troubles=[Trouble("worker 1", 3.0, 9.5)])
    assert explanation(journal, STATUS) == "the worker had not heard of the renewal"
    assert explanation(journal, replace(STATUS, status=502)) == ""


def test_only_a_new_connection_may_lack_a_descriptor() -> None:
    journal = Journal(troubles=[Trouble("descriptors", 8.0, 9.5)])
    assert explanation(journal, replace(BROKEN, answered=0)) == "no descriptor for a new connection"
    assert explanation(journal, BROKEN) == ""


def test_only_between_two_answers_may_a_connection_make_room() -> None:
    journal = Journal(troubles=[Trouble("descriptors", 8.0, 9.5)])
    closed = replace(
        BROKEN, detail="GET /: IncompleteReadError('0 bytes read on a total of 9 expected bytes')"
    )
    assert explanation(journal, closed) == "an idle connection made room"
    assert explanation(Journal(), closed) == ""
    half = replace(BROKEN, detail="GET /: IncompleteReadError('7 bytes read on a total of 9')")
    assert explanation(journal, half) == ""


def test_the_api_may_be_cut_off_while_control_is_away_and_at_no_other_time() -> None:
    assert explanation(Journal(), API) == ""
    assert explanation(Journal(troubles=[Trouble("worker 0", 0.0)]), API) == ""
    assert explanation(Journal(troubles=[Trouble("control", 0.0, 9.0)]), API) != ""


def test_a_backend_that_hangs_or_fails_explains_what_began_before_anybody_knew() -> None:
    hangs = Trouble(f"{HANGS} of shaky-0.chaos.test", 8.0, 20.0)
    late = replace(STATUS, service="shaky-0.chaos.test", status=504)
    assert explanation(Journal(troubles=[hangs]), late) != ""
    assert explanation(Journal(), late) == ""
    assert explanation(Journal(troubles=[hangs]), replace(late, service="shaky-1.chaos.test")) == ""
    assert explanation(Journal(troubles=[hangs]), replace(late, status=502)) == ""
    after = replace(late, begun=8.1 + SLOW_TO_HANG, at=30.0)
    assert explanation(Journal(troubles=[hangs]), after) == ""
    assert explanation(Journal(troubles=[hangs, Trouble("worker 0", 9.0, 10.0)]), after) != ""
    fails = Trouble(f"{FAILS} of shaky-0.chaos.test", 8.0, 20.0)
    said = replace(late, status=503, detail=f"503 {FAILING!r}")
    assert explanation(Journal(troubles=[fails]), said) != ""
    assert explanation(Journal(troubles=[hangs]), said) == ""
    assert explanation(Journal(troubles=[fails]), replace(said, detail="no backend")) == ""
    tried = replace(said, begun=19.0, at=19.1)
    assert explanation(Journal(troubles=[fails]), tried) != ""
    probed = Trouble(f"{FAILS} of shaky-1.chaos.test", 8.0, 20.0)
    assert explanation(Journal(troubles=[probed]), replace(tried, service="shaky-1.chaos.test")) == ""


def test_a_hanging_backend_explains_so_many_and_no_more() -> None:
    journal = Journal(troubles=[Trouble(f"{HANGS} of shaky-0.chaos.test", 8.0, 20.0)])
    for _ in range(MOST_EACH + 3):
        journal.broke(replace(STATUS, service="shaky-0.chaos.test", status=504))
    assert len(Verdict(journal).unexplained) == 3


def test_what_is_unexplained_is_told_with_what_was_done_before_it() -> None:
    journal = Journal(started=0.0, breakages=[BROKEN])
    journal.fault("kill worker", "worker 1")
    journal.events = [replace(each, at=8.0) for each in journal.events]
    verdict = Verdict(journal)
    assert verdict.unexplained == [BROKEN]
    assert "kill worker: worker 1" in verdict.story()
    assert "broken (keep-alive)" in verdict.summary("chaos")


# Leases


def test_a_lease_is_sure_from_its_answer_until_its_time_after_it_was_asked_for(clock: Clock) -> None:
    leases = Leases()
    asked = leases.asked(NAME, 80, 10.0)
    clock.now = 102.0
    assert leases.undead([NAME], 101.0) == []  # it may have been granted already
    leases.answered(NAME, asked, 10.0, granted=True)
    assert leases.covers("a.test", 102.0, 109.9)
    assert not leases.covers("a.test", 101.9, 109.9)
    assert not leases.covers("a.test", 102.0, 110.0)
    assert [lease.name for lease in leases.lost([], 102.0, 103.0)] == [NAME]
    assert leases.lost([NAME], 102.0, 103.0) == []
    assert leases.undead([NAME], 112.0 + SWEEP) == []
    assert leases.undead([NAME], 112.1 + SWEEP) == [NAME]


def test_an_answer_that_never_came_leaves_what_was_sure_and_makes_more_possible(clock: Clock) -> None:
    leases = Leases()
    leases.answered(NAME, leases.asked(NAME, 80, 10.0), 10.0, granted=True)
    clock.now = 108.0
    leases.answered(NAME, leases.asked(NAME, 80, 10.0), 10.0, granted=False)
    assert leases.covers("a.test", 108.0, 109.0)
    assert not leases.covers("a.test", 108.0, 111.0)
    assert leases.undead([NAME], 117.0) == []


def test_a_renewal_without_an_answer_may_have_shortened_the_lease(clock: Clock) -> None:
    leases = Leases()
    leases.answered(NAME, leases.asked(NAME, 80, 60.0), 60.0, granted=True)
    leases.answered(NAME, leases.asked(NAME, 80, 3.0), 3.0, granted=False)
    assert leases.covers("a.test", 100.0, 102.9)
    assert not leases.covers("a.test", 100.0, 103.0)
    assert leases.undead([NAME], 159.0) == []


def test_a_release_ends_what_is_sure_at_once_and_what_is_possible_with_its_answer(clock: Clock) -> None:
    leases = Leases()
    leases.answered(NAME, leases.asked(NAME, 80, 60.0), 60.0, granted=True)
    assert leases.releasing(NAME) == 160.0
    assert leases.lost([], 100.0, 101.0) == []
    assert leases.undead([NAME], 105.0) == []
    leases.released(NAME)
    assert leases.undead([NAME], 105.0) == [NAME]


# Certificates


def test_a_name_presents_the_last_pair_that_was_seen(clock: Clock) -> None:
    promises = Certificates(Journal())
    promises.promise("a.test", 1)
    clock.now += LAG
    promises.promise("a.test", 2)
    assert promises.allowed("a.test", clock.now, clock.now) == {1, 2}
    assert promises.allowed("a.test", clock.now + LAG, clock.now + LAG) == {2}
    clock.now += 1.0  # spoilt before anybody must have looked
    promises.spoilt("a.test")
    assert promises.allowed("a.test", clock.now + LAG, clock.now + LAG) == {1, 2}
    promises.promise("a.test", DEFAULT)
    assert promises.allowed("a.test", clock.now + LAG, clock.now + LAG) == {DEFAULT}


def test_no_time_counts_in_which_control_could_not_look(clock: Clock) -> None:
    promises = Certificates(Journal(troubles=[Trouble("control", 101.0, 105.0)]))
    promises.promise("a.test", 1)
    clock.now = 100.5 + LAG
    promises.promise("a.test", 2)
    late = clock.now + LAG - 0.1
    assert promises.allowed("a.test", late, late) == {1, 2}
    assert promises.allowed("a.test", late + 0.2, late + 0.2) == {2}
