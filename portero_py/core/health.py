"""What a worker itself saw of its backends: marks, ejections and their trials.

The rules
- A mark belongs to one worker and to one backend of one service: the same address may be well for one service
  and broken for another. It is found by service and instance id, whose hashes are at hand, and it counts only
  while that instance is at that address and in that state: who comes back elsewhere, or was DOWN in between,
  begins anew.
- Only what is wrong is marked. As long as nobody has a mark, all of this is an empty dictionary.
- `fall` failures in a row eject a backend that is READY: it is passed over for 1, 2, 4 .. 60 s. At the end
  of a pause one exchange tries it, and while that trial goes on the others pass it over still. A trial that
  fails doubles the pause; one that ends without a verdict (its client left) lets the next exchange try. A
  success, of whichever exchange, ends the ejection. A trial that takes longer than LONGEST_TRIAL (a client
  that sends its body slowly) lets another exchange try too: nobody keeps a backend out.
- How long the pauses have become is forgotten when it has been well for FORGIVEN_AFTER: at once, and a
  backend that comes and goes would always get the shortest.
- Many exchanges may be at a backend when it breaks: they are one series. What fails while it is ejected
  counts for nothing, nor does what began before it came back.
- Never more than half of a service's READY backends are ejected at a time, rounded down: the only one is
  tried. When the others leave, those come back whose pause would have ended first.
- Who is slow has not failed: nobody is ejected for it. `fall` requests in a row that waited for as long as a
  probe may take, and no answer in between, are a reason to ask control for a probe, no more.
- A failure that took its time cost a client that time. The pause of who hangs, or cannot be reached in time,
  lasts until control's probe has surely spoken: a client is not to be the probe.

Nothing is done here: `failed` and `succeeded` say what has become of the backend, their caller tells control
and the log. Who is passed over is decided by the marks (`balancing/choice`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from portero_py.core.model import Backend, Lease, LeaseState, Service
from portero_py.core.routing_table import RoutingTable

#: Seconds of the first pause; each that follows is twice as long.
FIRST_PAUSE: Final = 1.0
#: Seconds of the longest pause.
LONGEST_PAUSE: Final = 60.0
#: Seconds for which a backend has to be well until its next pause is a first one again.
FORGIVEN_AFTER: Final = 60.0
#: Seconds after which a trial that goes on does not keep others from trying.
LONGEST_TRIAL: Final = 60.0
#: Seconds until control is told again of a backend that cannot be ejected and goes on failing.
TOLD_AGAIN_AFTER: Final = 1.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a worker tells control when a backend has failed it, or kept it waiting, too often in a row.

    `hangs`: it takes connections and does not answer, so that a connection to it proves nothing.
    """

    service: str
    host: str
    port: int
    hangs: bool
    error: str


class Failure(Enum):
    """What a failure cost. PROMPT: no time. UNREACHABLE: no connection in time. HANGS: no answer in time."""

    PROMPT = "prompt"
    UNREACHABLE = "unreachable"
    HANGS = "hangs"


class Condition(Enum):
    """What a worker makes of a backend. TRIED: ejected, and the exchange that is its trial goes on."""

    WELL = "well"
    EJECTED = "ejected"
    TRIED = "tried"


_WELL, _EJECTED, _TRIED = Condition
_READY: Final = LeaseState.READY

#: The steps that may happen.
TRANSITIONS: Final[Mapping[Condition, frozenset[Condition]]] = {
    _WELL: frozenset({_EJECTED}),
    _EJECTED: frozenset({_WELL, _TRIED}),
    _TRIED: frozenset({_WELL, _EJECTED, _TRIED}),
}


class Verdict(NamedTuple):
    """What a failure did: the seconds of the pause that it began, or 0.0; whether control is to know."""

    pause: float
    is_again: bool  # it was ejected before, and its trial has failed
    is_evidence: bool


_NOTHING: Final = Verdict(0.0, False, False)


class Mark:
    """What is wrong, or was, with the backend of `lease`."""

    __slots__ = (
        "backend",
        "condition",
        "ejected_at",
        "error",
        "failure",
        "failures",
        "pause",
        "returned_at",
        "since",
        "slow",
        "state",
        "told_at",
        "tried_until",
        "until",
    )

    def __init__(self, lease: Lease) -> None:
        self.backend: Backend = lease.backend
        self.state: LeaseState = lease.state
        self.since: float = lease.since
        self.condition: Condition = _WELL
        self.failures = 0  # in a row
        self.failure: Failure = Failure.PROMPT  # what they cost
        self.slow = 0  # requests that waited for long, and no answer since the first of them
        self.error = ""  # the last one's
        self.pause = 0.0  # the last one's seconds; 0.0: it was never ejected
        self.until = 0.0  # its end
        self.tried_until = 0.0  # when another exchange may try it, though the trial goes on
        self.ejected_at = 0.0  # when the first of the pauses began
        self.returned_at = 0.0  # when the last of them ended
        self.told_at = float("-inf")

    @property
    def is_ejected(self) -> bool:
        """Whether it is passed over."""
        return self.condition is not _WELL

    @property
    def hangs(self) -> bool:
        """Whether a connection to it proves nothing."""
        return self.failure is Failure.HANGS

    def is_due(self, now: float) -> bool:
        """Whether an exchange is to try it."""
        if self.condition is _TRIED:
            return now >= self.tried_until
        return self.condition is _EJECTED and now >= self.until

    def is_of(self, lease: Lease) -> bool:
        """Whether it says anything of `lease`: no other address, no other state in between."""
        return self.backend == lease.backend and self.since == lease.since and self.state is lease.state


class Health:
    """The marks of one worker. To be configured before the first failure.

    `marks` and `ejected` are service -> instance id -> mark; who is ejected is in both. They are read on the
    way of requests and written here only; they stay the same two objects.
    """

    __slots__ = ("_fall", "_probe_seconds", "_statuses", "ejected", "marks")

    def __init__(self) -> None:
        self.marks: dict[str, dict[str, Mark]] = {}
        self.ejected: dict[str, dict[str, Mark]] = {}
        self._statuses: Collection[int] = ()
        self._fall = 3
        self._probe_seconds = 0.0

    def __len__(self) -> int:
        return sum([len(marks) for marks in self.marks.values()])

    def configure(self, fall: int, probe_seconds: float, statuses: Collection[int]) -> None:
        """Eject after `fall` failures; a probe takes `probe_seconds`; answers of `statuses` are failures.

        As far as the policy of a service does not say otherwise.
        """
        self._fall = fall
        self._probe_seconds = probe_seconds
        self._statuses = statuses

    def is_failure(self, service: Service | None, status: int) -> bool:
        """Whether an answer with `status` is a failure of who serves `service`."""
        own = None if service is None or service.policy is None else service.policy.health
        return status in (self._statuses if own is None or own.statuses is None else own.statuses)

    def of(self, lease: Lease) -> Mark | None:
        """The mark of the backend that holds `lease`, or None when there is nothing to say about it."""
        marks = self.marks.get(lease.service)
        mark = None if marks is None else marks.get(lease.instance_id)
        return mark if mark is None or mark.is_of(lease) else None

    def by_backend(self, service: str = "") -> dict[tuple[str, str, int], Mark]:
        """All marks of a service, or of all (""), by service, host and port."""
        names = (service,) if service else self.marks
        return {
            (name, mark.backend.host, mark.backend.port): mark
            for name in names
            for mark in self.marks.get(name, {}).values()
        }

    def failed(
        self,
        lease: Lease,
        service: Service | None,
        failure: Failure,
        error: str,
        *,
        began: float,
        now: float,
        trial: Mark | None = None,
    ) -> Verdict:
        """A try that began at `began` has failed.

        `service` is the one of `lease` as it is now, or None; `trial` the mark that the exchange was to try.
        """
        mark = self._mark(lease)
        if failure is Failure.PROMPT:
            mark.slow = 0
        if mark.condition is not _WELL:
            if trial is not mark:
                return _NOTHING
        elif began < mark.returned_at:
            return _NOTHING
        if not mark.failures or failure is not Failure.UNREACHABLE or mark.failure is not Failure.HANGS:
            mark.failure = failure  # who does not answer takes no connection either, after a while
        mark.failures += 1
        mark.error = error
        if mark.condition is _WELL:
            if mark.failures < self._fall_of(service):
                return _NOTHING
            if service is None or not self._may_be_ejected(lease, service, now):
                is_news = now >= mark.told_at + TOLD_AGAIN_AFTER
                if is_news:
                    mark.told_at = now
                return Verdict(0.0, False, is_news)
        return self._eject(lease, mark, service, now)

    def slow(self, lease: Lease, service: Service | None = None) -> bool:
        """A request has waited for as long as a probe may take: whether so many did that one is due.

        `service` is the one of `lease` as it is now, or None.
        """
        mark = self.marks.get(lease.service, {}).get(lease.instance_id)
        if mark is None:
            mark = self._mark(lease)
        elif mark.is_ejected or not mark.is_of(lease):
            return False
        mark.slow += 1
        return mark.slow >= self._fall_of(service)

    def succeeded(self, lease: Lease, now: float) -> float:
        """It has answered: it is well. Returns for how long it had been ejected, or 0.0."""
        mark = self.of(lease)
        if mark is None:
            return 0.0
        mark.failures = mark.slow = 0
        if mark.condition is not _WELL:
            self._let_in(lease.service, lease.instance_id, mark, now)
            return now - mark.ejected_at
        if not mark.pause or now >= mark.returned_at + FORGIVEN_AFTER:
            self._forget(lease.service, lease.instance_id)
        return 0.0

    def begin_trial(self, lease: Lease, now: float) -> Mark | None:
        """An exchange goes to `lease`. When that is a trial, its mark: `end_trial` with it in any case."""
        mark = self.of(lease)
        if mark is None or not mark.is_due(now):
            return None
        mark.condition = _TRIED
        mark.tried_until = now + LONGEST_TRIAL
        return mark

    def end_trial(self, mark: Mark) -> None:
        """The exchange that was the trial is over: without a verdict, the next one may try."""
        if mark.condition is _TRIED:
            mark.condition = _EJECTED

    def follow(self, service: Service, now: float) -> None:
        """Forget who is not in `service` any more, or was elsewhere, and let those in who are too many.

        It looks at all leases of a service of which any backend has a mark: once for each Service.
        """
        marks = self.marks.get(service.name)
        if marks is None:
            return
        there = {lease.instance_id: lease for lease in service.leases}
        for key, mark in list(marks.items()):
            if key not in there or not mark.is_of(there[key]):
                self._forget(service.name, key)
        out, allowed = self._out(service, now)
        if len(out) > allowed:
            for key in sorted(out, key=lambda key: out[key].until)[: len(out) - allowed]:
                self._let_in(service.name, key, out[key], now)
                out[key].failures = self._fall_of(service) - 1  # one more, and it is out again if it may

    def retain(self, table: RoutingTable, now: float) -> None:
        """Forget the marks of backends that `table` does not have. Costs nothing while there are none.

        With marks it looks at all leases of the services that have some: not for every table, when they come
        by the thousand.
        """
        for name in list(self.marks):
            service = table.services.get(name)
            if service is not None:
                self.follow(service, now)
            else:
                del self.marks[name]
                self.ejected.pop(name, None)

    # Private

    def _mark(self, lease: Lease) -> Mark:
        mark = self.of(lease)
        if mark is None:
            self._forget(lease.service, lease.instance_id)
            mark = Mark(lease)
            self.marks.setdefault(lease.service, {})[lease.instance_id] = mark
        return mark

    def _may_be_ejected(self, lease: Lease, service: Service, now: float) -> bool:
        self.follow(service, now)
        if lease.state is not _READY or self.of(lease) is None:  # it has left, or moved
            return False
        out, allowed = self._out(service, now)
        return len(out) < allowed

    def _out(self, service: Service, now: float) -> tuple[dict[str, Mark], int]:
        """Who of the service is ejected, and how many may be."""
        ready = [lease for lease in service.leases if lease.state is _READY and now < lease.serves_until]
        ejected = self.ejected.get(service.name, {})
        out = {
            lease.instance_id: ejected[lease.instance_id] for lease in ready if lease.instance_id in ejected
        }
        return out, len(ready) // 2

    def _fall_of(self, service: Service | None) -> int:
        own = None if service is None or service.policy is None else service.policy.health
        return self._fall if own is None or own.fall is None else own.fall

    def _eject(self, lease: Lease, mark: Mark, service: Service | None, now: float) -> Verdict:
        is_again = mark.condition is not _WELL
        if not is_again:
            mark.ejected_at = now
            if now >= mark.returned_at + FORGIVEN_AFTER:
                mark.pause = 0.0
        mark.condition = _EJECTED
        mark.pause = min(2 * mark.pause, LONGEST_PAUSE) or FIRST_PAUSE
        seconds = mark.pause
        if mark.failure is not Failure.PROMPT:
            own = None if service is None or service.policy is None else service.policy.health
            probe_seconds = self._probe_seconds if own is None or own.timeout is None else own.timeout
            seconds = max(seconds, probe_seconds + 1.0)
        mark.until = now + seconds
        mark.told_at = now
        self.ejected.setdefault(lease.service, {})[lease.instance_id] = mark
        return Verdict(seconds, is_again, True)

    def _let_in(self, service: str, key: str, mark: Mark, now: float) -> None:
        mark.condition = _WELL
        mark.returned_at = now
        _drop(self.ejected, service, key)

    def _forget(self, service: str, key: str) -> None:
        _drop(self.marks, service, key)
        _drop(self.ejected, service, key)


def _drop(marks: dict[str, dict[str, Mark]], service: str, key: str) -> None:
    held = marks.get(service)
    if held is not None and held.pop(key, None) is not None and not held:
        del marks[service]
