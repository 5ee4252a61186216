"""GET /backends: what the registry holds, for those who know the secret."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from aiohttp import web

from portero_py.control.api.answers import answer
from portero_py.control.leases import Leases
from portero_py.core.admission import Admission
from portero_py.core.model import Lease, Service


class BackendsEndpoint:
    """The services, by name, and their backends. What has ended is not shown, swept or not."""

    def __init__(self, leases: Leases, admission: Admission, *, clock: Callable[[], float]) -> None:
        self._leases = leases
        self._admission = admission
        self._clock = clock

    async def get(self, request: web.Request) -> web.Response:
        """Answer a GET."""
        now = self._clock()
        self._admission.to_read(request.remote or "", request.headers.get("X-Register-Secret"), now=now)
        table = self._leases.table
        services = [_service_said(service, now) for _, service in sorted(table.services.items())]
        return answer(
            {"version": table.version, "default_service": table.default_service, "services": services}
        )


# Private


def _service_said(service: Service, now: float) -> dict[str, Any]:
    backends = [_lease_said(lease, now) for lease in service.leases if now < lease.ends_at]
    return {"service_name": service.name, "backends": backends}


def _lease_said(lease: Lease, now: float) -> dict[str, Any]:
    return {
        "instance_id": lease.instance_id,
        "host": lease.backend.host,
        "port": lease.backend.port,
        "use_tls": lease.backend.use_tls,
        "protocol": lease.backend.protocol,
        "weight": lease.weight,
        "source": lease.source,
        "state": lease.state.value,
        "expires_in": None if math.isinf(lease.ends_at) else round(lease.ends_at - now, 1),
    }
