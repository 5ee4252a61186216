"""What portero has promised: leases that it granted, certificates that it was given.

The theory of leases
- A lease is *sure* from the answer 200 until its time-to-live after the request was **sent**, or until its
  release (or a renewal that shortens it) is **sent**. In that time it must be in the table, whatever died.
- It is *possible* from the first request on, until its time-to-live after the last request that may have
  reached the registry was **answered or given up**, or until a release was answered with 200.
- In between (a request without an answer, a release without one) nobody can say, and nothing is asserted.
  Whoever asks waits longer than control is ever stopped: what he gave up died with the process.
- All of this is asked when a thing is seen, not later: the ledger knows the present only.

The theory of certificates
- A name presents the last good pair that was seen, whatever came behind it; a name whose files were taken
  away presents the default certificate.
- A pair that lay there for `LAG` seconds in which control could look has been seen. One that was spoilt
  sooner may have been, or not: then the one before it is right, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tests.slow.chaos_journal import Journal, now

#: Seconds in which a changed certificate must be in use: a burst of changes, a second look, a busy machine.
LAG: Final = 6.0

#: Seconds by which the proxy may be late in forgetting a lease that has ended.
SWEEP: Final = 2.0

#: The serial number that stands for the default certificate.
DEFAULT: Final = 0

Name = tuple[str, str]  # service, instance id


@dataclass
class Lease:
    """One promise. Times are of the run's clock."""

    name: Name
    port: int
    sure_from: float = 0.0
    sure_until: float = 0.0  # 0: nothing is sure
    maybe_until: float = 0.0
    is_asked: bool = False  # a registration is under way

    def is_sure(self, begun: float, ended: float) -> bool:
        """Whether it was so all that time."""
        return self.sure_until > ended and self.sure_from <= begun


class Leases:
    """The promises of one run, by name."""

    def __init__(self) -> None:
        self.granted = 0
        self._leases: dict[Name, Lease] = {}

    def asked(self, name: Name, port: int, ttl: float) -> float:
        """A registration is about to be sent: returns the time, for `answered`."""
        at = now()
        lease = self._leases.setdefault(name, Lease(name, port))
        if lease.port != port:  # it moves: where it is until the answer, nobody knows
            lease.sure_until, lease.port = 0.0, port
        # A renewal may shorten a lease, and may have done so when its answer is never seen.
        lease.sure_until = min(lease.sure_until, at + ttl)
        lease.is_asked = True
        return at

    def answered(self, name: Name, asked: float, ttl: float, *, granted: bool) -> None:
        """It was granted, or nobody knows what became of it."""
        at, lease = now(), self._leases[name]
        lease.is_asked = False
        lease.maybe_until = max(lease.maybe_until, at + ttl)
        if granted:
            self.granted += 1
            if lease.sure_until < at:
                lease.sure_from = at
            lease.sure_until = asked + ttl

    def releasing(self, name: Name) -> float:
        """Its release is about to be sent; returns until when it was sure."""
        lease = self._leases[name]
        sure_until, lease.sure_until = lease.sure_until, 0.0
        return sure_until

    def released(self, name: Name) -> None:
        """Its release was answered: it is gone."""
        lease = self._leases[name]
        lease.sure_until, lease.maybe_until = 0.0, now()

    # What the judge asks

    def sure(self, begun: float, ended: float) -> list[Lease]:
        """Those that must have been in the table all that time."""
        return [lease for lease in self._leases.values() if lease.is_sure(begun, ended)]

    def covers(self, service: str, begun: float, ended: float) -> bool:
        """Whether any lease of the service was sure all that time."""
        return any(lease.is_sure(begun, ended) for name, lease in self._leases.items() if name[0] == service)

    def lost(self, listed: Iterable[Name], begun: float, ended: float) -> list[Lease]:
        """What a list that was asked for and answered in that time should have had."""
        found = set(listed)
        return [lease for lease in self.sure(begun, ended) if lease.name not in found]

    def undead(self, listed: Iterable[Name], begun: float) -> list[Name]:
        """What a list that was asked for at `begun` should not have had any more."""
        found = []
        for name in listed:
            lease = self._leases.get(name)
            if lease is None or (not lease.is_asked and lease.maybe_until + SWEEP < begun):
                found.append(name)
        return found

    def last_of(self, service: str) -> str:
        """What is known of a service's leases, for people."""
        return "; ".join(
            f"{lease.name[1]}: sure for {lease.sure_until - now():.1f} s, granted at {lease.sure_from:.1f}"
            for name, lease in self._leases.items()
            if name[0] == service
        )


@dataclass
class _Promise:
    serial: int
    since: float
    until: float = math.inf  # when the files were changed again, for better or worse


class Certificates:
    """Which serial numbers a name may present."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._names: dict[str, list[_Promise]] = {}

    def promise(self, name: str, serial: int) -> None:
        """From now on it should be that one; `DEFAULT` when the name has none of its own."""
        self.spoilt(name)
        self._names.setdefault(name, []).append(_Promise(serial, now()))

    def spoilt(self, name: str) -> None:
        """Its files are about to be changed: what nobody has seen by now, nobody will."""
        if name in self._names:
            last = self._names[name][-1]
            last.until = min(last.until, now())

    def allowed(self, name: str, begun: float, ended: float) -> set[int]:
        """What a handshake in that time may show."""
        found: set[int] = set()
        for promise in self._names[name]:
            if promise.since > ended:
                break
            if self._was_seen(promise.since, min(promise.until, begun)):
                found.clear()  # and nothing older is in use
            found.add(promise.serial)
        return found

    def told(self, name: str) -> str:
        """The last promises for a name, for people."""
        clock = self._journal.clock
        return ", ".join(
            f"{each.serial % 10**6:06d} at {clock(each.since).strip()}"
            + (f" until {clock(each.until).strip()}" if each.until < math.inf else "")
            for each in self._names[name][-4:]
        )

    @property
    def names(self) -> list[str]:
        return list(self._names)

    # Private

    def _was_seen(self, begun: float, ended: float) -> bool:
        """Whether control had `LAG` seconds in one piece to look."""
        at = begun
        for trouble in sorted(self._journal.troubles, key=lambda each: each.begun):
            if trouble.what in {"control", "registration port"} and trouble.touches(at, ended):
                if trouble.begun - at >= LAG:
                    return True
                at = max(at, trouble.ended if trouble.ended is not None else math.inf)
        return ended - at >= LAG
