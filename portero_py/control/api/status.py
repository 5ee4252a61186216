"""/health, /livez and /readyz: for load balancers in front, for supervisors, for deployments that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from aiohttp import web

from portero_py.control.api.answers import NO_STORE
from portero_py.control.api.state import State


class Status:
    """What this portero says of itself. `faults` names the tasks that failed lately."""

    def __init__(self, faults: Callable[[], Iterable[str]]) -> None:
        self.state = State.STARTING
        self._faults = faults

    async def live(self, request: web.Request) -> web.Response:
        """Answer a GET of /health or /livez: who answers, lives."""
        return web.Response(text="ok", headers=NO_STORE)

    async def ready(self, request: web.Request) -> web.Response:
        """Answer a GET of /readyz: 200 while clients are welcome and nothing has failed lately."""
        faults = sorted(self._faults())
        if self.state is State.READY and faults:
            return web.Response(text=f"fault: {', '.join(faults)}", status=503, headers=NO_STORE)
        status = 200 if self.state is State.READY else 503
        return web.Response(text=self.state.value, status=status, headers=NO_STORE)
