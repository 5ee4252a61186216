"""How a service is served, as its operator wrote it: the nouns of `[[service]]` in the file.

A service without a policy is served by the defaults, and none of this costs its requests anything. `None` and
0 and "" are what was not said: the general configuration holds then. What follows from a policy is made in
each worker once (`proxy/rules`), never in a request.

A policy travels to the workers as JSON (`feed/records`): each field is a text, a number, a switch, a tuple of
one kind, another of these classes, or None. Nothing secret belongs here, but hashes of passwords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: What `ServicePolicy.balance` may say (`core/balancing` has one file for each).
BALANCES: Final = ("round-robin", "least-requests", "random-two", "source", "hash")


@dataclass(frozen=True, slots=True)
class FieldChanges:
    """Header fields that are removed, then set (all others by that name go), then added. Names and values."""

    remove: tuple[str, ...] = ()
    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `requests` in `seconds` for each `key`: `client`, `service`, or `header:NAME`."""

    requests: int
    seconds: float = 1.0
    key: str = "client"


@dataclass(frozen=True, slots=True)
class Sticky:
    """A client stays with a backend by a cookie: one of ours (`insert`), or the application's (`prefix`)."""

    cookie: str
    mode: str = "insert"


@dataclass(frozen=True, slots=True)
class BasicAuth:
    """Who may come in, by name and bcrypt hash (RFC 7617)."""

    users: tuple[tuple[str, str], ...]
    realm: str = "restricted"


@dataclass(frozen=True, slots=True)
class ForwardAuth:
    """Another server is asked about each request: 2xx lets it go on, anything else is the answer.

    `response_headers` of its answer go on to the backend. `request_headers` of the request are shown to it
    (none named: all of them).
    """

    url: str
    request_headers: tuple[str, ...] = ()
    response_headers: tuple[str, ...] = ()
    timeout: float = 5.0


@dataclass(frozen=True, slots=True)
class Maintenance:
    """Every request is answered 503, with this page: its text, and what it is."""

    page: str
    content_type: str = "text/html; charset=utf-8"
    retry_after: int = 0


@dataclass(frozen=True, slots=True)
class ServiceTimeouts:
    """What differs from `[timeouts]`, seconds."""

    connect: float | None = None
    upstream_head: float | None = None
    upstream_idle: float | None = None
    body_idle: float | None = None


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """What differs from `[health]`."""

    interval: float | None = None
    timeout: float | None = None
    rise: int | None = None
    fall: int | None = None
    statuses: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """How one service is served. Times are in seconds, sizes in bytes."""

    # Which backend
    balance: str = "round-robin"
    hash_on: str = ""  # header:NAME, cookie:NAME, path or host
    slow_start: float = 0.0
    sticky: Sticky | None = None
    # The terms of backends that name none
    health_path: str = ""
    max_in_flight: int = 0
    health: ServiceHealth | None = None
    # Bounds
    timeouts: ServiceTimeouts | None = None
    retries: int | None = None
    body_bytes: int | None = None
    queue_seconds: float | None = None
    queue_length: int | None = None
    # Who may come in
    allow: tuple[str, ...] = ()  # networks; all, when there is none
    deny: tuple[str, ...] = ()  # networks, before `allow`
    rate_limits: tuple[RateLimit, ...] = ()
    basic_auth: BasicAuth | None = None
    forward_auth: ForwardAuth | None = None
    maintenance: Maintenance | None = None
    # What is changed on the way
    request_headers: FieldChanges | None = None
    response_headers: FieldChanges | None = None


#: The policy of a service of which nothing was said.
DEFAULTS: Final = ServicePolicy()
