"""The registration API put together: its routes, and the server that stands behind its door.

An endpoint or a page is a file beside this one, and a row in `_application`. All of them ask the same
`Admission`, so that who guesses secrets at one is slowed down at all.

Connections are bounded in number and time by `open_server`: the API is often where strangers are too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from portero_py.config.model import Registration
from portero_py.control.api.actions import ActionsEndpoint
from portero_py.control.api.backends import BackendsEndpoint, nothing_known
from portero_py.control.api.metrics import Metrics, content_type
from portero_py.control.api.problems import answer_errors
from portero_py.control.api.registration import RegistrationEndpoint
from portero_py.control.api.state import State
from portero_py.control.api.status import Status
from portero_py.control.api.waits import Waits
from portero_py.control.drains import Drains
from portero_py.control.leases import Leases
from portero_py.control.open_server import MAX_CONNECTIONS, Door, quiet_logger
from portero_py.control.tasks import Tasks
from portero_py.core.admission import Admission
from portero_py.core.auth import TokenVerifier
from portero_py.errors import ConfigError


class RegistrationApi:
    """The leases on HTTP.

    `clock` is the one of the leases; `wall_clock` gives seconds since the epoch, for tokens. `faults` names
    the tasks that failed lately, for /readyz; `error_at` gives the last error of a backend of a service, by
    host and port, "" for none. Sites that let strangers in stand behind `door`. Raises
    ConfigError without a secret or a usable key.
    """

    def __init__(
        self,
        config: Registration,
        leases: Leases,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        faults: Callable[[], Iterable[str]] = tuple,
        max_connections: int = MAX_CONNECTIONS,
        error_at: Callable[[str, str, int], str] = nothing_known,
    ) -> None:
        if not config.secret:
            raise ConfigError("no register secret is configured")
        self.door = Door("the registration API", max_connections)
        self._metrics = metrics
        admission = Admission(config.secret, TokenVerifier(config.hmac_keys, config.audience, config.issuer))
        self._tasks = Tasks(metrics.fault)
        self._drains = Drains(leases)
        waits = Waits(self.door)
        self._status = Status(lambda: {*faults(), *self._tasks.faults})
        self._actions = ActionsEndpoint(leases, admission, metrics, self._drains, waits, clock=clock)
        self._backends = BackendsEndpoint(
            leases, admission, clock=clock, wall_clock=wall_clock, error_at=error_at
        )
        self._registration = RegistrationEndpoint(
            config, leases, admission, metrics, self._drains, waits, clock=clock, wall_clock=wall_clock
        )

    @property
    def state(self) -> State:
        """What /readyz says."""
        return self._status.state

    @state.setter
    def state(self, state: State) -> None:
        self._status.state = state

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

    # Private

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
                web.post("/register", self._registration.post),
                web.delete("/register", self._registration.delete),
                web.get("/health", self._status.live),
                web.get("/livez", self._status.live),
                web.get("/readyz", self._status.ready),
                web.get("/metrics", self._scrape),
                web.get("/backends", self._backends.get),
                web.post("/backends/drain", self._actions.drain),
                web.post("/backends/ready", self._actions.ready),
                web.post("/services/pause", self._actions.pause),
                web.post("/services/stop", self._actions.stop),
                web.post("/services/resume", self._actions.resume),
            ]
        )
        application.on_startup.append(self._start)
        application.on_shutdown.append(self._shut_down)
        application.on_cleanup.append(self._clean_up)
        return application

    async def _start(self, _: web.Application) -> None:
        self._tasks.own(self._drains.run, "drains")

    async def _shut_down(self, _: web.Application) -> None:
        self._drains.close()

    async def _clean_up(self, _: web.Application) -> None:
        await self._tasks.close()

    async def _scrape(self, request: web.Request) -> web.Response:
        text = await self._metrics.scrape()
        return web.Response(body=text, headers={"Content-Type": content_type()})
