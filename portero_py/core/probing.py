"""Which backends are probed, when, and what follows from what came of it.

The caller tells what the routing table has (`look`, `see`), what a worker met (`suspect`) and what became of
a probe (`ended`). It asks when to come back (`next`) and what to begin then (`take`), and carries out the
verdicts.

The rules
- What is probed is an address of a service, on the terms of its entry in the table. Draining ones are not.
- With a health path: the first time at once, then each interval, for as long as the lease is there.
- Without one: while it is down, and for `SUSPICION` seconds after a worker saw it fail (as long as workers
  pass it over at most), until it is ready again. A connection is enough, but not from one that hangs: the
  kernel takes connections for a process that is stopped. It has to answer something. So has one that is
  down for a reason that nobody here has seen (another control process may have).
- `rise` successes in a row make it READY that was STARTING or DOWN. `fall` failures in a row make it DOWN
  that was READY, and one is enough after a worker said that it fails: that one has seen the others.
- A verdict is about a lease as it was when the probe began. Who moved, came back, drained or changed its
  health path is somebody else since then (`is_still`), and what comes of an old probe says nothing about it.
- What was in the way here (no descriptors, a process that stood still) is no verdict.

Interval, `rise` and `fall` are the general ones, where a service has none of its own (`overrule`).

Nobody waits for others. At most `most` are probed at a time. Those that let the last probe wait until its end
have half of these places at most, so that thousands of black holes do not keep one healthy backend waiting.
Times are jittered; what is found all at once, at a start, is spread over an interval. Probes begin at most
`RATE` times a second, where one with TLS counts `TLS_COST`: many backends make the interval longer, not the
load heavier.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

from portero_py.core.expiry_queue import ExpiryQueue
from portero_py.core.health import Evidence
from portero_py.core.model import Lease, LeaseState
from portero_py.core.policies import ServiceHealth

#: Most probes at a time.
MOST: Final = 256

#: Probes that begin in a second, at most: they cost 150 to 200 µs each, on loopback.
RATE: Final = 2500.0
#: How many others one with a TLS handshake is worth: it costs 1 ms.
TLS_COST: Final = 5.0
#: Seconds' worth of probes that may begin at once.
BURST: Final = 0.02

#: Of what is found all at once, so many a second begin, if an interval is long enough for that.
FOUND_RATE: Final = 500.0

#: Seconds for which one without a health path is probed after a worker saw it fail.
SUSPICION: Final = 90.0

#: Seconds between probes that workers ask for: they may do so many times a second.
GAP: Final = 0.5

#: Seconds for which the last error of one that is well again is remembered.
MEMORY: Final = 300.0

#: The part of the interval by which a probe may be early or late.
JITTER: Final = 0.1

#: The longest text of an error.
MAX_TEXT: Final = 200

#: The policy that says nothing about health.
NO_WORD: Final = ServiceHealth()

Number = TypeVar("Number", int, float)

#: A service, and a host and port that serve it.
Place = tuple[str, str, int]


class Kind(Enum):
    """What is asked of a backend."""

    GET = "GET"  # its health path: 2xx is a success
    ASK = "OPTIONS"  # `*`: any answer is one
    CONNECT = "connect"  # with the TLS handshake where it speaks TLS


class Result(Enum):
    """What came of a probe: the label of `portero_probes_total`."""

    OK = "ok"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    TLS = "tls"
    CLOSED = "closed"  # by the backend, before its answer was there
    BAD_STATUS = "bad_status"
    BAD_RESPONSE = "bad_response"
    NO_VERDICT = "no_verdict"  # something here was in the way


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """One to begin now. Give it back to `ended`, once, whatever comes of it."""

    lease: Lease
    kind: Kind
    subject: _Subject
    was_slow: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Let the backend of `lease` be in `state`, if that is still the lease there (`is_still`)."""

    lease: Lease
    state: LeaseState
    why: str


class Probing:
    """Who is due, and what is known of each. Times are seconds of the registry's clock.

    `chance` gives numbers from 0 to 1.
    """

    def __init__(
        self,
        interval: float,
        rise: int,
        fall: int,
        *,
        chance: Callable[[], float],
        most: int = MOST,
    ) -> None:
        self._interval = interval
        self._rise = rise
        self._fall = fall
        self._own: Mapping[str, ServiceHealth] = {}
        self._chance = chance
        self._most = most
        self._subjects: dict[Place, _Subject] = {}
        # Each subject that is not being probed is due in one of these.
        self._due: ExpiryQueue[Place] = ExpiryQueue()
        self._slow_due: ExpiryQueue[Place] = ExpiryQueue()
        self._running = 0
        self._slow_running = 0
        self._free_at = float("-inf")  # when the rate lets the next one begin

    @property
    def running(self) -> int:
        """How many are being probed."""
        return self._running

    def configure(self, interval: float, rise: int, fall: int, now: float) -> None:
        """Go by these from now on."""
        self._rise = rise
        self._fall = fall
        former, self._interval = self._interval, interval
        if interval != former:
            self._again(lambda service: _or(self._of(service).interval, former), now)

    def overrule(self, own: Mapping[str, ServiceHealth], now: float) -> None:
        """For these services, go by what their policies say, as far as they say anything."""
        former, self._own = self._own, own
        changed = {service for service in {**former, **own} if former.get(service) != own.get(service)}
        if changed:
            self._again(
                lambda service: _or(former.get(service, NO_WORD).interval, self._interval), now, changed
            )

    def look(self, leases: Iterable[Lease], now: float) -> None:
        """These are all entries of the table."""
        gone = set(self._subjects)
        found = []
        for lease in leases:
            place = _place(lease)
            gone.discard(place)
            if self._see(place, lease, now):
                found.append(place)
        for place in gone:
            self._forget(place)
        for place in found:
            spread = min(self._interval_of(place[0]), len(found) / FOUND_RATE)
            self._wait(self._subjects[place], now + self._chance() * spread)

    def see(self, place: Place, lease: Lease | None, now: float) -> None:
        """What the table has at `place`, as it may have changed."""
        if self._see(place, lease, now):
            self._wait(self._subjects[place], now)

    def suspect(self, evidence: Evidence, lease: Lease | None, now: float) -> None:
        """A worker saw a backend fail too often; `lease` is what the table has there."""
        if lease is None or lease.state is LeaseState.DRAINING:
            return
        place = _place(lease)
        self.see(place, lease, now)
        subject = self._subjects.get(place)
        if subject is None:
            subject = self._subjects[place] = _Subject(lease)
        subject.until = now + SUSPICION
        subject.hangs = subject.hangs or evidence.hangs
        subject.remember(f"worker: {evidence.error}", now)
        if lease.state is LeaseState.READY:
            subject.evidence = subject.error
            if subject.is_running:
                subject.is_asked_again = True
            else:
                self._wait(subject, max(now, subject.began + GAP))

    def next(self) -> float | None:
        """When to call `take`; None while nobody is due, or all places are taken."""
        if self._running >= self._most:
            return None
        times = [at for at in (queue.next() for queue in self._queues()) if at is not None]
        return max(min(times), self._free_at) if times else None

    def take(self, now: float, most: int) -> list[Probe]:
        """At most so many that are to begin now."""
        begun: list[Probe] = []
        while len(begun) < most and self._running < self._most and self._free_at <= now:
            subject = self._pop(now)
            if subject is None:
                break
            begun.append(self._begin(subject, now))
        return begun

    def ended(self, probe: Probe, result: Result, said: str, now: float) -> Verdict | None:
        """What came of a probe, `said` for people; what follows from it."""
        self._running -= 1
        self._slow_running -= probe.was_slow
        subject = probe.subject
        place = _place(subject.lease)
        if self._subjects.get(place) is not subject:
            return None  # it was another lease, see above
        subject.is_running = False
        subject.is_slow = result is Result.TIMEOUT
        verdict = None
        if result is Result.OK:
            verdict = self._succeeded(subject, now)
        elif result is Result.NO_VERDICT:
            subject.remember(f"probe: {said}", now)
        else:
            verdict = self._failed(subject, f"probe: {said}", now)
        if not subject.is_wanted(now):
            self._forget(place)
        elif subject.is_asked_again:
            subject.is_asked_again = False
            self._wait(subject, max(now, subject.began + GAP))
        else:
            interval = self._interval_of(place[0])
            jittered = interval * (1 - JITTER + 2 * JITTER * self._chance())
            self._wait(subject, max(subject.began + jittered, now + JITTER * interval))
        return verdict

    def error_at(self, place: Place) -> str:
        """The last thing that went wrong there, by a probe or a worker; "" when nothing did lately."""
        subject = self._subjects.get(place)
        return "" if subject is None else subject.error

    # Private

    def _see(self, place: Place, lease: Lease | None, now: float) -> bool:
        """Whether there is somebody to probe who was not there before."""
        former = self._subjects.get(place)
        if lease is None or lease.state is LeaseState.DRAINING:
            if former is not None:
                self._forget(place)
            return False
        if former is not None and is_still(former.lease, lease):
            former.lease = lease
            return False
        subject = _Subject(lease)
        goes_on = former is not None and _is_same_backend(former.lease, lease)
        if former is not None and goes_on:
            subject.inherit(former)
        elif lease.state is LeaseState.DOWN:
            subject.hangs = True  # for all that is known here
        if not subject.is_wanted(now):
            if former is not None:
                self._forget(place)
            return False
        self._subjects[place] = subject
        # In another state it is due when it was, unless it was being probed: that will tell nothing now.
        return former is None or not goes_on or former.is_running

    def _of(self, service: str) -> ServiceHealth:
        """What the policy of a service says."""
        return self._own.get(service, NO_WORD)

    def _interval_of(self, service: str) -> float:
        return _or(self._of(service).interval, self._interval)

    def _again(
        self, former: Callable[[str], float], now: float, services: Container[str] | None = None
    ) -> None:
        """Of these services, or all: whose interval was another one is due within the one that it has now."""
        for place, subject in self._subjects.items():
            service = place[0]
            if subject.is_running or (services is not None and service not in services):
                continue
            interval = self._interval_of(service)
            if interval != former(service):
                self._wait(subject, now + self._chance() * interval)

    def _wait(self, subject: _Subject, at: float) -> None:
        place = _place(subject.lease)
        queue, other = self._due, self._slow_due
        if subject.is_slow:
            queue, other = other, queue
        other.discard(place)
        queue.set(place, at)

    def _forget(self, place: Place) -> None:
        del self._subjects[place]
        self._due.discard(place)
        self._slow_due.discard(place)

    def _queues(self) -> list[ExpiryQueue[Place]]:
        """Those of which somebody may begin."""
        if self._slow_running < self._most // 2:
            return [self._due, self._slow_due]
        return [self._due]

    def _pop(self, now: float) -> _Subject | None:
        """Whoever has been due for longest; None when nobody is."""
        due = [(at, queue) for queue in self._queues() if (at := queue.next()) is not None]
        at, queue = min(due, key=_time, default=(now, None))
        place = None if queue is None or at > now else queue.first()
        if queue is None or place is None:
            return None
        queue.discard(place)
        return self._subjects[place]

    def _begin(self, subject: _Subject, now: float) -> Probe:
        lease = subject.lease
        self._running += 1
        self._slow_running += subject.is_slow
        cost = TLS_COST if lease.backend.use_tls else 1.0
        self._free_at = max(self._free_at, now - BURST) + cost / RATE
        subject.is_running = True
        subject.began = now
        unnamed = Kind.ASK if subject.hangs else Kind.CONNECT
        return Probe(lease, Kind.GET if lease.health_path else unnamed, subject, subject.is_slow)

    def _succeeded(self, subject: _Subject, now: float) -> Verdict | None:
        subject.failures = 0
        subject.successes += 1
        if not subject.is_asked_again:
            subject.evidence = ""
        if subject.error and now - subject.failed_at > MEMORY:
            subject.error = ""
        if subject.lease.state is LeaseState.READY or subject.successes < _or(
            self._of(subject.lease.service).rise, self._rise
        ):
            return None
        subject.until = now  # the workers forget what they have against it
        return Verdict(subject.lease, LeaseState.READY, f"{_probes(subject.successes)} succeeded")

    def _failed(self, subject: _Subject, said: str, now: float) -> Verdict | None:
        subject.successes = 0
        subject.failures += 1
        subject.remember(said, now)
        if subject.lease.state is not LeaseState.READY:
            return None
        if subject.evidence:
            return Verdict(subject.lease, LeaseState.DOWN, f"{subject.error} ({subject.evidence})")
        if subject.failures < _or(self._of(subject.lease.service).fall, self._fall):
            return None
        why = f"{_probes(subject.failures)} failed, {subject.error}"
        return Verdict(subject.lease, LeaseState.DOWN, why)


def is_still(former: Lease, lease: Lease | None) -> bool:
    """Whether `lease` is the `former` one, in the same state since then; it may have been renewed."""
    return (
        lease is not None
        and _is_same_backend(former, lease)
        and (former.state, former.since) == (lease.state, lease.since)
    )


# Private


class _Subject:
    """One lease at one address in one state: what the probes of it showed."""

    __slots__ = (
        "began",
        "error",
        "evidence",
        "failed_at",
        "failures",
        "hangs",
        "is_asked_again",
        "is_running",
        "is_slow",
        "lease",
        "successes",
        "until",
    )

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.successes = 0  # in a row
        self.failures = 0
        self.evidence = ""  # what a worker saw that no success has answered since
        self.until = float("-inf")  # when nobody suspects it any more
        self.hangs = False
        self.error = ""
        self.failed_at = float("-inf")
        # of the last probe
        self.began = float("-inf")
        self.is_running = False
        self.is_slow = False  # it used up its time
        self.is_asked_again = False  # a worker saw something since it began

    def inherit(self, former: _Subject) -> None:
        """Remember what another state of the same lease does not change."""
        self.until = former.until
        self.hangs = former.hangs
        self.error = former.error
        self.failed_at = former.failed_at
        self.began = former.began
        self.is_slow = former.is_slow

    def remember(self, error: str, now: float) -> None:
        self.error = error[:MAX_TEXT]
        self.failed_at = now

    def is_wanted(self, now: float) -> bool:
        """Whether there is a reason to probe it."""
        return bool(self.lease.health_path) or self.lease.state is not LeaseState.READY or now < self.until


def _is_same_backend(one: Lease, other: Lease) -> bool:
    return (one.instance_id, one.backend, one.health_path) == (
        other.instance_id,
        other.backend,
        other.health_path,
    )


def _place(lease: Lease) -> Place:
    return lease.service, lease.backend.host, lease.backend.port


def _or(own: Number | None, general: Number) -> Number:
    return general if own is None else own


def _time(due: tuple[float, ExpiryQueue[Place]]) -> float:
    return due[0]


def _probes(count: int) -> str:
    return "a probe" if count == 1 else f"{count} probes"
