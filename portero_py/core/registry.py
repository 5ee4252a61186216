"""The authoritative set of leases, and the routing table made of them.

The rules
- A lease belongs to a service and is named by its instance id in it. Registering the same instance id again
  renews it, wherever the backend is by now; without an instance id the same host and port renew.
- Each lease has one source, and only that source renews, moves or releases it. So that no source's instance
  is another's, the ids of all but the API's carry their source: "one (docker)".
- An address is in a service once for each source: an instance that turns up at another one's address (a
  backend that was restarted under a new id) takes that lease's place. Otherwise it would get two turns.
- What several sources have at one address is one backend with one turn: one lease in the table, the oldest,
  whose terms hold (weight, TLS, health path), with the others in its `also`. Each of them ends by itself, and
  the backend is there until the last one does: what one source releases stays by the other.
- A lease begins READY, or STARTING when it names a health path; it keeps its state when it is renewed. One
  that moves to another address begins anew, unless it drains. Whoever joins others at an address takes theirs
  on: a state is the address's, of all who were granted it. Who changes states obeys `model.TRANSITIONS`.
- A service that is halted (paused or stopped) stays known, with leases or without. So does one with a policy:
  whoever wrote it means the service to be there.
- A change of policies and routes is one new table. Leases go on as they are, but who waited for a probe of a
  health path that there is no more waits no longer.
- A policy's terms (health path, limit) hold for leases that name none. The table has them under its terms,
  and each grant in it knows its own (`Lease.grants`): another policy begins with those.
- A lease takes exchanges while `now < serves_until` (`core.model`); some never end. `expire(now)` only tidies
  up: the balancer looks at the time too.
- A service whose last lease expired or was released stays known, without leases, for `LINGER` seconds:
  the clients of a single backend that is just being replaced get 503 and come back, not 404. After that it
  is gone. A lingering exact name still hides the wildcard above it, so that a redeploy never shows
  another service's pages. The default service is known for ever: configuration names it.
- Every change makes the table's version one greater. The table itself is made when somebody asks for it:
  one shallow copy of the service dictionary, however many changes it covers.
- Everything is bounded; what does not fit is refused with `RegistryFull`. Lingering services make way first.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Final

from portero_py.core.expiry_queue import ExpiryQueue
from portero_py.core.model import (
    API,
    NEVER,
    TRANSITIONS,
    Backend,
    Halt,
    Lease,
    LeaseRequest,
    LeaseState,
    Service,
)
from portero_py.core.names import normalise_service_name
from portero_py.core.policies import DEFAULTS, ServicePolicy
from portero_py.core.routes import NO_ROUTES, Routes
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import ConfigError, NoSuchLease, RegistryFull, UnknownService

#: Seconds for which a service without leases stays known.
LINGER: Final = 300.0

MAX_SERVICES: Final = 50_000
MAX_LEASES: Final = 100_000
MAX_LEASES_PER_SERVICE: Final = 1_000


class Registry:
    """Leases in, routing tables out. Times are seconds of any clock that never goes back.

    Service names are normalised by the caller (`core.names.normalise_service_name`).
    """

    def __init__(
        self,
        default_service: str = "",
        *,
        max_services: int = MAX_SERVICES,
        max_leases: int = MAX_LEASES,
        max_leases_per_service: int = MAX_LEASES_PER_SERVICE,
    ) -> None:
        """`default_service` in any spelling, "" for none. Raises ConfigError when it is no host name."""
        default = normalise_service_name(default_service) if default_service else ""
        if default is None:
            raise ConfigError(f"default_service {default_service!r} is not a host name")
        self._default = default
        self._max_services = max_services
        self._max_leases = max_leases
        self._max_leases_per_service = max_leases_per_service
        self._leases: dict[str, dict[str, Lease]] = {}  # service -> instance id -> lease, oldest first
        # service, host, port -> instance ids, the oldest first: one for each source that has it
        self._held: dict[tuple[str, str, int], tuple[str, ...]] = {}
        self._joined: dict[str, int] = {}  # service -> leases at an address that an older one has too
        self._halts: dict[str, Halt] = {}  # service -> why it takes no exchange
        self._policies: Mapping[str, ServicePolicy] = {}
        self._routes = NO_ROUTES
        self._lease_ends: ExpiryQueue[tuple[str, str]] = ExpiryQueue()  # service, instance id
        self._linger_ends: ExpiryQueue[str] = ExpiryQueue()  # services without leases
        self._services: dict[str, Service] = {default: Service(default, ())} if default else {}
        self._stale: set[str] = set()  # of `_services`: their leases have changed since
        #: Grows when a lease begins, moves or ends; a renewal leaves it as it is.
        self.generation = 0
        self._version = 0
        self._table: RoutingTable | None = None
        self._since = -1  # the version of the last table that was made
        self._changed_since: set[str] = set()  # services

    @property
    def table(self) -> RoutingTable:
        """The routing table as of now; the same object until something changes."""
        if self._table is None:
            self._make_services()
            self._table = RoutingTable(
                self._version,
                dict(self._services),
                self._default,
                self._since,
                frozenset(self._changed_since),
                self._routes,
            )
            self._since = self._version
            self._changed_since.clear()
        return self._table

    @property
    def host_count(self) -> int:
        """Distinct host names that have at least one lease."""
        return len(self._leases)

    @property
    def service_count(self) -> int:
        """Known services, those without a lease just now included."""
        return len(self._services)

    @property
    def lease_count(self) -> int:
        return len(self._lease_ends)

    def configure(
        self,
        policies: Mapping[str, ServicePolicy],
        routes: Routes,
        now: float,
        default_service: str | None = None,
    ) -> None:
        """From now on services are served by these policies (normalised names), and found by these routes.

        `default_service` is normalised, "" for none, None for the one that there is.
        """
        former, self._policies = self._policies, dict(policies)
        former_default = self._default
        if default_service is not None:
            self._default = default_service
        defaults = [service for service in (former_default, self._default) if service]
        for service in {**former, **policies, **dict.fromkeys(defaults)}:
            if self._is_configured(service):
                self._linger_ends.discard(service)
            elif service not in self._leases:
                self._linger_ends.set(service, now + LINGER)
            if former.get(service) != policies.get(service):
                self._end_waits(service, now)
                self._changed(service)
            elif service not in self._services:
                self._changed(service)
        if routes != self._routes or self._default != former_default:
            self._routes = routes
            self._version += 1
            self._table = None

    def has(self, request: LeaseRequest, source: str) -> bool:
        """Whether what is asked for, without an end, is granted to `source` as it is."""
        lease = self.find(
            request.service, request.instance_id, request.backend.host, request.backend.port, source=source
        )
        return (
            lease is not None
            and lease.ttl_seconds is None
            and request.ttl_seconds is None
            and (lease.backend, lease.weight) == (request.backend, request.weight)
            and (lease.health_path, lease.max_in_flight) == (request.health_path, request.max_in_flight)
        )

    def find(
        self, service: str, instance_id: str = "", host: str = "", port: int = 0, *, source: str = API
    ) -> Lease | None:
        """The lease of `source` with that instance id or, when that is "", at that host and port."""
        leases = self._leases.get(service, {})
        if instance_id:
            return leases.get(_named(instance_id, source))
        at_address = (leases[held_by] for held_by in self._held.get((service, host, port), ()))
        return next((lease for lease in at_address if lease.source == source), None)

    def at(self, service: str, host: str, port: int) -> Lease | None:
        """What the table has at an address of a service: the oldest lease there, with the others."""
        held_by = self._held.get((service, host, port))
        if not held_by:
            return None
        leases = self._leases[service]
        entry = _with_others([leases[instance_id] for instance_id in held_by])
        policy = self._policies.get(service)
        return entry if policy is None else entry.under(policy)

    def of_source(self, source: str) -> list[Lease]:
        """All that this source has granted; it looks at every lease."""
        return [
            lease for leases in self._leases.values() for lease in leases.values() if lease.source == source
        ]

    def register(self, request: LeaseRequest, now: float, source: str = API) -> Lease:
        """Grant or renew a lease for `request.ttl_seconds` from `now`. Raises RegistryFull."""
        service, backend = request.service, request.backend
        at_address = self.find(service, "", backend.host, backend.port, source=source)
        if request.instance_id:
            instance_id = _named(request.instance_id, source)
        else:
            instance_id = at_address.instance_id if at_address else _named(backend.address, source)
        leases = self._leases.get(service, {})
        former = leases.get(instance_id)
        evicted = at_address if at_address is not None and at_address.instance_id != instance_id else None
        if former is None and evicted is None:
            self._make_room(service, len(leases))
        if evicted is not None:
            self._forget(evicted)
        if former is not None and not _same_address(former.backend, backend):
            self._leave(former)
        state, since = self._state_of(request, former, now)
        lease = Lease(
            service=service,
            instance_id=instance_id,
            backend=backend,
            expires_at=NEVER if request.ttl_seconds is None else now + request.ttl_seconds,
            ttl_seconds=request.ttl_seconds,
            weight=request.weight,
            health_path=request.health_path,
            source=source,
            state=state,
            since=since,
            max_in_flight=request.max_in_flight,
        )
        if former is None or former.backend != backend:
            self.generation += 1
        self._hold(lease)
        self._linger_ends.discard(service)
        self._changed(service)
        return lease

    def release(
        self,
        service: str,
        instance_id: str = "",
        host: str = "",
        port: int = 0,
        *,
        now: float,
        source: str = API,
    ) -> Lease:
        """End one lease, found as in `find`: the next table does not have it. Raises NoSuchLease."""
        lease = self.find(service, instance_id, host, port, source=source)
        if lease is None:
            raise NoSuchLease(f"no such lease for {service}: it was never registered here, or it expired")
        self._forget(lease)
        self._left(service, now)
        return lease

    def retain(self, source: str, requests: Iterable[LeaseRequest], now: float) -> list[Lease]:
        """End what `source` was granted beside what `requests` would renew; what has ended."""
        kept = set()
        for asked in requests:
            found = self.find(
                asked.service, asked.instance_id, asked.backend.host, asked.backend.port, source=source
            )
            if found is not None:
                kept.add((found.service, found.instance_id))
        ended = [lease for lease in self.of_source(source) if (lease.service, lease.instance_id) not in kept]
        for lease in ended:
            self._forget(lease)
            self._left(lease.service, now)
        return ended

    def set_state(
        self, service: str, host: str, port: int, state: LeaseState, now: float
    ) -> list[tuple[Lease, Lease]]:
        """Let what is granted at an address be in `state`: each lease there as it was and as it is now.

        None when nobody has the address, it is in that state, or the step is none (`model.TRANSITIONS`).
        """
        held_by = self._held.get((service, host, port), ())
        leases = self._leases.get(service, {})
        former = [leases[instance_id] for instance_id in held_by]
        if not former or state not in TRANSITIONS[former[0].state]:
            return []
        for lease in former:
            leases[lease.instance_id] = replace(lease, state=state, since=now)
        self.generation += 1
        self._changed(service)
        return [(lease, leases[lease.instance_id]) for lease in former]

    def halt(self, service: str, halt: Halt | None) -> bool:
        """Pause or stop a service, or let it go on (None); whether that is news. Raises UnknownService."""
        if service not in self._services:
            raise UnknownService(f"no such service: {service}")
        if self._halts.get(service) == halt:
            return False
        if halt is None:
            del self._halts[service]
        else:
            self._halts[service] = halt
        self.generation += 1
        self._changed(service)
        return True

    def expire(self, now: float) -> list[Lease]:
        """Drop what has ended: leases, which are returned, and services that lingered long enough."""
        ended = []
        for service, instance_id in self._lease_ends.pop_due(now):
            lease = self._leases[service][instance_id]
            self._forget(lease)
            ended.append(lease)
        for service in dict.fromkeys(lease.service for lease in ended):
            self._left(service, now)
        for service in self._linger_ends.pop_due(now):
            if service in self._halts:
                self._linger_ends.set(service, now + LINGER)
            else:
                self._drop(service)
        return ended

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next; None when nothing ever ends."""
        times = [at for at in (self._lease_ends.next(), self._linger_ends.next()) if at is not None]
        first = min(times, default=NEVER)
        return None if math.isinf(first) else first

    def restore(
        self, services: Iterable[Service], version: int, now: float, sources: Container[str] | None = None
    ) -> int:
        """Take over what another registry had granted; returns the number of leases.

        `services` are those of its table, of that `version`; the next table's version is greater. What has
        ended by `now` is dropped, and so is what comes from none of `sources`, if they are given: nobody
        would ever end it. To be called before the first registration.
        """
        restored = 0
        for service in services:
            for lease in (grant for entry in service.leases for grant in entry.grants):
                is_there = lease.instance_id in self._leases.get(service.name, {}) or self.find(
                    service.name, "", lease.backend.host, lease.backend.port, source=lease.source
                )
                is_ours = sources is None or lease.source in sources
                if now < lease.expires_at and is_ours and not is_there:
                    self._hold(lease)
                    restored += 1
            if service.name not in self._leases and not self._is_configured(service.name):
                self._linger_ends.set(service.name, now + LINGER)
            if service.halt is not None:
                self._halts[service.name] = service.halt
            self._changed(service.name)
        self._version = max(self._version, version + 1)
        return restored

    def adopt(
        self, leases: Iterable[Lease], now: float, sources: Container[str], ended: Container[tuple[str, str]]
    ) -> int:
        """Take over what somebody knew of whom nobody heard before; returns the number of leases.

        Only what has not ended by `now`, is from one of `sources`, has neither its id nor its address here,
        and is not in `ended`: service and instance id, or service and `host:port`. What does not fit is left.
        """
        adopted = 0
        for lease in leases:
            service, backend = lease.service, lease.backend
            held = self._leases.get(service, {})
            is_known = (
                lease.instance_id in held
                or (service, backend.host, backend.port) in self._held
                or (service, lease.instance_id) in ended
                or (service, backend.address) in ended
            )
            if is_known or now >= lease.expires_at or lease.source not in sources:
                continue
            try:
                self._make_room(service, len(held))
            except RegistryFull:
                break
            self.generation += 1
            self._hold(lease)
            self._linger_ends.discard(service)
            self._changed(service)
            adopted += 1
        return adopted

    # Private

    def _is_configured(self, service: str) -> bool:
        """Whether it is known with leases or without."""
        return service == self._default or service in self._policies

    def _state_of(self, request: LeaseRequest, former: Lease | None, now: float) -> tuple[LeaseState, float]:
        """In which state what is asked for is, and since when."""
        backend, policy = request.backend, self._policies.get(request.service)
        health_path = request.health_path or ("" if policy is None else policy.health_path)
        held_by = self._held.get((request.service, backend.host, backend.port))
        if held_by:
            there = self._leases[request.service][held_by[0]]
            alone = former is not None and held_by == (former.instance_id,)
            if there.state is LeaseState.STARTING and alone and not health_path:
                return LeaseState.READY, now  # there is nothing to wait for any more
            return there.state, there.since
        if former is not None and former.state is LeaseState.DRAINING:
            return former.state, former.since
        return LeaseState.STARTING if health_path else LeaseState.READY, now

    def _end_waits(self, service: str, now: float) -> None:
        """Nobody of a service without a health path waits for a probe: those who did are READY."""
        policy = self._policies.get(service)
        if policy is not None and policy.health_path:
            return
        for instance_id, lease in self._leases.get(service, {}).items():
            if lease.state is LeaseState.STARTING:
                there = self.at(service, lease.backend.host, lease.backend.port)
                if there is not None and not there.health_path:
                    self._leases[service][instance_id] = replace(lease, state=LeaseState.READY, since=now)
                    self.generation += 1

    def _make_room(self, service: str, leases_of_service: int) -> None:
        if self.lease_count >= self._max_leases:
            raise RegistryFull(f"the registry is full: {self._max_leases} leases")
        if leases_of_service >= self._max_leases_per_service:
            raise RegistryFull(f"{service} is full: {self._max_leases_per_service} leases")
        if service in self._services or self.service_count < self._max_services:
            return
        lingering = self._linger_ends.first()
        if lingering is None:
            raise RegistryFull(f"the registry is full: {self._max_services} services")
        self._linger_ends.discard(lingering)
        self._halts.pop(lingering, None)
        self._drop(lingering)

    def _hold(self, lease: Lease) -> None:
        """Put a lease into every index, a renewed one in its old place."""
        service, instance_id = lease.service, lease.instance_id
        place = service, lease.backend.host, lease.backend.port
        held_by = self._held.get(place, ())
        if instance_id not in held_by:
            self._held[place] = (*held_by, instance_id)
            if held_by:
                self._joined[service] = self._joined.get(service, 0) + 1
        self._leases.setdefault(service, {})[instance_id] = lease
        self._lease_ends.set((service, instance_id), lease.expires_at)

    def _leave(self, lease: Lease) -> None:
        """Take a lease from its address."""
        place = lease.service, lease.backend.host, lease.backend.port
        others = tuple(held_by for held_by in self._held[place] if held_by != lease.instance_id)
        if not others:
            del self._held[place]
            return
        self._held[place] = others
        self._joined[lease.service] -= 1
        if not self._joined[lease.service]:
            del self._joined[lease.service]

    def _forget(self, lease: Lease) -> None:
        """Take a lease out of every index; what becomes of its service is the caller's business."""
        self.generation += 1
        self._leave(lease)
        del self._leases[lease.service][lease.instance_id]
        self._lease_ends.discard((lease.service, lease.instance_id))

    def _left(self, service: str, now: float) -> None:
        """One or more leases of `service` are gone."""
        if not self._leases[service]:
            del self._leases[service]
            if not self._is_configured(service):
                self._linger_ends.set(service, now + LINGER)
        self._changed(service)

    def _changed(self, service: str) -> None:
        if service not in self._services:
            self._services[service] = Service(service, ())
        self._stale.add(service)
        self._new_version(service)

    def _make_services(self) -> None:
        """Those that have changed, once for each table: a registration of many is one."""
        for service in self._stale:
            leases = self._leases.get(service, {})
            entries = self._entries(leases) if service in self._joined else leases.values()
            policy = self._policies.get(service)
            if policy == DEFAULTS:
                policy = None
            elif policy is not None:
                entries = [entry.under(policy) for entry in entries]
            self._services[service] = Service(service, tuple(entries), self._halts.get(service), policy)
        self._stale.clear()

    def _entries(self, leases: dict[str, Lease]) -> list[Lease]:
        """One lease for each address: the oldest there, with the others."""
        entries = []
        for lease in leases.values():
            held_by = self._held[lease.service, lease.backend.host, lease.backend.port]
            if lease.instance_id == held_by[0]:
                entries.append(_with_others([leases[instance_id] for instance_id in held_by]))
        return entries

    def _drop(self, service: str) -> None:
        del self._services[service]
        self._stale.discard(service)
        self._new_version(service)

    def _new_version(self, service: str) -> None:
        self._version += 1
        self._table = None
        self._changed_since.add(service)


def _with_others(leases: list[Lease]) -> Lease:
    """Those of one address as one, the oldest first."""
    first, *others = leases
    return replace(first, also=tuple(others)) if others else first


def _named(instance_id: str, source: str) -> str:
    return instance_id if source == API else f"{instance_id} ({source})"


def _same_address(one: Backend, other: Backend) -> bool:
    return (one.host, one.port) == (other.host, other.port)
