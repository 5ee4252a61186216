"""Probing against a model that remembers everything, and against a network of 10,000 backends."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portero_py.core.health import Evidence
from portero_py.core.model import Backend, Lease, LeaseState
from portero_py.core.probing import GAP, JITTER, MOST, RATE, SUSPICION, Kind, Probe, Probing, Result, Verdict

STARTING, READY, DOWN, DRAINING = LeaseState

INTERVAL, RISE, FALL, PLACES = 5.0, 2, 3, 3

PORTS = st.integers(1, 4)
RESULTS = st.sampled_from([Result.OK, Result.OK, Result.REFUSED, Result.TIMEOUT, Result.NO_VERDICT])


@dataclass
class Known:
    """What the model knows of one lease in one state."""

    lease: Lease
    results: list[bool] = field(default_factory=list)  # of the probes that began in it, and were verdicts
    suspected_at: float = float("-inf")
    has_evidence: bool = False
    evidence_since_begin: bool = False
    is_probed: bool = False

    def tail(self, wanted: bool) -> int:
        """How many of the last results were so."""
        return len(list(itertools.takewhile(lambda result: result is wanted, reversed(self.results))))


class Machine(RuleBasedStateMachine):
    """Leases come, drain and go, workers complain, probes end well or badly, verdicts are late or lost."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.serial = itertools.count()
        self.probing = Probing(INTERVAL, RISE, FALL, chance=random.Random(7).random, most=PLACES)
        self.known: dict[int, Known] = {}  # by port
        self.begun: list[tuple[Probe, Known | None]] = []
        self.verdicts: list[Verdict] = []

    # What happens

    @rule(port=PORTS, path=st.sampled_from(["", "/up"]))
    def register(self, port: int, path: str) -> None:
        one = Lease(
            *("app.example", f"i{next(self.serial)}", Backend("::1", port), 1e9, None, 1, path),
            state=STARTING if path else READY,
            since=self.now,
        )
        self.put(port, Known(one))

    @rule(port=PORTS)
    def renew(self, port: int) -> None:
        known = self.known.get(port)
        if known is not None:
            known.lease = replace(known.lease, expires_at=1e9 + next(self.serial))
            self.probing.see(("app.example", "::1", port), known.lease, self.now)

    @rule(port=PORTS)
    def end(self, port: int) -> None:
        self.known.pop(port, None)
        self.probing.see(("app.example", "::1", port), None, self.now)

    @rule(port=PORTS, state=st.sampled_from([DRAINING, READY]))
    def operate(self, port: int, state: LeaseState) -> None:
        known = self.known.get(port)
        if known is not None and known.lease.state is not state:
            self.turn_to(port, state)

    @rule(port=PORTS, hangs=st.booleans())
    def complain(self, port: int, hangs: bool) -> None:
        known = self.known.get(port)
        lease = None if known is None else known.lease
        self.probing.suspect(Evidence("app.example", "::1", port, hangs, "reset"), lease, self.now)
        if known is not None and known.lease.state is not DRAINING:
            known.suspected_at = self.now
            if known.lease.state is READY:
                known.has_evidence = known.evidence_since_begin = True

    @rule()
    def look(self) -> None:
        self.probing.look([known.lease for known in self.known.values()], self.now)

    @rule(seconds=st.floats(0.001, 2 * INTERVAL))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def wait_for_the_next(self) -> None:
        at = self.probing.next()
        if at is not None:
            self.now = max(self.now, at)

    @rule(most=st.integers(1, PLACES))
    def begin(self, most: int) -> None:
        for probe in self.probing.take(self.now, most):
            known = self.known[probe.lease.backend.port]
            assert probe.lease == known.lease
            assert probe.lease.state is not DRAINING
            assert not known.is_probed
            known.is_probed = True
            known.evidence_since_begin = False
            suspected = self.now <= known.suspected_at + SUSPICION + INTERVAL * (1 + JITTER)
            assert known.lease.health_path or known.lease.state is not READY or suspected
            assert (probe.kind is Kind.GET) == bool(known.lease.health_path)
            self.begun.append((probe, known))

    @precondition(lambda self: self.begun)
    @rule(which=st.integers(0, PLACES), result=RESULTS, carried_out=st.booleans())
    def finish(self, which: int, result: Result, carried_out: bool) -> None:
        probe, known = self.begun.pop(which % len(self.begun))
        verdict = self.probing.ended(probe, result, "no", self.now)
        if known is None or self.known.get(probe.lease.backend.port) is not known:
            assert verdict is None  # it was about another lease
            return
        known.is_probed = False
        assert (None if verdict is None else verdict.state) is self.expected(known, result)
        if verdict is not None:
            assert verdict.lease == known.lease
            if carried_out:
                self.turn_to(probe.lease.backend.port, verdict.state)

    # What must hold

    @invariant()
    def places_are_what_is_being_probed(self) -> None:
        assert self.probing.running == len(self.begun) <= PLACES

    @invariant()
    def nobody_is_forgotten(self) -> None:
        waiting = [known for known in self.known.values() if self.is_wanted(known) and not known.is_probed]
        slow = sum(probe.was_slow for probe, _ in self.begun)
        if waiting and len(self.begun) < PLACES and slow < PLACES // 2:
            at = self.probing.next()
            assert at is not None
            assert at <= self.now + INTERVAL * (1 + JITTER) + GAP

    # The model

    def is_wanted(self, known: Known) -> bool:
        state, path = known.lease.state, known.lease.health_path
        return state is not DRAINING and (bool(path) or state is not READY)

    def expected(self, known: Known, result: Result) -> LeaseState | None:
        if result is Result.NO_VERDICT:
            return None
        known.results.append(result is Result.OK)
        if result is Result.OK:
            known.has_evidence = known.has_evidence and known.evidence_since_begin
            return READY if known.lease.state is not READY and known.tail(True) >= RISE else None
        if known.lease.state is READY and (known.has_evidence or known.tail(False) >= FALL):
            return DOWN
        return None

    def turn_to(self, port: int, state: LeaseState) -> None:
        self.now += 0.001  # no two states of a lease begin at one time
        former = self.known[port]
        turned = Known(replace(former.lease, state=state, since=self.now))
        if DRAINING not in (state, former.lease.state):
            turned.suspected_at = former.suspected_at
        self.put(port, turned)

    def put(self, port: int, known: Known) -> None:
        self.known[port] = known
        self.probing.see(("app.example", "::1", port), known.lease, self.now)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestProbingAgainstItsModel = Machine.TestCase


# A network


class Network:
    """Backends that answer after a while, and the loop of a shell, in a time of its own."""

    def __init__(self, interval: float, leases: list[Lease], takes: dict[int, float], timeout: float) -> None:
        self.now = 0.0
        self.began: dict[int, list[float]] = {}  # by port
        self.most_running = 0
        self.most_at_once = 0
        chance = random.Random(42)
        self._probing = Probing(interval, 1, 3, chance=chance.random)
        self._takes = takes
        self._timeout = timeout
        self._chance = chance
        self._on_the_way: list[tuple[float, int, Probe]] = []
        self._serial = itertools.count()
        self._leases = {lease.backend.port: lease for lease in leases}
        self._probing.look(leases, 0.0)

    def run(self, until: float) -> None:
        while self.now < until:
            at_once = 0
            while probes := self._probing.take(self.now, 8):
                at_once += len(probes)
                for probe in probes:
                    self._begin(probe)
            self.most_at_once = max(self.most_at_once, at_once)
            times = [self._probing.next() or until, until]
            if self._on_the_way:
                times.append(self._on_the_way[0][0])
            self.now = max(min(times), self.now + 0.001)
            while self._on_the_way and self._on_the_way[0][0] <= self.now:
                self._end(heapq.heappop(self._on_the_way)[2])

    def _begin(self, probe: Probe) -> None:
        port = probe.lease.backend.port
        self.began.setdefault(port, []).append(self.now)
        self.most_running = max(self.most_running, self._probing.running)
        takes = self._takes.get(port, self._chance.uniform(0.001, 0.02))
        ends = self.now + min(takes, self._timeout)
        heapq.heappush(self._on_the_way, (ends, next(self._serial), probe))

    def _end(self, probe: Probe) -> None:
        port = probe.lease.backend.port
        result = Result.TIMEOUT if self._takes.get(port, 0.0) >= self._timeout else Result.OK
        verdict = self._probing.ended(probe, result, "no answer", self.now)
        if verdict is not None:
            turned = replace(verdict.lease, state=verdict.state, since=self.now)
            self._leases[port] = turned
            self._probing.see(("app.example", "::1", port), turned, self.now)

    def states(self, ports: range) -> set[LeaseState]:
        return {self._leases[port].state for port in ports}


def fleet(count: int, state: LeaseState) -> list[Lease]:
    return [
        Lease(*("app.example", str(port), Backend("::1", port), 1e9, None), health_path="/up", state=state)
        for port in range(count)
    ]


@pytest.mark.parametrize("state", [STARTING, READY])
def test_10_000_backends_are_each_probed_in_time_and_never_in_a_burst(state: LeaseState) -> None:
    network = Network(INTERVAL, fleet(10_000, state), {}, 2.0)
    network.run(4 * INTERVAL)
    assert len(network.began) == 10_000
    assert max(times[0] for times in network.began.values()) <= 1.2 * INTERVAL
    pauses = [
        later - earlier for times in network.began.values() for earlier, later in itertools.pairwise(times)
    ]
    assert max(pauses) <= 1.2 * INTERVAL
    assert min(pauses) >= 0.8 * INTERVAL
    assert network.most_running <= MOST
    assert network.most_at_once <= RATE / 25
    assert network.states(range(10_000)) == {READY}


def test_2_000_that_hang_are_down_and_keep_none_of_the_others_waiting() -> None:
    hanging = dict.fromkeys(range(2000), 100.0)
    network = Network(INTERVAL, fleet(4000, READY), hanging, 2.0)
    network.run(100.0)
    assert network.states(range(2000)) == {DOWN}
    assert network.states(range(2000, 4000)) == {READY}
    assert network.most_running <= MOST
    late = [
        later - earlier
        for port in range(2000, 4000)
        for earlier, later in itertools.pairwise(network.began[port])
        if earlier > 30.0  # when it is known who hangs
    ]
    assert max(late) <= 1.2 * INTERVAL
