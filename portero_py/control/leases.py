"""The leases of this proxy: whoever grants or ends one does it here, whatever the source.

The rules
- Every change is in force when the call returns: all workers route by the new table. Nobody else publishes
  routing tables. (A worker that hangs is not waited for: see `feed`.)
- What follows from a change is told to those who subscribed, once it is in force; the log is one of them.
  What goes wrong there harms nobody else.
- A source ends only what it was granted itself: `core.registry` has the rules of leases.
- What has expired is swept by one task that sleeps until the next expiry. It may be a little late, so that
  leases that end together are one new table: the workers look at the expiry themselves.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from portero_py.control.tasks import Tasks
from portero_py.core.model import API, Halt, Lease, LeaseRequest, LeaseState, Service
from portero_py.core.policies import ServicePolicy
from portero_py.core.probing import Verdict, is_still
from portero_py.core.registry import Registry
from portero_py.core.routes import Routes
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import NoSuchLease, RegistryFull
from portero_py.feed.feed import Feed, Standings

#: Seconds that the sweep waits after an expiry for others to come.
SWEEP_DELAY: Final = 0.25

#: The most ends that are remembered, so that nobody who reports late brings a lease back.
MOST_ENDED: Final = 2_000

#: The most leases that one change of the table names one by one in the log.
MOST_LINES: Final = 100

_log = logging.getLogger(__name__)


class What(Enum):
    """What happened to a lease."""

    REGISTERED = "registered"
    RENEWED = "renewed"
    MOVED = "moved"
    DEREGISTERED = "deregistered"
    EXPIRED = "expired"
    STATE = "state"  # it is ready, down, ...: another than `former`


@dataclass(frozen=True, slots=True)
class Change:
    """A lease that began, went on or ended. `former` is what it was before, where it goes on."""

    what: What
    lease: Lease
    former: Lease | None = None
    why: str = ""

    @property
    def is_end(self) -> bool:
        """Whether the lease is gone now."""
        return self.what in (What.DEREGISTERED, What.EXPIRED)


class Leases:
    """One registry and its feed. `start` before the first change, `close` at the end.

    `clock` is a steady clock in seconds, the one that the workers compare expiries with. `count_fault` is
    called with the name of what failed and goes on.
    """

    def __init__(
        self,
        registry: Registry,
        feed: Feed,
        *,
        clock: Callable[[], float],
        count_fault: Callable[[str], None],
    ) -> None:
        self._registry = registry
        self._feed = feed
        self._clock = clock
        self._count_fault = count_fault
        self._subscribers: list[Callable[[Change], None]] = []
        self._tasks = Tasks(count_fault)
        self._ended: set[tuple[str, str]] = set()  # released here: service, and instance id or address
        self._sweep_at = math.inf
        self._sooner = asyncio.Event()  # an expiry came up that is earlier than `_sweep_at`

    @property
    def table(self) -> RoutingTable:
        """The newest routing table."""
        return self._registry.table

    @property
    def generation(self) -> int:
        """Grows when a lease begins, moves or ends; a renewal leaves it as it is."""
        return self._registry.generation

    @property
    def faults(self) -> list[str]:
        """The names of the tasks that failed lately."""
        return self._tasks.faults

    def has_backend(self, name: str) -> bool:
        """Whether a service by that name has a lease."""
        service = self.table.services.get(name)
        return service is not None and bool(service.leases)

    def find(self, service: str, instance_id: str = "", host: str = "", port: int = 0) -> Lease:
        """A lease of whatever source, by its instance id as it is shown or, when that is "", by its address.

        Raises NoSuchLease.
        """
        known = self.table.services.get(service)
        for entry in () if known is None else known.leases:
            for lease in entry.grants:
                is_meant = (
                    lease.instance_id == instance_id
                    if instance_id
                    else (lease.backend.host, lease.backend.port) == (host, port)
                )
                if is_meant and self._clock() < lease.expires_at:
                    return lease
        raise NoSuchLease(f"no such lease for {service}: it was never registered here, or it expired")

    def at(self, service: str, host: str, port: int) -> Lease | None:
        """What the newest table has at an address of a service."""
        return self._registry.at(service, host, port)

    async def standings(self, service: str = "") -> Standings:
        """What the workers say of the backends of a service, or of all: see `Feed.standings`."""
        return await self._feed.standings(service)

    def subscribe(self, callback: Callable[[Change], None]) -> None:
        """From now on call `callback` with every change, once it is in force."""
        self._subscribers.append(callback)

    # The life cycle

    def restore(
        self, services: Iterable[Service], version: int, sources: Container[str] | None = None
    ) -> int:
        """Before `start`: take over what was granted elsewhere, see `Registry.restore`; how many leases."""
        return self._registry.restore(services, version, self._clock(), sources)

    async def adopt(self, table: RoutingTable, sources: Container[str]) -> int:
        """After `start`: take over from `table` what is neither known nor was released here; how many."""
        if len(self._ended) > MOST_ENDED:  # too much has happened since
            return 0
        grants = [
            grant for service in table.services.values() for entry in service.leases for grant in entry.grants
        ]
        adopted = self._registry.adopt(grants, self._clock(), sources, self._ended)
        if adopted:
            await self._in_force([])
        return adopted

    async def start(self) -> None:
        """Publish the first table and begin to sweep."""
        await self._publish()
        self._tasks.own(self._sweep_for_ever, "sweep")

    async def close(self) -> None:
        """Stop sweeping. Leases stay as they are."""
        await self._tasks.close()

    # Changes

    async def grant(self, request: LeaseRequest, source: str = API) -> Change:
        """Grant or renew one lease; what came of it. Raises RegistryFull."""
        change = self._grant(request, source)
        await self._in_force([change])
        return change

    async def release(
        self, service: str, instance_id: str = "", host: str = "", port: int = 0, *, source: str = API
    ) -> Lease:
        """End one lease of `source`, named by its instance id or, when that is "", by its address.

        No new exchange goes there by it, those that are going on finish. Raises NoSuchLease.
        """
        lease = self._registry.release(service, instance_id, host, port, now=self._clock(), source=source)
        await self._in_force([Change(What.DEREGISTERED, lease)])
        return lease

    async def replace(self, source: str, requests: Sequence[LeaseRequest]) -> None:
        """Let `source` have leases for these requests and no others: all of that is one new table.

        What it has without an end, just as it is asked for, stays untouched. What does not fit is left out;
        RegistryFull is raised for the first, when the others are in force.
        """
        changes, full = self._replace(source, requests)
        if changes:
            await self._in_force(changes)
        if full is not None:
            raise full

    async def configure(
        self,
        policies: Mapping[str, ServicePolicy],
        routes: Routes,
        default_service: str,
        source: str,
        requests: Sequence[LeaseRequest],
    ) -> None:
        """Serve by these policies and routes, see `Registry.configure`, and `replace`: one new table."""
        version = self.table.version
        self._registry.configure(policies, routes, self._clock(), default_service)
        changes, full = self._replace(source, requests)
        if self.table.version != version:
            await self._in_force(changes)
        if full is not None:
            raise full

    async def set_state(
        self, service: str, host: str, port: int, state: LeaseState, why: str = ""
    ) -> list[Lease]:
        """Let the backend at an address be in `state`: its leases now, none when that is no step for it."""
        changed = self._registry.set_state(service, host, port, state, self._clock())
        if changed:
            await self._in_force([Change(What.STATE, lease, former, why) for former, lease in changed])
        return [lease for _, lease in changed]

    async def judge(self, verdicts: Iterable[Verdict]) -> None:
        """Let backends be in the states that probes found, all in one new table.

        Who is another by now than the one that was probed stays as he is.
        """
        changes = []
        for verdict in verdicts:
            service, backend = verdict.lease.service, verdict.lease.backend
            if is_still(verdict.lease, self.at(service, backend.host, backend.port)):
                changed = self._registry.set_state(
                    service, backend.host, backend.port, verdict.state, self._clock()
                )
                changes += [Change(What.STATE, lease, former, verdict.why) for former, lease in changed]
        if changes:
            await self._in_force(changes)

    async def halt(self, service: str, halt: Halt | None, why: str = "") -> None:
        """Pause or stop a service, or let it go on: in force when this returns. Raises UnknownService."""
        if self._registry.halt(service, halt):
            state = "resumed" if halt is None else halt.state
            _log.info("%s is %s%s", service, state, f": {why}" if why else "")
            await self._publish()

    async def sweep(self) -> None:
        """Drop what has expired by now and, if anything did, publish the table."""
        version = self.table.version
        ended = self._registry.expire(self._clock())
        if self.table.version != version:
            await self._in_force([Change(What.EXPIRED, lease) for lease in ended])

    # Private

    def _replace(
        self, source: str, requests: Sequence[LeaseRequest]
    ) -> tuple[list[Change], RegistryFull | None]:
        ended = self._registry.retain(source, requests, self._clock())
        changes = [Change(What.DEREGISTERED, lease) for lease in ended]
        full: RegistryFull | None = None
        for request in requests:
            if self._registry.has(request, source):
                continue
            try:
                changes.append(self._grant(request, source))
            except RegistryFull as error:
                full = full or error
        return changes, full

    def _grant(self, request: LeaseRequest, source: str) -> Change:
        backend = request.backend
        former = self._registry.find(
            request.service, request.instance_id, backend.host, backend.port, source=source
        )
        lease = self._registry.register(request, self._clock(), source)
        if former is None:
            return Change(What.REGISTERED, lease)
        return Change(What.MOVED if former.backend != backend else What.RENEWED, lease, former)

    async def _in_force(self, changes: Sequence[Change]) -> None:
        for lease in (change.lease for change in changes if change.what is What.DEREGISTERED):
            if len(self._ended) <= MOST_ENDED:
                self._ended.add((lease.service, lease.instance_id))
                self._ended.add((lease.service, lease.backend.address))
        due = self._registry.next_expiry()
        if due is not None and due < self._sweep_at:
            self._sooner.set()
        await self._publish()
        _log_changes(changes)
        for change in changes:
            for told in self._subscribers:
                try:
                    told(change)
                except Exception:  # a subscriber's bug: the others are told all the same
                    _log.exception("what follows from a lease failed")
                    self._count_fault("leases")

    async def _publish(self) -> None:
        await self._feed.publish(self.table)

    async def _sweep_for_ever(self) -> None:
        while True:
            due = self._registry.next_expiry()
            self._sweep_at = math.inf if due is None else due
            self._sooner.clear()
            wait = None if due is None else max(due - self._clock(), 0.0) + SWEEP_DELAY
            try:
                await asyncio.wait_for(self._sooner.wait(), wait)
            except TimeoutError:
                await self.sweep()


def _log_changes(changes: Sequence[Change]) -> None:
    """Each of a few; of many at once, a file of thousands of services, only how many there are."""
    if len(changes) > MOST_LINES and not _log.isEnabledFor(logging.DEBUG):
        counted = Counter(change.what.value for change in changes if change.what is not What.RENEWED)
        if counted:
            _log.info(
                "many leases at once: %s", ", ".join(f"{count} {what}" for what, count in counted.items())
            )
        return
    for change in changes:
        _log_change(change)


def _log_change(change: Change) -> None:
    said, lease = _said(change.lease), change.lease
    lasts = "for ever" if lease.ttl_seconds is None else f"for {lease.ttl_seconds} s"
    if change.what is What.REGISTERED:
        _log.info("registered: %s %s", said, lasts)
    elif change.what is What.RENEWED:
        _log.debug("renewed: %s %s", said, lasts)
    elif change.what is What.MOVED:
        assert change.former is not None
        _log.info("moved: %s, was %s", said, change.former.backend.address)
    elif change.what is What.STATE:
        why = f": {change.why}" if change.why else ""
        _log.info("%s: %s%s", lease.state.value, said, why)
    else:
        _log.info("%s: %s", change.what.value, said)


def _said(lease: Lease) -> str:
    scheme = "https" if lease.backend.use_tls else "http"
    address = f"{scheme}://{lease.backend.address}"
    instance = "" if lease.instance_id == lease.backend.address else f" ({lease.instance_id})"
    return f"{lease.service} at {address}{instance}"
