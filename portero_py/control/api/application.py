"""The registration API: where backends join, and operators look (DESIGN.md, section 6).

A POST in order: secret and token (`core.admission`), then content type and body (`registration_body`), then
whether the token is for this service and the address from an allowed network, then the registry, then
the feed. The answer is sent when every worker routes by the new table, not before.

A DELETE takes the lease out of every table: no new exchange goes there, those that are going on finish.

Expired leases are swept by one task that sleeps until the next expiry. It may be a little late, so that
leases that end together are one new table: the workers look at the expiry themselves.

Connections are bounded in number and time by `open_server`: the API is often where strangers are too.

Nothing here logs a header or a body. What is logged of a body has passed its checks.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from typing import Any, Final

import orjson
from aiohttp import web

from portero_py.config.model import Registration
from portero_py.control.api import body
from portero_py.control.api.metrics import CONTENT_TYPE, Metrics
from portero_py.control.api.problems import answer_errors
from portero_py.control.open_server import MAX_CONNECTIONS, Door, quiet_logger
from portero_py.control.tasks import Tasks
from portero_py.core.admission import Admission
from portero_py.core.auth import Claim, TokenVerifier, check_service
from portero_py.core.model import Lease, Service
from portero_py.core.registry import Registry
from portero_py.errors import BadJson, BodyTimeout, ConfigError, NotJson, PorteroError, RegistrationTooLarge
from portero_py.feed.feed import Feed

MAX_BODY: Final = 64 * 1024

#: Seconds that an admitted peer has for sending its body.
BODY_TIMEOUT: Final = 10.0

#: Seconds that the sweep waits after an expiry for others to come.
SWEEP_DELAY: Final = 0.25

_NO_STORE: Final = {"Cache-Control": "no-store"}

_log = logging.getLogger(__name__)


class State(Enum):
    """What /readyz tells a load balancer in front."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class RegistrationApi:
    """One registry on HTTP. `start` before the first request, `close` at the end.

    `clock` is a steady clock in seconds, the one that the workers compare expiries with; `wall_clock` gives
    seconds since the epoch, for tokens. `registered` is told of every service that registers; `faults` names
    the tasks that failed lately, for /readyz. Sites that let strangers in stand behind `door`. Raises
    ConfigError without a secret or a usable key.
    """

    def __init__(
        self,
        config: Registration,
        registry: Registry,
        feed: Feed,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        registered: Callable[[str], None] | None = None,
        faults: Callable[[], Iterable[str]] = tuple,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        if not config.secret:
            raise ConfigError("no register secret is configured")
        self.state = State.STARTING
        self.door = Door("the registration API", max_connections)
        self._config = config
        self._registry = registry
        self._feed = feed
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._registered = registered
        self._admission = Admission(
            config.secret, TokenVerifier(config.hmac_keys, config.audience, config.issuer)
        )
        self._faults = faults
        self._tasks = Tasks(metrics.fault)
        self._sweep_at = math.inf
        self._sooner = asyncio.Event()  # an expiry came up that is earlier than `_sweep_at`

    def runner(self) -> web.AppRunner:
        """The API for sites to run: `await runner.setup()` first, `await runner.cleanup()` at the end."""
        # No access log: its format could be made to hold the secrets. Bodies stay as they are: no bombs.
        return web.AppRunner(
            self._application(),
            access_log=None,
            auto_decompress=False,
            logger=quiet_logger,
            handle_signals=False,
        )

    async def start(self) -> None:
        """Publish the first table and begin to sweep."""
        await self._feed.publish(self._registry.table)
        self._tasks.own(self._sweep_for_ever, "sweep")

    async def close(self) -> None:
        """Stop sweeping. Leases stay as they are."""
        await self._tasks.close()

    async def sweep(self) -> None:
        """Drop what has expired by now and, if anything did, publish the table."""
        version = self._registry.table.version
        for lease in self._registry.expire(self._clock()):
            _log.info("expired: %s", _said(lease))
        if self._registry.table.version != version:
            await self._feed.publish(self._registry.table)

    # Private: requests

    def _application(self) -> web.Application:
        @web.middleware
        async def behind_the_door(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            response: web.StreamResponse = await self.door.busy(request, handler)
            return response

        application = web.Application(middlewares=[behind_the_door, answer_errors])
        application.add_routes(
            [
                web.post("/register", self._on_register),
                web.delete("/register", self._on_deregister),
                web.get("/health", self._on_health),
                web.get("/livez", self._on_health),
                web.get("/readyz", self._on_ready),
                web.get("/metrics", self._on_metrics),
                web.get("/backends", self._on_backends),
            ]
        )
        return application

    async def _on_register(self, request: web.Request) -> web.Response:
        with _Counted(self._metrics) as answer:
            claim = self._admit(request)
            asked = body.lease_request(await _json(request))
            check_service(claim, asked.service)
            body.check_network(asked.backend.host, self._config.backend_cidrs)
            former = self._registry.find(
                asked.service, asked.instance_id, asked.backend.host, asked.backend.port
            )
            lease = self._registry.register(asked, self._clock())
            self._sweep_sooner()
            await self._feed.publish(self._registry.table)
            answer.result = "registered" if former is None else "renewed"
            _log_granted(lease, former)
            if self._registered is not None:
                self._registered(lease.service)
        return _answer(
            {
                "status": "registered",
                "service_name": lease.service,
                "instance_id": lease.instance_id,
                "expires_in": lease.ttl_seconds,
                "renew_after": _renew_after(lease.ttl_seconds),
            }
        )

    async def _on_deregister(self, request: web.Request) -> web.Response:
        with _Counted(self._metrics) as answer:
            claim = self._admit(request)
            which = body.release(await _json(request))
            check_service(claim, which.service)
            lease = self._registry.release(
                which.service, which.instance_id, which.host, which.port, now=self._clock()
            )
            self._sweep_sooner()
            await self._feed.publish(self._registry.table)
            answer.result = "deregistered"
            _log.info("deregistered: %s", _said(lease))
        return _answer(
            {"status": "deregistered", "service_name": lease.service, "instance_id": lease.instance_id}
        )

    async def _on_backends(self, request: web.Request) -> web.Response:
        self._admission.to_read(
            request.remote or "", request.headers.get("X-Register-Secret"), now=self._clock()
        )
        table, now = self._registry.table, self._clock()
        services = [_service_said(service, now) for _, service in sorted(table.services.items())]
        return _answer(
            {
                "version": table.version,
                "default_service": table.default_service,
                "services": services,
            }
        )

    async def _on_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._metrics.scrape(), headers={"Content-Type": CONTENT_TYPE})

    async def _on_health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok", headers=_NO_STORE)

    async def _on_ready(self, request: web.Request) -> web.Response:
        faults = sorted({*self._tasks.faults, *self._faults()})
        if self.state is State.READY and faults:
            return web.Response(text=f"fault: {', '.join(faults)}", status=503, headers=_NO_STORE)
        status = 200 if self.state is State.READY else 503
        return web.Response(text=self.state.value, status=status, headers=_NO_STORE)

    def _admit(self, request: web.Request) -> Claim:
        return self._admission.to_register(
            request.remote or "",
            request.headers.get("X-Register-Secret"),
            request.headers.get("Authorization"),
            now=self._clock(),
            wall_now=self._wall_clock(),
        )

    # Private: the sweep

    def _sweep_sooner(self) -> None:
        due = self._registry.next_expiry()
        if due is not None and due < self._sweep_at:
            self._sooner.set()

    async def _sweep_for_ever(self) -> None:
        while True:
            due = self._registry.next_expiry()
            self._sweep_at = math.inf if due is None else due
            self._sooner.clear()
            wait = None if due is None else max(due - self._clock(), 0.0) + SWEEP_DELAY
            try:
                await asyncio.wait_for(self._sooner.wait(), wait)
            except TimeoutError:
                try:
                    await self.sweep()
                except Exception:
                    _log.exception("the sweep of expired leases failed; it goes on")
                    self._metrics.fault("sweep")


class _Counted:
    """`with`: counts one answer to /register, by `result` or by the reason of the error that passes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.result = PorteroError.reason

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._metrics.registration(error.reason if isinstance(error, PorteroError) else self.result)


async def _json(request: web.Request) -> Any:
    if request.content_type != "application/json":
        raise NotJson("the Content-Type must be application/json")
    if "Content-Encoding" in request.headers:
        raise NotJson("the body must not be compressed")
    return body.parse_json(await _body(request))


async def _body(request: web.Request) -> bytes:
    too_large = RegistrationTooLarge(f"the body is over {MAX_BODY} bytes")
    if (request.content_length or 0) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError as error:
        raise BodyTimeout(f"the body did not come within {BODY_TIMEOUT:.0f} seconds") from error
    except (web.RequestPayloadError, ConnectionError) as error:
        raise BadJson("the body broke off") from error
    return bytes(body)


def _answer(content: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(content), content_type="application/json", headers=_NO_STORE)


def _renew_after(ttl_seconds: int) -> float:
    """About a third, so that two renewals may fail: whole seconds unless the lease is shorter than three."""
    return ttl_seconds // 3 if ttl_seconds >= 3 else round(ttl_seconds / 3, 2)


def _service_said(service: Service, now: float) -> dict[str, Any]:
    return {
        "service_name": service.name,
        "backends": [
            {
                "instance_id": lease.instance_id,
                "host": lease.backend.host,
                "port": lease.backend.port,
                "use_tls": lease.backend.use_tls,
                "protocol": lease.backend.protocol,
                "weight": lease.weight,
                "state": "serving" if now < lease.expires_at else "expired",
                "expires_in": round(max(lease.expires_at - now, 0.0), 1),
            }
            for lease in service.leases
        ],
    }


def _log_granted(lease: Lease, former: Lease | None) -> None:
    if former is None:
        _log.info("registered: %s for %d s", _said(lease), lease.ttl_seconds)
    elif former.backend != lease.backend:
        _log.info("moved: %s, was %s", _said(lease), former.backend.address)
    else:
        _log.debug("renewed: %s for %d s", _said(lease), lease.ttl_seconds)


def _said(lease: Lease) -> str:
    scheme = "https" if lease.backend.use_tls else "http"
    address = f"{scheme}://{lease.backend.address}"
    instance = "" if lease.instance_id == lease.backend.address else f" ({lease.instance_id})"
    return f"{lease.service} at {address}{instance}"
