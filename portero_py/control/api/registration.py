"""POST and DELETE of /register: where backends join and leave.

A POST in order: secret and token (`core.admission`), then content type and body (`body`), then whether the
token is for this service and the address from an allowed network, then the leases. The answer is sent when
every worker routes by the new table, not before.

A DELETE takes the lease out of every table: no new exchange goes there, those that are going on finish. With
`wait_seconds` the answer comes when they have, or when the time is up: a backend may end then.

Nothing here logs a header or a body. What is logged of a body has passed its checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from portero_py.config.model import Registration
from portero_py.control.api import body
from portero_py.control.api.answers import answer
from portero_py.control.api.metrics import Metrics
from portero_py.control.api.waits import Waits
from portero_py.control.drains import Drains
from portero_py.control.leases import Leases, What
from portero_py.core.admission import Admission
from portero_py.core.auth import Claim, check_service
from portero_py.core.model import Lease
from portero_py.errors import PorteroError


class RegistrationEndpoint:
    """Leases of the source `api`. `wall_clock` gives seconds since the epoch, for tokens."""

    def __init__(
        self,
        config: Registration,
        leases: Leases,
        admission: Admission,
        metrics: Metrics,
        drains: Drains,
        waits: Waits,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._leases = leases
        self._admission = admission
        self._metrics = metrics
        self._drains = drains
        self._waits = waits
        self._clock = clock
        self._wall_clock = wall_clock

    async def post(self, request: web.Request) -> web.Response:
        """Register a backend, or renew its lease."""
        with _Counted(self._metrics) as counted:
            claim = self._admit(request)
            asked = body.lease_request(await body.read_json(request))
            check_service(claim, asked.service)
            body.check_network(asked.backend.host, self._config.backend_cidrs)
            granted = await self._leases.grant(asked)
            counted.result = "registered" if granted.what is What.REGISTERED else "renewed"
        lease = granted.lease
        assert lease.ttl_seconds is not None  # `body` lets nobody ask for ever
        return answer(
            {
                "status": "registered",
                "service_name": lease.service,
                "instance_id": lease.instance_id,
                "expires_in": lease.ttl_seconds,
                "renew_after": _renew_after(lease.ttl_seconds),
            }
        )

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """End a lease."""
        with _Counted(self._metrics) as counted:
            claim = self._admit(request)
            which = body.release(await body.read_json(request))
            check_service(claim, which.service)
            with self._waits.place(which.wait_seconds):
                lease = await self._leases.release(which.service, which.instance_id, which.host, which.port)
                counted.result = "deregistered"
                return await self._deregistered(request, lease, which.wait_seconds)

    # Private

    async def _deregistered(
        self, request: web.Request, lease: Lease, wait_seconds: float
    ) -> web.StreamResponse:
        def said(in_flight: int) -> dict[str, Any]:
            return {
                "status": "deregistered",
                "service_name": lease.service,
                "instance_id": lease.instance_id,
                "in_flight": in_flight,
            }

        over = self._drains.until_empty(lease, wait_seconds)
        return await self._waits.answer(request, wait_seconds, over, said)

    def _admit(self, request: web.Request) -> Claim:
        return self._admission.to_register(
            request.remote or "",
            request.headers.get("X-Register-Secret"),
            request.headers.get("Authorization"),
            now=self._clock(),
            wall_now=self._wall_clock(),
        )


class _Counted:
    """`with`: counts one answer to /register, by `result` or by the reason of the error that passes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.result = PorteroError.reason

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._metrics.registration(error.reason if isinstance(error, PorteroError) else self.result)


def _renew_after(ttl_seconds: int) -> float:
    """About a third, so that two renewals may fail: whole seconds unless the lease is shorter than three."""
    return ttl_seconds // 3 if ttl_seconds >= 3 else round(ttl_seconds / 3, 2)
