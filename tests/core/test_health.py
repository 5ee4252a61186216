"""A worker's own marks: what they outlive, what ends them, whom they eject and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portero_py.core.health import LONGEST_TRIAL, Condition, Failure, Health, Mark, Verdict
from portero_py.core.model import Backend, Lease, LeaseState, Service
from portero_py.core.policies import ServiceHealth, ServicePolicy
from portero_py.core.routing_table import RoutingTable

NOTHING = Verdict(0.0, False, False)
TOLD = Verdict(0.0, False, True)
PROMPT, UNREACHABLE, HANGS = Failure


def lease(name: str, *, service: str = "app.example", port: int = 80) -> Lease:
    return Lease(service, name, Backend(f"host-{name}", port), 1e9, 30)


def service_of(*leases: Lease) -> Service:
    return Service(leases[0].service, leases)


def table(*leases: Lease) -> RoutingTable:
    names = {each.service for each in leases}
    return RoutingTable(
        1, {name: Service(name, tuple(each for each in leases if each.service == name)) for name in names}
    )


def health_of_a_worker(*, fall: int = 3) -> Health:
    health = Health()
    health.configure(fall, 2.0, ())
    return health


def fail(
    health: Health,
    of: Lease,
    service: Service | None = None,
    failure: Failure = PROMPT,
    *,
    now: float = 100.0,
    began: float | None = None,
    trial: Mark | None = None,
    times: int = 1,
) -> Verdict:
    """So many failures; what the last one did."""
    for _ in range(times):
        verdict = health.failed(
            of, service, failure, failure.value, began=now if began is None else began, now=now, trial=trial
        )
    return verdict


def failures(health: Health, of: Lease) -> int:
    mark = health.of(of)
    return 0 if mark is None else mark.failures


def ejected(health: Health, *leases: Lease) -> str:
    """The names of those that are passed over."""
    marks = [(each.instance_id, health.of(each)) for each in leases]
    return "".join(name for name, mark in marks if mark is not None and mark.is_ejected)


def begin_trial(health: Health, of: Lease, now: float) -> Mark:
    trial = health.begin_trial(of, now)
    assert trial is not None
    return trial


# Marks


def test_failures_are_counted_in_a_row_for_each_backend_of_each_service() -> None:
    health = health_of_a_worker()
    a, b, other = lease("A"), lease("B"), lease("A", service="other.example")
    fail(health, a, times=2)
    fail(health, b)
    assert [failures(health, each) for each in (a, b, other)] == [2, 1, 0]
    assert len(health) == 2


def test_a_success_ends_the_mark_and_nobody_elses() -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    fail(health, a)
    fail(health, b)
    for each in (a, a, lease("C"), lease("A", service="other.example")):
        assert health.succeeded(each, 100.0) == 0.0
    assert [failures(health, each) for each in (a, b)] == [0, 1]
    health.succeeded(b, 100.0)
    assert len(health) == 0
    fail(health, a)
    assert failures(health, a) == 1


def test_a_mark_outlives_renewals_and_new_tables() -> None:
    health = health_of_a_worker()
    fail(health, lease("A"))
    renewed = replace(lease("A"), expires_at=2e9, weight=3)
    for _ in range(3):
        health.retain(table(renewed, lease("B")), 100.0)
    assert failures(health, renewed) == 1


def test_who_comes_back_at_another_address_begins_anew() -> None:
    health = health_of_a_worker()
    fail(health, lease("A"))
    moved = lease("A", port=81)
    assert failures(health, moved) == 0
    fail(health, moved)
    assert failures(health, moved) == 1
    assert failures(health, lease("A")) == 0


def test_who_was_down_in_between_begins_anew_whether_that_was_seen_or_not() -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    both = service_of(a, b)
    fail(health, a, both, times=3)
    assert ejected(health, a) == "A"
    down = replace(a, state=LeaseState.DOWN, since=50.0)
    again = replace(a, since=60.0)
    assert health.of(down) is health.of(again) is None
    health.follow(service_of(again, b), 100.0)
    assert len(health) == 0
    assert health.ejected == {}


def test_whoever_the_table_does_not_have_is_forgotten() -> None:
    health = health_of_a_worker()
    stays, left, moved, gone = lease("A"), lease("B"), lease("C"), lease("D", service="gone.example")
    fail(health, gone, service_of(gone, lease("E", service="gone.example")), times=3)
    assert ejected(health, gone) == "D"
    for each in (stays, left, moved):
        fail(health, each)
    health.retain(table(stays, lease("C", port=81), lease("E")), 100.0)
    assert [failures(health, each) for each in (stays, left, moved, gone)] == [1, 0, 0, 0]
    assert len(health) == 1
    assert health.ejected == {}
    health.retain(RoutingTable(2), 100.0)
    assert len(health) == 0


def test_marks_are_found_by_backend_for_one_service_or_for_all() -> None:
    health = health_of_a_worker()
    a, other = lease("A"), lease("B", service="other.example")
    fail(health, a)
    fail(health, other, failure=HANGS)
    assert {place: mark.error for place, mark in health.by_backend().items()} == {
        ("app.example", "host-A", 80): "prompt",
        ("other.example", "host-B", 80): "hangs",
    }
    assert list(health.by_backend("app.example")) == [("app.example", "host-A", 80)]
    assert health.by_backend("nobody.example") == {}


# Ejection


def test_failures_in_a_row_eject_and_each_trial_that_fails_doubles_the_pause_up_to_a_minute() -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    both = service_of(a, b)
    assert fail(health, a, both, times=2) == NOTHING
    assert fail(health, a, both) == (1.0, False, True)
    now, pauses = 100.0, [1.0]
    for _ in range(8):
        assert health.begin_trial(a, now + pauses[-1] - 0.01) is None
        now += pauses[-1]
        verdict = fail(health, a, both, now=now, trial=begin_trial(health, a, now))
        assert verdict[1:] == (True, True)
        pauses.append(verdict.pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    trial = begin_trial(health, a, now + 60)
    assert health.succeeded(a, now + 61) == now + 61 - 100
    assert trial.condition is Condition.WELL
    assert ejected(health, a, b) == ""


def test_while_a_trial_goes_on_there_is_no_other_and_without_a_verdict_the_next_one_may_try() -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    fail(health, a, service_of(a, b), times=3)
    trial = begin_trial(health, a, 101.0)
    assert health.begin_trial(a, 101.0) is None
    assert not trial.is_due(160.9)
    health.end_trial(trial)
    assert ejected(health, a) == "A"
    assert begin_trial(health, a, 101.0) is trial
    fail(health, a, service_of(a, b), now=101.0, trial=trial)
    health.end_trial(trial)  # after its verdict it changes nothing
    assert trial.condition is Condition.EJECTED
    assert health.begin_trial(a, 102.9) is None
    assert health.begin_trial(b, 1000.0) is None


def test_many_exchanges_that_fail_at_once_are_one_series() -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    both = service_of(a, b)
    fail(health, a, both, HANGS, now=100.0, began=90.0, times=3)
    assert fail(health, a, both, HANGS, now=100.5, began=90.5, times=97) == NOTHING
    trial = begin_trial(health, a, 103.0)
    assert fail(health, a, both, HANGS, now=103.0, began=93.0, times=10) == NOTHING
    assert health.succeeded(a, 104.0) == 4.0
    assert fail(health, a, both, HANGS, now=105.0, began=103.9, times=10) == NOTHING
    assert ejected(health, a) == ""
    assert fail(health, a, both, HANGS, now=105.0, began=104.1, times=3).pause == 3.0
    assert trial.until == 108.0


@pytest.mark.parametrize("failure", [UNREACHABLE, HANGS])
def test_the_pause_of_who_takes_his_time_outlasts_a_probe(failure: Failure) -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    both = service_of(a, b)
    assert fail(health, a, both, failure, times=3).pause == 3.0
    pauses, now = [], 100.0
    for _ in range(3):
        now += 50
        pauses.append(fail(health, a, both, failure, now=now, trial=begin_trial(health, a, now)).pause)
    assert pauses == [3, 4, 8]


@pytest.mark.parametrize(
    ("series", "hangs"),
    [
        ([HANGS, HANGS, HANGS], True),
        ([HANGS, UNREACHABLE, UNREACHABLE], True),  # frozen, and its backlog is full now
        ([UNREACHABLE, UNREACHABLE, UNREACHABLE], False),
        ([HANGS, HANGS, PROMPT], False),
        ([PROMPT, PROMPT, HANGS], True),
    ],
)
def test_who_hangs_is_known_by_his_failures(series: list[Failure], hangs: bool) -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    for failure in series:
        fail(health, a, service_of(a, b), failure)
    mark = health.of(a)
    assert mark is not None
    assert mark.hangs is hangs
    assert mark.error == series[-1].value


def test_long_pauses_are_forgotten_when_it_has_been_well_for_a_minute_and_not_before() -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    both = service_of(a, b)
    fail(health, a, both, times=3)
    health.succeeded(a, 101.0)
    health.succeeded(a, 160.9)
    assert len(health) == 1
    assert fail(health, a, both, now=160.9, times=3).pause == 2.0
    health.succeeded(a, 170.0)
    assert fail(health, a, both, now=230.0, times=3).pause == 1.0
    health.succeeded(a, 231.0)
    health.succeeded(a, 291.0)
    assert len(health) == 0


def test_never_more_than_half_of_the_ready_ones_are_ejected() -> None:
    health = health_of_a_worker(fall=1)
    leases = [lease(name) for name in "ABCDE"]
    five = service_of(*leases)
    for each in leases:
        fail(health, each, five)
    assert ejected(health, *leases) == "AB"
    down = [replace(each, state=LeaseState.DOWN) for each in leases[2:]]
    three = service_of(*leases[:2], lease("F"), *down)
    health.follow(three, 100.0)
    assert ejected(health, *leases) == "B", "whose pause would have ended first comes back first"
    assert fail(health, leases[0], three, now=100.5, began=99.0) == NOTHING
    assert fail(health, leases[0], three, now=101.0) == TOLD
    health.follow(service_of(leases[1]), 100.5)
    assert ejected(health, *leases) == ""


def test_the_last_one_is_not_ejected_and_control_is_told_once_a_second() -> None:
    health = health_of_a_worker()
    a = lease("A")
    alone = service_of(a)
    assert fail(health, a, alone, times=2) == NOTHING
    assert fail(health, a, alone) == TOLD
    assert fail(health, a, alone, now=100.9, times=5) == NOTHING
    assert fail(health, a, alone, now=101.0) == TOLD
    assert ejected(health, a) == ""


def test_only_those_that_are_ready_and_there_are_ejected() -> None:
    health = health_of_a_worker(fall=1)
    b, c = lease("B"), lease("C")
    starting = replace(lease("A"), state=LeaseState.STARTING)
    assert fail(health, starting, service_of(starting, b, c)) == TOLD
    gone = lease("G")
    assert fail(health, gone, service_of(b, c)) == TOLD
    assert fail(health, gone) == TOLD
    ending = replace(lease("A"), expires_at=50.0)
    assert fail(health, b, service_of(ending, b)) == TOLD
    assert ejected(health, starting, b, gone) == ""


def test_a_trial_that_takes_for_ever_does_not_keep_others_from_trying() -> None:
    health, a, b = health_of_a_worker(fall=1), lease("a"), lease("b")
    fail(health, a, service_of(a, b), now=100.0)
    endless = begin_trial(health, a, 101.0)
    assert health.begin_trial(a, 101.0 + LONGEST_TRIAL - 0.1) is None
    assert begin_trial(health, a, 101.0 + LONGEST_TRIAL) is endless
    assert health.begin_trial(a, 102.0 + LONGEST_TRIAL) is None
    health.succeeded(a, 103.0 + LONGEST_TRIAL)
    health.end_trial(endless)
    assert endless.condition is Condition.WELL


def test_slow_ones_are_counted_in_a_row_and_eject_nobody() -> None:
    health, one, other = health_of_a_worker(), lease("one"), lease("other")
    assert [health.slow(one) for _ in range(4)] == [False, False, True, True]
    assert not health.slow(other)
    assert ejected(health, one, other) == ""
    assert failures(health, one) == 0


@pytest.mark.parametrize("answer", ["success", "failure"])
def test_any_answer_ends_a_row_of_slow_ones(answer: str) -> None:
    health, one, other = health_of_a_worker(), lease("one"), lease("other")
    for _ in range(2):
        assert [health.slow(one) for _ in range(2)] == [False, False]
        if answer == "success":
            health.succeeded(one, 100.0)
        else:
            fail(health, one, service_of(one, other))
    assert not health.slow(one)


def test_a_time_out_is_no_answer() -> None:
    health, one = health_of_a_worker(), lease("one")
    assert [health.slow(one) for _ in range(2)] == [False, False]
    fail(health, one, failure=HANGS)
    assert health.slow(one)


def test_who_is_ejected_or_somebody_else_now_is_not_called_slow() -> None:
    health, one, other = health_of_a_worker(fall=1), lease("one"), lease("other")
    assert health.slow(replace(one, since=5.0))
    assert not health.slow(one), "that is said of its former state"
    fail(health, one, service_of(one, other))
    assert ejected(health, one, other) == "one"
    assert not health.slow(one)


def test_a_service_has_its_own_count_of_failures_time_and_statuses() -> None:
    health = health_of_a_worker(fall=3)
    health.configure(3, 2.0, (503,))
    a, b = lease("a"), lease("b")
    own = ServicePolicy(health=ServiceHealth(timeout=20.0, fall=1, statuses=(500,)))
    service = Service("app.example", (a, b), policy=own)
    assert fail(health, a, service, HANGS).pause == 21.0
    assert [health.is_failure(service, status) for status in (500, 503)] == [True, False]
    assert health.slow(b, service)
    for policy in (ServicePolicy(), ServicePolicy(health=ServiceHealth(rise=2))):
        health = health_of_a_worker(fall=3)
        health.configure(3, 2.0, (503,))
        service = Service("app.example", (a, b), policy=policy)
        assert fail(health, a, service, HANGS, times=2) == NOTHING
        assert fail(health, a, service, HANGS).pause == 3.0
        assert [health.is_failure(service, status) for status in (500, 503)] == [False, True]
        assert not health.slow(b, service)
    assert [health.is_failure(None, status) for status in (500, 503)] == [False, True]


def test_a_trial_of_who_was_let_in_meanwhile_is_a_failure_as_any_other() -> None:
    health = health_of_a_worker()
    a, b = lease("A"), lease("B")
    fail(health, a, service_of(a, b), times=3)
    trial = begin_trial(health, a, 101.0)
    alone = service_of(a)
    health.follow(alone, 101.0)
    assert ejected(health, a) == ""
    assert fail(health, a, alone, now=102.0, began=101.5, trial=trial) == TOLD
    moved = lease("A", port=81)
    assert fail(health, moved, service_of(moved, b), now=102.0, trial=trial) == NOTHING
    health.end_trial(trial)
    assert failures(health, moved) == 1


@settings(deadline=None, max_examples=60)
class Ejections(RuleBasedStateMachine):
    """One service of a few backends against a model of plain words."""

    def __init__(self) -> None:
        super().__init__()
        self.health = health_of_a_worker()
        self.now = 1000.0
        self.leases = {name: lease(name) for name in "ABCD"}
        self.trials: dict[str, Mark] = {}
        self.tried_since: dict[str, float] = {}
        self.stopped: list[Mark] = []
        # the model: name -> what is known of it
        self.row: dict[str, int] = dict.fromkeys(self.leases, 0)
        self.pause: dict[str, float] = {}  # of those that are ejected
        self.until: dict[str, float] = {}
        self.came_back: dict[str, float] = {}
        self.former: dict[str, float] = {}  # pauses that are not forgotten yet

    names = st.sampled_from("ABCD")

    @property
    def service(self) -> Service:
        return Service("app.example", tuple(self.leases.values()))

    def is_ready(self, name: str) -> bool:
        return name in self.leases and self.leases[name].state is LeaseState.READY

    def half(self) -> int:
        return sum(self.is_ready(name) for name in "ABCD") // 2

    @rule(name=names, failure=st.sampled_from(Failure), ago=st.sampled_from([0.0, 0.5, 5.0]))
    def an_exchange_fails(self, name: str, failure: Failure, ago: float) -> None:
        if name not in self.leases:
            return
        began = self.now - ago
        verdict = fail(self.health, self.leases[name], self.service, failure, now=self.now, began=began)
        if name in self.pause or began < self.came_back.get(name, 0.0):
            assert verdict == NOTHING
            return
        self.row[name] += 1
        if self.row[name] >= 3 and self.is_ready(name) and len(self.pause) < self.half():
            former = self.former.get(name, 0.0)
            if self.now >= self.came_back.get(name, 0.0) + 60:
                former = 0.0
            self.eject(name, min(60.0, 2 * former) or 1.0, verdict)
            assert not verdict.is_again
        else:
            assert not verdict.pause

    @rule(name=names)
    def an_exchange_succeeds(self, name: str) -> None:
        if name not in self.leases:
            return
        away = self.health.succeeded(self.leases[name], self.now)
        self.row[name] = 0
        if name in self.pause:
            self.let_in(name)
        else:
            assert away == 0.0
            if self.now >= self.came_back.get(name, 0.0) + 60:
                self.forget(name)

    @rule(name=names)
    def an_exchange_is_sent_there(self, name: str) -> None:
        if name not in self.leases:
            return
        trial = self.health.begin_trial(self.leases[name], self.now)
        assert (trial is not None) is self.is_due(name)
        if trial is not None:
            self.trials[name] = trial
            self.tried_since[name] = self.now

    @precondition(lambda self: self.trials)
    @rule(data=st.data(), verdict=st.booleans())
    def a_trial_ends(self, data: st.DataObject, verdict: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.trials)))
        trial = self.trials.pop(name)
        if verdict:
            found = fail(self.health, self.leases[name], self.service, now=self.now, trial=trial)
            assert found.is_again
            self.eject(name, min(60.0, 2 * self.pause[name]), found)
        self.health.end_trial(trial)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 20.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=names, state=st.sampled_from([LeaseState.READY, LeaseState.DOWN, LeaseState.DRAINING]))
    def control_changes_a_state(self, name: str, state: LeaseState) -> None:
        if name in self.leases and self.leases[name].state is not state:
            self.leases[name] = replace(self.leases[name], state=state, since=self.now)
            self.forget(name)
            self.follow()

    @rule(name=names)
    def a_lease_comes_or_goes(self, name: str) -> None:
        if self.leases.pop(name, None) is None:
            self.leases[name] = replace(lease(name), since=self.now)
        self.forget(name)
        self.follow()

    @rule(name=names)
    def a_lease_is_renewed(self, name: str) -> None:
        if name in self.leases:
            self.leases[name] = replace(self.leases[name], expires_at=self.now + 1e6)
            self.follow()

    @invariant()
    def the_ejected_ones_are_known(self) -> None:
        assert set(self.health.ejected.get("app.example", {})) == set(self.pause)
        assert len(self.pause) <= self.half()
        for name in self.pause:
            mark = self.health.of(self.leases[name])
            assert mark is not None
            assert mark.is_due(self.now) is self.is_due(name)

    @invariant()
    def nobody_is_marked_who_is_not_there(self) -> None:
        assert set(self.health.marks.get("app.example", {})) <= set(self.leases)

    # Private

    def is_due(self, name: str) -> bool:
        if name in self.trials:
            return self.now >= self.tried_since[name] + LONGEST_TRIAL
        return name in self.pause and self.now >= self.until[name]

    def eject(self, name: str, pause: float, verdict: Verdict) -> None:
        assert verdict.is_evidence
        assert verdict.pause in (pause, max(pause, 3.0))
        self.pause[name], self.until[name] = pause, self.now + verdict.pause

    def let_in(self, name: str) -> None:
        self.former[name] = self.pause.pop(name)
        self.trials.pop(name, None)
        self.came_back[name] = self.now

    def forget(self, name: str) -> None:
        for known in (self.pause, self.until, self.came_back, self.former, self.trials):
            known.pop(name, None)
        self.row[name] = 0

    def follow(self) -> None:
        self.health.follow(self.service, self.now)
        too_many = max(0, len(self.pause) - self.half())
        back = [name for name in self.pause if name not in self.health.ejected.get("app.example", {})]
        assert len(back) == too_many
        for name in back:
            assert all(self.until[name] <= self.until[other] for other in self.pause if other not in back)
        for name in back:
            self.let_in(name)
            self.row[name] = 2


TestEjections = Ejections.TestCase
