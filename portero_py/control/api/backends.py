"""GET /backends: what the registry holds and how it is, for those who know the secret.

Routes and policies are shown as an operator wrote them, but for what is secret or long: `said_policy`.

A worker that does not answer in time is not waited for: `in_flight` and `ejected` are then without it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from portero_py.control.api.answers import answer
from portero_py.control.leases import Leases
from portero_py.core.admission import Admission
from portero_py.core.model import Lease, LeaseState
from portero_py.core.policies import DEFAULTS, BasicAuth, Maintenance, ServicePolicy
from portero_py.core.routes import Route
from portero_py.feed.feed import Standings


class BackendsEndpoint:
    """The services, by name, and their backends. What has ended is not shown, swept or not.

    `clock` is the one of the leases, `wall_clock` gives seconds since the epoch, `error_at` the last error of
    a backend of a service, by host and port.
    """

    def __init__(
        self,
        leases: Leases,
        admission: Admission,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        error_at: Callable[[str, str, int], str],
    ) -> None:
        self._leases = leases
        self._admission = admission
        self._clock = clock
        self._wall_clock = wall_clock
        self._error_at = error_at

    async def get(self, request: web.Request) -> web.Response:
        """Answer a GET."""
        secret = request.headers.get("X-Register-Secret")
        self._admission.to_read(request.remote or "", secret, now=self._clock())
        standings = await self._leases.standings()
        table, now = self._leases.table, self._clock()
        epoch = self._wall_clock() - now
        services = [
            {
                "service_name": service.name,
                "state": "serving" if service.halt is None else service.halt.state,
                "policy": None if service.policy is None else said_policy(service.policy),
                "backends": [
                    self._said(lease, standings, now, epoch)
                    for lease in service.leases
                    if now < lease.ends_at
                ],
            }
            for _, service in sorted(table.services.items())
        ]
        return answer(
            {
                "version": table.version,
                "default_service": table.default_service,
                "routes": [said_route(route) for route in table.routes.routes],
                "services": services,
            }
        )

    # Private

    def _said(self, lease: Lease, standings: Standings, now: float, epoch: float) -> dict[str, Any]:
        place = lease.service, lease.backend.host, lease.backend.port
        told, seen = self._error_at(*place), standings.errors.get(place, "")
        if lease.state is LeaseState.READY and seen:  # what probes found before it was ready is history
            told = ""
        return {
            "instance_id": lease.instance_id,
            "host": lease.backend.host,
            "port": lease.backend.port,
            "use_tls": lease.backend.use_tls,
            "tls_fingerprint": lease.backend.tls_fingerprint,
            "protocol": lease.backend.protocol,
            "weight": lease.weight,
            "max_in_flight": lease.max_in_flight,
            "health_path": lease.health_path,
            "source": lease.source,
            "also": [other.instance_id for other in lease.also],
            "state": lease.state.value,
            "since": _utc(epoch + lease.since),
            "last_error": told or (f"worker: {seen}" if seen else ""),
            "in_flight": standings.in_flight_at(*place),
            "ejected": standings.ejected.get(place, 0),
            "expires_in": None if math.isinf(lease.ends_at) else round(lease.ends_at - now, 1),
        }


def said_policy(policy: ServicePolicy) -> dict[str, Any]:
    """What of a policy differs from the defaults; of pages and hashes of passwords only which they are."""
    found: dict[str, Any] = {}
    for each in fields(ServicePolicy):
        value = getattr(policy, each.name)
        if value == getattr(DEFAULTS, each.name):
            continue
        if isinstance(value, BasicAuth):
            users = {name: _which(hashed) for name, hashed in value.users}
            found[each.name] = {"realm": value.realm, "users": users}
        elif isinstance(value, Maintenance):
            found[each.name] = {
                **asdict(value),
                "page": f"{len(value.page)} characters, {_which(value.page)}",
            }
        elif is_dataclass(value) and not isinstance(value, type):
            said = asdict(value)
            found[each.name] = {name: inner for name, inner in said.items() if inner not in (None, ())}
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            found[each.name] = [asdict(inner) for inner in value]
        else:
            found[each.name] = list(value) if isinstance(value, tuple) else value
    return found


def said_route(route: Route) -> dict[str, Any]:
    """A route, with what matters of it."""
    where = {"host": route.host, "path": route.path}
    if route.redirect:
        return {**where, "redirect": route.redirect, "status": route.status}
    return {**where, "service": route.service, "strip_path": route.strip_path}


def nothing_known(service: str, host: str, port: int) -> str:
    """Where nobody probes."""
    return ""


# Private


def _which(text: str) -> str:
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _utc(seconds: float) -> str:
    # Rounded: how far the two clocks are apart differs a little each time.
    return datetime.fromtimestamp(round(seconds), UTC).isoformat().replace("+00:00", "Z")
