"""GET /backends: what the registry holds and how it is, for those who know the secret.

A worker that does not answer in time is not waited for: `in_flight` and `ejected` are then without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from portero_py.control.api.answers import answer
from portero_py.control.leases import Leases
from portero_py.core.admission import Admission
from portero_py.core.model import Lease, LeaseState
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
                "backends": [
                    self._said(lease, standings, now, epoch)
                    for lease in service.leases
                    if now < lease.ends_at
                ],
            }
            for _, service in sorted(table.services.items())
        ]
        return answer(
            {"version": table.version, "default_service": table.default_service, "services": services}
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
            "protocol": lease.backend.protocol,
            "weight": lease.weight,
            "max_in_flight": lease.max_in_flight,
            "health_path": lease.health_path,
            "source": lease.source,
            "state": lease.state.value,
            "since": _utc(epoch + lease.since),
            "last_error": told or (f"worker: {seen}" if seen else ""),
            "in_flight": standings.in_flight_at(*place),
            "ejected": standings.ejected.get(place, 0),
            "expires_in": None if math.isinf(lease.ends_at) else round(lease.ends_at - now, 1),
        }


def nothing_known(service: str, host: str, port: int) -> str:
    """Where nobody probes."""
    return ""


# Private


def _utc(seconds: float) -> str:
    # Rounded: how far the two clocks are apart differs a little each time.
    return datetime.fromtimestamp(round(seconds), UTC).isoformat().replace("+00:00", "Z")
