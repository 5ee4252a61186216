"""POST /backends/drain and /ready, /services/pause, /stop and /resume: what an operator does, by the secret.

A backend may be anybody's: what is meant is its address, with all that any source was granted for it. Asking
again for what is so already is fine: the answer says how it is.

Draining is left by /backends/ready only, or by the end of the lease. Otherwise what a backend's state is the
probes know: /backends/ready of one that does not drain changes nothing.

With `wait_seconds` the answer to a drain comes when nothing is in flight there, that to a ready when the
backend is ready, or when the time is up (`waits`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

from aiohttp import web

from portero_py.control.api import body
from portero_py.control.api.answers import answer
from portero_py.control.api.metrics import Metrics
from portero_py.control.api.waits import Waits
from portero_py.control.drains import Drains
from portero_py.control.leases import Leases
from portero_py.core.admission import Admission
from portero_py.core.model import Halt, Lease, LeaseState
from portero_py.errors import NoSuchLease, PorteroError

#: What a service is that nobody has paused or stopped.
SERVING: Final = "serving"

_log = logging.getLogger(__name__)


class ActionsEndpoint:
    """Backends are drained and made ready, services paused, stopped and resumed."""

    def __init__(
        self,
        leases: Leases,
        admission: Admission,
        metrics: Metrics,
        drains: Drains,
        waits: Waits,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._leases = leases
        self._admission = admission
        self._metrics = metrics
        self._drains = drains
        self._waits = waits
        self._clock = clock

    async def drain(self, request: web.Request) -> web.StreamResponse:
        """Send nothing new to a backend."""
        return await self._act("drain", request, self._drain)

    async def ready(self, request: web.Request) -> web.StreamResponse:
        """End the drain of a backend."""
        return await self._act("ready", request, self._ready)

    async def pause(self, request: web.Request) -> web.StreamResponse:
        """Hold the requests of a service."""
        return await self._act("pause", request, self._pause)

    async def stop(self, request: web.Request) -> web.StreamResponse:
        """Answer the requests of a service with 503."""
        return await self._act("stop", request, self._stop)

    async def resume(self, request: web.Request) -> web.StreamResponse:
        """Serve the requests of a service again."""
        return await self._act("resume", request, self._resume)

    # Private

    async def _act(
        self,
        action: str,
        request: web.Request,
        work: Callable[[web.Request, Mapping[str, Any]], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        with self._counted(action):
            secret = request.headers.get("X-Register-Secret")
            self._admission.to_read(request.remote or "", secret, now=self._clock())
            return await work(request, await body.read_json(request))

    async def _drain(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        which = body.backend(asked)
        with self._waits.place(which.wait_seconds):
            lease = await self._set_state(request, which, LeaseState.DRAINING)
            over = self._drains.until_empty(lease, which.wait_seconds)
            return await self._answer(request, which, lease, over)

    async def _ready(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        which = body.backend(asked)
        with self._waits.place(which.wait_seconds):
            lease = self._find(which)
            if lease.state is LeaseState.DRAINING:
                lease = await self._set_state(request, which, LeaseState.READY)
            over = self._drains.until_ready(lease, which.wait_seconds)
            return await self._answer(request, which, lease, over)

    async def _pause(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        service, halt = body.service(asked), body.pause(asked)
        await self._halt(request, service, halt)
        return answer({"service_name": service, "state": halt.state, "seconds": halt.seconds})

    async def _stop(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        service, halt = body.service(asked), body.stop(asked)
        await self._halt(request, service, halt)
        return answer({"service_name": service, "state": halt.state, "message": halt.message})

    async def _resume(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        service = body.service(asked)
        await self._halt(request, service, None)
        return answer({"service_name": service, "state": SERVING})

    def _find(self, which: body.Which) -> Lease:
        return self._leases.find(which.service, which.instance_id, which.host, which.port)

    async def _set_state(self, request: web.Request, which: body.Which, state: LeaseState) -> Lease:
        """The lease as it is then; there is none any more when it ended meanwhile."""
        lease = self._find(which)
        backend = lease.backend
        await self._leases.set_state(lease.service, backend.host, backend.port, state, _asked_by(request))
        return self._find(which)

    async def _halt(self, request: web.Request, service: str, halt: Halt | None) -> None:
        await self._leases.halt(service, halt, _asked_by(request))

    async def _answer(
        self, request: web.Request, which: body.Which, lease: Lease, over: asyncio.Future[int]
    ) -> web.StreamResponse:
        def said(in_flight: int) -> dict[str, Any]:
            try:
                state = self._find(which).state
            except NoSuchLease:
                state = lease.state  # its last one
            return {
                "service_name": lease.service,
                "instance_id": lease.instance_id,
                "host": lease.backend.host,
                "port": lease.backend.port,
                "state": state.value,
                "in_flight": in_flight,
            }

        return await self._waits.answer(request, which.wait_seconds, over, said)

    @contextlib.contextmanager
    def _counted(self, action: str) -> Iterator[None]:
        """Count one answer, `ok` or the reason of the error that passes."""
        result = PorteroError.reason
        try:
            yield
            result = "ok"
        except PorteroError as error:
            result = error.reason
            raise
        finally:
            self._metrics.action(action, result)


def _asked_by(request: web.Request) -> str:
    return f"asked by {request.remote or 'nobody known'}"
