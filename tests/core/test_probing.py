"""Who is probed when, and what follows: a fake clock, no network."""

from __future__ import annotations

from dataclasses import replace

import pytest

from portero_py.core.health import Evidence
from portero_py.core.model import Backend, Lease, LeaseState
from portero_py.core.policies import ServiceHealth
from portero_py.core.probing import (
    GAP,
    MAX_TEXT,
    MEMORY,
    SUSPICION,
    Kind,
    Probe,
    Probing,
    Result,
    Verdict,
    is_still,
)

STARTING, READY, DOWN, DRAINING = LeaseState

PLACE = ("app.example", "::1", 80)


def lease(path: str = "/up", state: LeaseState = STARTING, **fields: object) -> Lease:
    backend = Backend("::1", 80)
    known = Lease("app.example", "one", backend, 1e9, None, health_path=path, state=state)
    return replace(known, **fields)  # type: ignore[arg-type]


class Desk:
    """Probing, a clock that the test turns, and a table of its own that the verdicts change."""

    def __init__(self, interval: float = 5.0, rise: int = 1, fall: int = 3, most: int = 256) -> None:
        self.now = 1000.0
        self.chance = 0.5
        self.probing = Probing(interval, rise, fall, chance=lambda: self.chance, most=most)
        self.table: dict[tuple[str, str, int], Lease] = {}

    def put(self, one: Lease) -> None:
        place = (one.service, one.backend.host, one.backend.port)
        self.table[place] = one
        self.probing.see(place, one, self.now)

    def end(self, one: Lease) -> None:
        place = (one.service, one.backend.host, one.backend.port)
        del self.table[place]
        self.probing.see(place, None, self.now)

    def turn_to(self, state: LeaseState) -> None:
        """Let the one lease be in another state."""
        self.put(replace(self.table[PLACE], state=state, since=self.now))

    def suspect(self, error: str = "refused", *, hangs: bool = False) -> None:
        self.probing.suspect(Evidence(*PLACE, hangs, error), self.table.get(PLACE), self.now)

    def begun(self, most: int = 256) -> list[Probe]:
        return self.probing.take(self.now, most)

    def next_probe(self) -> Probe:
        """Turn the clock to when somebody is due, and begin."""
        at = self.probing.next()
        assert at is not None
        self.now = max(self.now, at)
        [probe] = self.begun()
        return probe

    def comes_to(self, result: Result, said: str = "no", probe: Probe | None = None) -> Verdict | None:
        """Let the next probe, or `probe`, end so; what follows is put into the table."""
        verdict = self.probing.ended(probe or self.next_probe(), result, said, self.now)
        if verdict is not None:
            self.put(replace(verdict.lease, state=verdict.state, since=self.now))
        return verdict

    @property
    def state(self) -> LeaseState:
        return self.table[PLACE].state


def test_with_a_health_path_it_is_asked_at_once_and_then_each_interval() -> None:
    desk = Desk()
    assert desk.probing.next() is None
    desk.put(lease())
    probe = desk.next_probe()
    assert (desk.now, probe.kind, probe.lease.health_path) == (1000.0, Kind.GET, "/up")
    assert desk.probing.running == 1
    assert desk.probing.next() is None  # not while it is being probed
    desk.comes_to(Result.OK, probe=probe)
    assert desk.probing.running == 0
    assert desk.probing.next() == 1005.0


@pytest.mark.parametrize(("chance", "at"), [(0.0, 1004.5), (1.0, 1005.5)])
def test_an_interval_is_jittered(chance: float, at: float) -> None:
    desk = Desk()
    desk.chance = chance
    desk.put(lease())
    desk.comes_to(Result.OK)
    assert desk.probing.next() == pytest.approx(at)


def test_intervals_are_from_beginning_to_beginning_but_never_without_a_pause() -> None:
    desk = Desk()
    desk.put(lease())
    probe = desk.next_probe()
    desk.now += 4.9
    desk.comes_to(Result.OK, probe=probe)
    assert desk.probing.next() == pytest.approx(1005.4)


def test_without_a_health_path_a_ready_one_is_left_alone() -> None:
    desk = Desk()
    desk.put(lease("", READY))
    desk.put(lease("", DRAINING, backend=Backend("::1", 81)))
    assert desk.probing.next() is None
    assert desk.begun() == []


@pytest.mark.parametrize("rise", [1, 2, 3])
@pytest.mark.parametrize("state", [STARTING, DOWN])
def test_rise_successes_in_a_row_make_it_ready(state: LeaseState, rise: int) -> None:
    desk = Desk(rise=rise)
    desk.put(lease(state=state))
    for _ in range(rise - 1):
        assert desk.comes_to(Result.OK) is None
    assert desk.comes_to(Result.REFUSED) is None
    for _ in range(rise - 1):
        assert desk.comes_to(Result.OK) is None
    verdict = desk.comes_to(Result.OK)
    assert verdict is not None
    said = "a probe succeeded" if rise == 1 else f"{rise} probes succeeded"
    assert (verdict.state, verdict.why, desk.state) == (READY, said, READY)
    assert desk.comes_to(Result.OK) is None


@pytest.mark.parametrize("fall", [1, 2, 3])
def test_fall_failures_in_a_row_make_a_ready_one_down(fall: int) -> None:
    desk = Desk(fall=fall)
    desk.put(lease(state=READY))
    for _ in range(fall - 1):
        assert desk.comes_to(Result.TIMEOUT, "no answer") is None
    assert desk.comes_to(Result.OK) is None
    for _ in range(fall - 1):
        assert desk.comes_to(Result.TIMEOUT, "no answer") is None
    verdict = desk.comes_to(Result.BAD_STATUS, "status 500")
    assert verdict is not None
    said = "a probe failed" if fall == 1 else f"{fall} probes failed"
    assert (verdict.state, verdict.why) == (DOWN, f"{said}, probe: status 500")
    assert desk.probing.error_at(PLACE) == "probe: status 500"


def test_one_that_starts_goes_on_starting_while_it_fails() -> None:
    desk = Desk()
    desk.put(lease())
    for _ in range(10):
        assert desk.comes_to(Result.REFUSED, "connection refused") is None
    assert desk.state is STARTING
    assert desk.probing.error_at(PLACE) == "probe: connection refused"
    assert desk.comes_to(Result.OK) is not None


def test_one_that_is_down_goes_on_being_probed_until_it_is_ready() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    for _ in range(10):
        desk.comes_to(Result.REFUSED)
    assert desk.state is DOWN
    desk.comes_to(Result.OK)
    assert desk.state is READY
    assert desk.comes_to(Result.REFUSED) is None  # what was before does not count any more


def test_what_was_in_the_way_here_is_no_verdict_and_is_told() -> None:
    desk = Desk(fall=1)
    desk.put(lease(state=READY))
    assert desk.comes_to(Result.NO_VERDICT, "too many open files") is None
    assert desk.state is READY
    assert desk.probing.error_at(PLACE) == "probe: too many open files"
    assert desk.probing.next() == pytest.approx(1005.0)


# Draining, ending, coming back


def test_who_takes_the_place_of_one_that_hung_is_probed_once_at_a_time() -> None:
    desk = Desk()
    desk.put(lease())
    desk.comes_to(Result.TIMEOUT)
    desk.put(lease(instance_id="two"))
    desk.next_probe()
    desk.now += 60
    assert desk.begun() == []


def test_one_that_drains_is_not_probed_and_once_it_is_ready_it_is_again() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    desk.comes_to(Result.OK)
    desk.turn_to(DRAINING)
    assert desk.probing.next() is None
    desk.now += 60
    desk.turn_to(READY)
    assert desk.next_probe().kind is Kind.GET
    assert desk.now == 1060.0


@pytest.mark.parametrize(
    "change",
    [
        {"instance_id": "two"},
        {"health_path": "/other"},
        {"backend": Backend("::1", 80, use_tls=True)},
        {"state": STARTING, "since": 1001.0},
        {"since": 1001.0},
    ],
    ids=str,
)
def test_the_answer_to_an_old_probe_changes_no_new_lease(change: dict[str, object]) -> None:
    desk = Desk(fall=1)
    desk.put(lease(state=READY))
    old = desk.next_probe()
    desk.now += 1
    desk.put(replace(desk.table[PLACE], **change))  # type: ignore[arg-type]
    new = desk.next_probe()
    assert desk.now == 1001.0  # at once
    assert desk.comes_to(Result.REFUSED, probe=old) is None
    assert desk.probing.error_at(PLACE) == ""
    assert desk.probing.running == 1
    desk.comes_to(Result.OK, probe=new)
    assert desk.probing.running == 0


def test_a_renewal_while_it_is_probed_changes_nothing() -> None:
    desk = Desk(fall=1)
    desk.put(lease(state=READY))
    probe = desk.next_probe()
    desk.put(replace(desk.table[PLACE], expires_at=2e9, weight=3, max_in_flight=7))
    assert desk.begun() == []
    verdict = desk.comes_to(Result.REFUSED, probe=probe)
    assert verdict is not None
    assert verdict.lease.expires_at == 2e9


def test_one_that_ends_while_it_is_probed_is_forgotten() -> None:
    desk = Desk(fall=1)
    desk.put(lease(state=READY))
    probe = desk.next_probe()
    desk.end(desk.table[PLACE])
    assert desk.comes_to(Result.REFUSED, probe=probe) is None
    assert (desk.probing.next(), desk.probing.running, desk.probing.error_at(PLACE)) == (None, 0, "")
    desk.probing.see(PLACE, None, desk.now)  # told twice


def test_another_state_of_the_same_lease_is_probed_when_the_former_was_due() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    desk.comes_to(Result.REFUSED)
    desk.turn_to(DOWN)
    assert desk.probing.next() == pytest.approx(1005.0)
    assert desk.probing.error_at(PLACE) == "probe: no"


def test_one_whose_health_path_left_with_another_lease_there_is_ready_by_a_connection() -> None:
    desk = Desk()
    desk.put(lease("", STARTING))
    probe = desk.next_probe()
    assert probe.kind is Kind.CONNECT
    assert desk.comes_to(Result.OK, probe=probe) is not None
    assert desk.probing.next() is None


# What workers saw


def test_after_evidence_one_failed_probe_is_enough() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    desk.comes_to(Result.OK)
    desk.now += 2
    desk.suspect("reset by the backend")
    assert desk.probing.error_at(PLACE) == "worker: reset by the backend"
    assert desk.probing.next() == 1002.0
    verdict = desk.comes_to(Result.REFUSED, "connection refused")
    assert verdict is not None
    assert verdict.why == "probe: connection refused (worker: reset by the backend)"
    assert desk.state is DOWN


def test_after_evidence_and_a_successful_probe_nothing_changes() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    desk.comes_to(Result.OK)
    desk.now += 2
    desk.suspect()
    assert desk.comes_to(Result.OK) is None
    assert [desk.comes_to(Result.REFUSED) is not None for _ in range(3)] == [False, False, True]


def test_without_a_health_path_evidence_brings_probes_until_it_is_long_ago() -> None:
    desk = Desk()
    desk.put(lease("", READY))
    desk.suspect()
    times = []
    while desk.probing.next() is not None:
        probe = desk.next_probe()
        assert probe.kind is Kind.CONNECT
        times.append(desk.now - 1000)
        assert desk.comes_to(Result.OK, probe=probe) is None
    assert times[:3] == pytest.approx([0.0, 5.0, 10.0])
    assert SUSPICION <= times[-1] < SUSPICION + 5.5
    assert desk.probing.error_at(PLACE) == ""


def test_without_a_health_path_one_that_is_down_is_probed_until_it_is_ready() -> None:
    desk = Desk(rise=2)
    desk.put(lease("", READY))
    desk.suspect()
    desk.comes_to(Result.REFUSED)
    assert desk.state is DOWN
    for _ in range(100):
        desk.comes_to(Result.REFUSED)
    desk.comes_to(Result.OK)
    verdict = desk.comes_to(Result.OK)
    assert verdict is not None
    assert verdict.state is READY
    assert desk.probing.next() is None


def test_one_that_hangs_has_to_answer_something() -> None:
    desk = Desk()
    desk.put(lease("", READY))
    desk.suspect(hangs=True)
    desk.suspect(hangs=False)  # another worker, which met something else
    for _ in range(3):
        probe = desk.next_probe()
        assert probe.kind is Kind.ASK
        desk.comes_to(Result.TIMEOUT, probe=probe)
    assert desk.state is DOWN
    desk.comes_to(Result.OK)
    assert desk.state is READY
    assert desk.probing.next() is None


def test_one_with_a_health_path_that_hangs_is_asked_for_that() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    desk.suspect(hangs=True)
    assert desk.next_probe().kind is Kind.GET


def test_one_that_was_found_down_has_to_answer_something() -> None:
    desk = Desk()
    desk.put(lease("", DOWN))
    assert desk.next_probe().kind is Kind.ASK


def test_evidence_that_comes_while_it_is_probed_is_looked_into_again() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    probe = desk.next_probe()
    desk.now += 0.1
    desk.suspect()
    assert desk.comes_to(Result.OK, probe=probe) is None
    assert desk.probing.next() == 1000 + GAP
    assert desk.comes_to(Result.REFUSED) is not None


def test_workers_cannot_have_one_probed_all_the_time() -> None:
    desk = Desk()
    desk.put(lease("", READY))
    begun = 0
    for _ in range(1000):
        desk.suspect()
        for probe in desk.begun():
            begun += 1
            desk.comes_to(Result.OK, probe=probe)
        desk.now += 0.01
    assert begun == 10 / GAP


@pytest.mark.parametrize("state", [STARTING, DOWN])
def test_evidence_against_one_that_is_not_ready_changes_no_time(state: LeaseState) -> None:
    desk = Desk(rise=2)
    desk.put(lease(state=state))
    desk.comes_to(Result.REFUSED)
    due = desk.probing.next()
    desk.suspect("reset")
    assert desk.probing.next() == due
    assert desk.probing.error_at(PLACE) == "worker: reset"


def test_evidence_against_one_that_is_gone_or_drains_is_too_late() -> None:
    desk = Desk()
    desk.suspect()
    desk.put(lease("", DRAINING))
    desk.suspect()
    assert desk.probing.next() is None
    assert desk.probing.error_at(PLACE) == ""


def test_errors_are_remembered_for_a_while_and_are_never_long() -> None:
    desk = Desk()
    desk.put(lease(state=READY))
    desk.comes_to(Result.REFUSED, "x" * 10_000)
    assert len(desk.probing.error_at(PLACE)) == MAX_TEXT
    failed = desk.now
    while desk.now <= failed + MEMORY:
        assert desk.probing.error_at(PLACE)
        desk.comes_to(Result.OK)
    assert desk.probing.error_at(PLACE) == ""


# Many


def many(count: int, path: str = "/up", *, tls: bool = False) -> list[Lease]:
    return [
        lease(path, service=f"{n}.example", backend=Backend("::1", n + 1, use_tls=tls)) for n in range(count)
    ]


def test_what_is_found_at_a_start_is_spread_and_what_is_gone_is_forgotten() -> None:
    desk = Desk()
    gone = lease(service="gone.example")
    desk.put(gone)
    desk.comes_to(Result.OK)
    due = []
    desk.chance = 1.0
    desk.probing.look(many(100), desk.now)
    desk.probing.look(many(100), desk.now)  # nothing new
    assert desk.probing.next() == pytest.approx(1000.2)
    desk.chance = 0.0
    desk.probing.look(many(10_000), desk.now)
    assert desk.probing.next() == 1000.0
    desk.now += 100
    while probes := desk.begun():
        due += [probe.lease.service for probe in probes]
        for probe in probes:
            desk.probing.ended(probe, Result.OK, "", desk.now)
        desk.now += 0.02
    assert set(due) == {one.service for one in many(10_000)}


def test_no_more_than_so_many_are_probed_at_a_time() -> None:
    desk = Desk(most=10)
    desk.probing.look(many(50), desk.now)
    desk.now += 10
    probes = desk.begun()
    assert len(probes) == 10
    assert desk.probing.next() is None
    assert desk.begun() == []
    desk.probing.ended(probes[0], Result.OK, "", desk.now)
    assert len(desk.begun()) == 1


def test_those_that_hang_have_half_of_the_places_at_most() -> None:
    desk = Desk(most=10)
    slow = many(20)
    desk.probing.look(slow, desk.now)
    desk.now += 1
    while probes := desk.begun():
        for probe in probes:
            desk.probing.ended(probe, Result.TIMEOUT, "no answer", desk.now)
    desk.now += 10
    hanging = desk.begun()
    assert len(hanging) == 5
    assert desk.probing.next() is None
    desk.put(lease())
    probe = desk.next_probe()
    assert probe.lease.service == "app.example"
    desk.comes_to(Result.OK, probe=probe)
    desk.probing.ended(hanging[0], Result.OK, "", desk.now)  # it is well again, and no slow one
    [another] = desk.begun()
    assert another.was_slow


def test_probes_begin_at_a_bounded_rate_and_handshakes_count_more() -> None:
    begun = {}
    for tls in (False, True):
        desk = Desk()
        desk.probing.look(many(10_000, tls=tls), desk.now)
        desk.now += 10
        begun[tls] = 0
        for _ in range(100):
            for probe in desk.begun():
                begun[tls] += 1
                desk.probing.ended(probe, Result.OK, "", desk.now)
            at = desk.probing.next()
            assert at is not None
            assert at > desk.now
            desk.now += 0.01
    assert 2400 <= begun[False] <= 2600
    assert 480 <= begun[True] <= 520


def test_other_times_hold_for_all_that_wait() -> None:
    desk = Desk(interval=1000, fall=3)
    desk.put(lease(state=READY))
    desk.put(lease(state=READY, backend=Backend("::1", 81)))
    first, second = desk.begun()
    desk.comes_to(Result.OK, probe=first)
    desk.probing.configure(1000, 1, 2, desk.now)
    assert desk.probing.next() == pytest.approx(2000)
    desk.probing.configure(2, 1, 1, desk.now)
    assert desk.probing.next() == pytest.approx(1001)
    desk.comes_to(Result.OK, probe=second)
    assert desk.comes_to(Result.REFUSED) is not None


def test_a_lease_is_still_the_same_when_it_was_renewed_and_nothing_else() -> None:
    one = lease(since=5.0)
    assert is_still(one, replace(one, expires_at=7.0, weight=9))
    assert not is_still(one, None)
    assert not is_still(one, replace(one, since=6.0))
    assert not is_still(one, replace(one, state=READY))
    assert not is_still(one, replace(one, backend=Backend("::1", 80, tls_fingerprint="ab")))


# Services with words of their own


def test_a_service_is_judged_by_its_own_numbers_and_the_others_by_the_general_ones() -> None:
    desk = Desk(interval=5.0, rise=1, fall=3)
    desk.probing.overrule({"app.example": ServiceHealth(interval=60.0, rise=2, fall=1)}, desk.now)
    other = replace(lease(), service="other.example")
    for one in (lease(), other):
        desk.put(one)
    probes = {probe.lease.service: probe for probe in desk.begun()}
    assert desk.comes_to(Result.OK, probe=probes["app.example"]) is None
    verdict = desk.comes_to(Result.OK, probe=probes["other.example"])
    assert verdict is not None
    assert verdict.state is READY
    assert desk.probing.next() == 1005.0
    desk.end(desk.table["other.example", "::1", 80])
    assert desk.probing.next() == 1060.0
    assert desk.comes_to(Result.OK) is not None
    assert desk.state is READY
    assert desk.comes_to(Result.REFUSED) is not None
    assert desk.state is DOWN


def test_what_a_policy_leaves_open_is_general() -> None:
    desk = Desk(interval=5.0, rise=1, fall=2)
    desk.probing.overrule({"app.example": ServiceHealth(interval=7.0)}, desk.now)
    desk.put(lease())
    desk.comes_to(Result.OK)
    assert (desk.state, desk.probing.next()) == (READY, 1007.0)
    assert desk.comes_to(Result.REFUSED) is None
    assert desk.comes_to(Result.REFUSED) is not None


def test_an_interval_that_changes_holds_for_those_who_wait() -> None:
    desk = Desk(interval=60.0)
    desk.put(lease())
    desk.comes_to(Result.OK)
    assert desk.probing.next() == 1060.0
    desk.probing.overrule({"app.example": ServiceHealth(interval=2.0)}, desk.now)
    assert desk.probing.next() == 1001.0
    desk.probing.configure(5.0, 1, 3, desk.now)  # which is not its own
    desk.probing.overrule({"app.example": ServiceHealth(interval=2.0, fall=1)}, desk.now)
    assert desk.probing.next() == 1001.0
    running = desk.next_probe()
    desk.probing.overrule({}, desk.now)
    desk.comes_to(Result.OK, probe=running)
    assert desk.probing.next() == 1006.0
    desk.probing.overrule({"app.example": ServiceHealth(interval=60.0)}, desk.now)
    desk.probing.overrule({"app.example": ServiceHealth(interval=60.0)}, desk.now + 1)
    assert desk.probing.next() == 1031.0


def test_what_is_found_all_at_once_is_spread_over_no_more_than_the_services_interval() -> None:
    desk = Desk(interval=5.0)
    desk.chance = 1.0
    desk.probing.overrule({"app.example": ServiceHealth(interval=1.0)}, desk.now)
    found = [replace(lease(), instance_id=str(n), backend=Backend("::1", n)) for n in range(1, 1001)]
    desk.probing.look(found, desk.now)
    assert desk.probing.next() == 1001.0
