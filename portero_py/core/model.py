"""The nouns of the registry: a backend, its lease, a service."""

from __future__ import annotations

from dataclasses import dataclass


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
    """A backend's registration. It serves while `now < expires_at` (seconds of the registry's clock)."""

    service: str
    instance_id: str
    backend: Backend
    expires_at: float
    ttl_seconds: int
    weight: int = 1
    health_path: str = ""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a backend asks for when it registers or renews. `service` is normalised (`core.names`).

    Without an `instance_id` the address says who it is.
    """

    service: str
    backend: Backend
    ttl_seconds: int
    instance_id: str = ""
    weight: int = 1
    health_path: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """One host name, an exact one or a wildcard (`*.example.com`), and the leases that serve it.

    Without leases it is known but cannot be reached (503); `Registry` says for how long that lasts.
    """

    name: str
    leases: tuple[Lease, ...]
