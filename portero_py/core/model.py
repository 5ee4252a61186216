"""The nouns of the registry: a backend, its lease, a service.

How long a lease takes exchanges is said once, in `Lease.serves_until`: the latest end of all that was granted
for its address, or never while it drains. `can_serve(now)` asks it; on the hot path it is compared directly,
because a call costs more than the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from portero_py.core.policies import ServicePolicy

#: The source of what backends registered by themselves.
API: Final = "api"

#: The `expires_at` of a lease without an end. JSON knows no infinity: there it is null.
NEVER: Final = math.inf


class LeaseState(Enum):
    """Whether a backend is to be tried, and before whom (`balancing/choice`).

    STARTING: it named a health path, and no probe has succeeded yet. DOWN: probes fail. DRAINING: never.
    """

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    DRAINING = "draining"


#: The steps that may happen while a lease lives. Back to STARTING goes who moves to another address.
TRANSITIONS: Final[Mapping[LeaseState, frozenset[LeaseState]]] = {
    LeaseState.STARTING: frozenset({LeaseState.READY, LeaseState.DRAINING}),
    LeaseState.READY: frozenset({LeaseState.STARTING, LeaseState.DOWN, LeaseState.DRAINING}),
    LeaseState.DOWN: frozenset({LeaseState.STARTING, LeaseState.READY, LeaseState.DRAINING}),
    LeaseState.DRAINING: frozenset({LeaseState.READY}),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """One address that serves a service. Frozen and hashable: equal backends share one connection pool.

    `host` is an IPv4 or IPv6 address without brackets, possibly with a zone id (`fe80::1%eth0`).
    `tls_fingerprint` is the lower-case hex SHA-256 of the backend's certificate (DER), or "".
    """

    host: str
    port: int
    use_tls: bool = False
    protocol: str = "http1"
    tls_fingerprint: str = ""

    @property
    def address(self) -> str:
        """`host:port` for people, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Lease:
    """A backend's registration by one source, until `expires_at` (seconds of the registry's clock, or NEVER).

    `source` is `api`, `static`, `docker` or `node:<name>`. `instance_id` is unique in the service, whatever
    the sources. In a routing table an address stands once: `also` holds what other sources granted for it.
    """

    service: str
    instance_id: str
    backend: Backend
    expires_at: float
    ttl_seconds: int | None  # None: for ever
    weight: int = 1
    health_path: str = ""
    source: str = API
    state: LeaseState = LeaseState.READY
    since: float = 0.0  # when that state began, seconds of the registry's clock
    max_in_flight: int = 0  # exchanges at a time, of all workers together; 0: no limit
    also: tuple[Lease, ...] = ()
    #: The health path and the limit that it was granted with, where its service's policy says more.
    granted: tuple[str, int] | None = None
    #: It may take an exchange while `now < serves_until`.
    serves_until: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        until = -math.inf if self.state is LeaseState.DRAINING else self.ends_at
        object.__setattr__(self, "serves_until", until)

    @property
    def ends_at(self) -> float:
        """When the last of what was granted for this address ends."""
        if not self.also:
            return self.expires_at
        return max(self.expires_at, *(other.expires_at for other in self.also))

    @property
    def grants(self) -> tuple[Lease, ...]:
        """What each source granted, one lease for each, the oldest first."""
        if not self.also and self.granted is None:
            return (self,)
        health_path, max_in_flight = self.granted or (self.health_path, self.max_in_flight)
        own = replace(self, health_path=health_path, max_in_flight=max_in_flight, also=(), granted=None)
        return (own, *self.also)

    def can_serve(self, now: float) -> bool:
        """Whether it may take an exchange now."""
        return now < self.serves_until

    def under(self, policy: ServicePolicy) -> Lease:
        """The same with the service's terms, where it has none of its own."""
        own = self.granted or (self.health_path, self.max_in_flight)
        health_path, max_in_flight = own[0] or policy.health_path, own[1] or policy.max_in_flight
        if (health_path, max_in_flight) == (self.health_path, self.max_in_flight):
            return self
        granted = None if (health_path, max_in_flight) == own else own
        return replace(self, health_path=health_path, max_in_flight=max_in_flight, granted=granted)


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What is asked for when a backend registers or renews. `service` is normalised (`core.names`).

    Without an `instance_id` the address says who it is. An `instance_id` has no spaces.
    """

    service: str
    backend: Backend
    ttl_seconds: int | None  # None: for ever
    instance_id: str = ""
    weight: int = 1
    health_path: str = ""
    max_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Halt:
    """Why a service takes no exchange for now, until somebody resumes it.

    Paused when it has `seconds`: an exchange is held for so long at most, then it is a 503. Else stopped:
    each is a 503 at once. `message` is the text that clients are shown, or "".
    """

    seconds: float | None
    message: str = ""

    @property
    def state(self) -> str:
        """`paused` or `stopped`."""
        return "stopped" if self.seconds is None else "paused"


@dataclass(frozen=True, slots=True)
class Service:
    """One host name, an exact one or a wildcard (`*.example.com`), and the leases that serve it.

    Without leases it is known but cannot be reached (503); `Registry` says for how long that lasts.
    """

    name: str
    leases: tuple[Lease, ...]
    halt: Halt | None = None
    policy: ServicePolicy | None = None  # how it is served, if not by the defaults
    #: Whether all of its leases are READY: then whose turn it is is all that there is to ask.
    is_even: bool = field(init=False, repr=False, compare=False)
    #: Whether any of them has a limit.
    is_limited: bool = field(init=False, repr=False, compare=False)
    #: Even, and without limits.
    is_plain: bool = field(init=False, repr=False, compare=False)
    #: Whether an exchange may have to wait: any of them has a limit, or it is halted.
    is_scarce: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        even = all(lease.state is LeaseState.READY for lease in self.leases)
        limited = any(lease.max_in_flight for lease in self.leases)
        object.__setattr__(self, "is_even", even)
        object.__setattr__(self, "is_limited", limited)
        object.__setattr__(self, "is_plain", even and not limited)
        object.__setattr__(self, "is_scarce", limited or self.halt is not None)


@dataclass(frozen=True, slots=True)
class Standing:
    """What one worker says of one backend of a service; of those about which there is something to say."""

    service: str
    host: str
    port: int
    in_flight: int = 0  # exchanges that hold it
    is_ejected: bool = False
    error: str = ""  # the last one that counted against it
