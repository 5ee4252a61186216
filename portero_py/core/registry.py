"""The authoritative set of leases, and the routing table made of them.

The rules
- A lease belongs to a service and is named by its instance id in it. Registering the same instance id again
  renews it, wherever the backend is by now; without an instance id the same host and port renew.
- An address is in a service once: an instance that turns up at another one's address (a backend that was
  restarted under a new id) takes that lease's place. Otherwise it would get two turns.
- A lease serves while `now < expires_at`. `expire(now)` only tidies up: the balancer looks at the time too.
- A service whose last lease expired or was released stays known, without leases, for `LINGER` seconds:
  the clients of a single backend that is just being replaced get 503 and come back, not 404. After that it
  is gone. A lingering exact name still hides the wildcard above it, so that a redeploy never shows
  another service's pages. The default service is known for ever: configuration names it.
- Every change makes the table's version one greater. The table itself is made when somebody asks for it:
  one shallow copy of the service dictionary, however many changes it covers.
- Everything is bounded; what does not fit is refused with `RegistryFull`. Lingering services make way first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from portero_py.core.expiry_queue import ExpiryQueue
from portero_py.core.model import Lease, LeaseRequest, Service
from portero_py.core.names import normalise_service_name
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import ConfigError, NoSuchLease, RegistryFull

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
        self._instances: dict[tuple[str, str, int], str] = {}  # service, host, port -> instance id
        self._lease_ends: ExpiryQueue[tuple[str, str]] = ExpiryQueue()  # service, instance id
        self._linger_ends: ExpiryQueue[str] = ExpiryQueue()  # services without leases
        self._services: dict[str, Service] = {default: Service(default, ())} if default else {}
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
            self._table = RoutingTable(
                self._version,
                dict(self._services),
                self._default,
                self._since,
                frozenset(self._changed_since),
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

    def find(self, service: str, instance_id: str = "", host: str = "", port: int = 0) -> Lease | None:
        """The lease with that instance id or, when that is "", at that host and port."""
        instance_id = instance_id or self._instances.get((service, host, port), "")
        return self._leases.get(service, {}).get(instance_id)

    def register(self, request: LeaseRequest, now: float) -> Lease:
        """Grant or renew a lease for `request.ttl_seconds` from `now`. Raises RegistryFull."""
        service, backend = request.service, request.backend
        lease = Lease(
            service=service,
            instance_id=self._instance_id(request),
            backend=backend,
            expires_at=now + request.ttl_seconds,
            ttl_seconds=request.ttl_seconds,
            weight=request.weight,
            health_path=request.health_path,
        )
        leases = self._leases.get(service, {})
        former = leases.get(lease.instance_id)
        evicted = self._evicted(lease)
        if former is None and evicted is None:
            self._make_room(service, len(leases))
        if evicted is not None:
            self._forget(evicted)
        if former is None or former.backend != backend:
            self.generation += 1
        if former is not None:
            del self._instances[service, former.backend.host, former.backend.port]
        self._leases.setdefault(service, {})[lease.instance_id] = lease
        self._instances[service, backend.host, backend.port] = lease.instance_id
        self._lease_ends.set((service, lease.instance_id), lease.expires_at)
        self._linger_ends.discard(service)
        self._changed(service)
        return lease

    def release(
        self, service: str, instance_id: str = "", host: str = "", port: int = 0, *, now: float
    ) -> Lease:
        """End one lease, found as in `find`: the next table does not have it. Raises NoSuchLease."""
        lease = self.find(service, instance_id, host, port)
        if lease is None:
            raise NoSuchLease(f"no such lease for {service}: it was never registered here, or it expired")
        self._forget(lease)
        self._left(service, now)
        return lease

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
            self._drop(service)
        return ended

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next; None when nothing ever ends."""
        times = [at for at in (self._lease_ends.next(), self._linger_ends.next()) if at is not None]
        return min(times, default=None)

    def restore(self, services: Iterable[Service], version: int, now: float) -> int:
        """Take over what another registry had granted; returns the number of leases.

        `services` are those of its table, of that `version`; the next table's version is greater. What has
        ended by `now` is dropped. To be called before the first registration.
        """
        restored = 0
        for service in services:
            leases: dict[str, Lease] = {}
            for lease in service.leases:
                address = (service.name, lease.backend.host, lease.backend.port)
                if now < lease.expires_at and address not in self._instances:
                    leases[lease.instance_id] = lease
                    self._instances[address] = lease.instance_id
                    self._lease_ends.set((service.name, lease.instance_id), lease.expires_at)
            if leases:
                self._leases[service.name] = leases
            elif service.name != self._default:
                self._linger_ends.set(service.name, now + LINGER)
            self._changed(service.name)
            restored += len(leases)
        self._version = max(self._version, version + 1)
        return restored

    # Private

    def _instance_id(self, request: LeaseRequest) -> str:
        if request.instance_id:
            return request.instance_id
        backend = request.backend
        return self._instances.get((request.service, backend.host, backend.port)) or backend.address

    def _evicted(self, lease: Lease) -> Lease | None:
        """The other instance's lease that holds this lease's address."""
        held_by = self.find(lease.service, "", lease.backend.host, lease.backend.port)
        return None if held_by is None or held_by.instance_id == lease.instance_id else held_by

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
        self._drop(lingering)

    def _forget(self, lease: Lease) -> None:
        """Take a lease out of every index; what becomes of its service is the caller's business."""
        self.generation += 1
        service, backend = lease.service, lease.backend
        del self._leases[service][lease.instance_id]
        del self._instances[service, backend.host, backend.port]
        self._lease_ends.discard((service, lease.instance_id))

    def _left(self, service: str, now: float) -> None:
        """One or more leases of `service` are gone."""
        if not self._leases[service]:
            del self._leases[service]
            if service != self._default:
                self._linger_ends.set(service, now + LINGER)
        self._changed(service)

    def _changed(self, service: str) -> None:
        self._services[service] = Service(service, tuple(self._leases.get(service, {}).values()))
        self._new_version(service)

    def _drop(self, service: str) -> None:
        del self._services[service]
        self._new_version(service)

    def _new_version(self, service: str) -> None:
        self._version += 1
        self._table = None
        self._changed_since.add(service)
