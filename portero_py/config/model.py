"""The validated, frozen configuration, in one small group per owner.

Flag > environment > file > default (`sources` reads them, `values` checks each value). The sections and keys
of the file carry the names of the groups and fields here; `sources` builds each group from its rows there.
Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from portero_py.core.policies import DEFAULTS, ServicePolicy
from portero_py.core.routes import Route

Network = IPv4Network | IPv6Network

#: The keys of the file that are no settings: `services` reads them.
SERVICE_KEYS: Final = ("service", "route", "include")


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port to bind or to connect to; `host` is without brackets, "" means every address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; a name other than `localhost` counts as outside."""
        try:
            ip = ip_address(self.host)
        except ValueError:
            return self.host.lower() == "localhost"
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
            return ip.ipv4_mapped.is_loopback
        return ip.is_loopback


@dataclass(frozen=True, slots=True)
class Timeouts:
    """On idleness, never on total duration."""

    handshake: float = 10
    head: float = 15
    body_idle: float = 60
    keep_alive: float = 75
    connect: float = 3
    upstream_head: float = 60
    upstream_idle: float = 60
    drain: float = 30  # how long the exchanges in flight may take to finish at shutdown
    shutdown: float = 30  # how long everything else may take to close after that


@dataclass(frozen=True, slots=True)
class Limits:
    """0 is no limit. With several workers each has its share of `connections` and of the rates."""

    request_line: int = 8192
    header_bytes: int = 32768
    header_fields: int = 100
    body_bytes: int = 0
    body_rate: int = 0  # least bytes a second of a request's body, averaged over 20 seconds
    h2_streams: int = 128
    # At the first two clients wait, at the others a connection is closed at once. Open files are a limit too.
    connections: int = 0
    connections_per_listener: int = 0
    connections_per_client: int = 0  # over all workers; an IPv6 client is a network of 64 bits
    handshakes_per_client: int = 0  # TLS, a second
    buffered_bytes: int = 256 << 20  # in each process that serves
    # exchanges of one service that wait for a backend with room
    queue_seconds: float = 0  # 0: none waits
    queue_length: int = 1000  # a service, in each worker
    queue_bytes: int = 16 << 20  # a service, in each worker: heads and what there is of bodies


@dataclass(frozen=True, slots=True)
class Health:
    """Probes of backends, and what counts against them in a worker. Seconds, counts and statuses."""

    interval: float = 5
    timeout: float = 2
    rise: int = 1
    fall: int = 3
    statuses: tuple[int, ...] = ()  # answers that count as failures, of 502, 503, 504 and other 5xx


@dataclass(frozen=True, slots=True)
class Tls:
    cert_dir: str = "/etc/portero/certs"
    min_version: str = "1.2"
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Proxy:
    """What the data plane needs to know beyond times and limits."""

    listen: tuple[Address, ...] = (Address("::", 443),)
    trusted_proxies: tuple[Network, ...] = ()
    default_service: str = ""
    upstream_tls_verify: bool = False
    upstream_ca_file: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    access: str = "json"  # json | text | off
    level: str = "info"  # error | warning | info | debug


@dataclass(frozen=True, slots=True)
class Registration:
    """The control plane's API. Secrets are kept out of every repr."""

    listen: Address = Address("127.0.0.1", 18080)
    secret: str = field(default="", repr=False)
    hmac_keys: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # (kid or "", key)
    audience: str = ""
    issuer: str = ""
    backend_cidrs: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class PlainHttp:
    listen: Address | None = None
    acme_upstream: Address | None = None


@dataclass(frozen=True, slots=True)
class Acme:
    """Certificates by themselves. `domains` has one group of names a certificate, the folder's name first."""

    domains: tuple[tuple[str, ...], ...] = ()
    on_register: tuple[str, ...] = ()  # patterns of services that bring their certificate along
    email: str = ""
    directory: str = "https://acme-v02.api.letsencrypt.org/directory"
    ca_file: str = ""
    challenge: str = "auto"  # tls-alpn-01 | http-01 | dns-01 | auto
    eab_kid: str = ""
    eab_hmac: str = field(default="", repr=False)
    agree_tos: bool = False
    # dns-01, by a program of the operator's or by updates (RFC 2136)
    dns_hook: tuple[str, ...] = ()  # called with present|cleanup NAME VALUE
    dns_hook_seconds: float = 60
    dns_server: Address | None = None  # that takes updates
    dns_zone: str = ""  # "": found by its SOA record
    dns_tsig_name: str = ""
    dns_tsig_secret: str = field(default="", repr=False)
    dns_tsig_algorithm: str = "hmac-sha256"
    dns_resolver: tuple[Address, ...] = ()  # none: those of /etc/resolv.conf
    dns_check: tuple[Address, ...] = ()  # asked for the record; none: the servers that the zone names
    dns_seconds: float = 120  # until all of them have it

    @property
    def enabled(self) -> bool:
        """Whether portero asks a CA for anything."""
        return bool(self.domains or self.on_register)

    @property
    def has_dns(self) -> bool:
        """Whether portero can make DNS records."""
        return bool(self.dns_hook) or self.dns_server is not None


@dataclass(frozen=True, slots=True)
class FixedBackend:
    """A backend that the file names: an IP address, or a host name that is resolved again and again."""

    address: Address
    use_tls: bool = False
    tls_fingerprint: str = ""
    protocol: str = "http1"
    weight: int = 1
    health_path: str = ""
    max_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class FixedService:
    """One `[[service]]`: `name` is normalised (`core.names`)."""

    name: str
    backends: tuple[FixedBackend, ...] = ()
    policy: ServicePolicy = DEFAULTS


@dataclass(frozen=True, slots=True)
class Config:
    proxy: Proxy = Proxy()
    registration: Registration = Registration()
    plain_http: PlainHttp = PlainHttp()
    tls: Tls = Tls()
    acme: Acme = Acme()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    health: Health = Health()
    log: Log = Log()
    services: tuple[FixedService, ...] = ()
    routes: tuple[Route, ...] = ()
    workers: int = 1
    state_dir: str = ""


@dataclass(frozen=True, slots=True)
class Reloads:
    """How often the configuration was read again, and when that went well last, seconds since the epoch.

    The reading at the start is none, but it is one that went well.
    """

    ok: int = 0
    failed: int = 0
    succeeded_at: float = 0.0
