"""GET /backends: state, since when, what went wrong last, and what the workers say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import ClientSession, web

from portero_py.control.api.backends import BackendsEndpoint
from portero_py.control.leases import Leases
from portero_py.core.admission import Admission
from portero_py.core.auth import TokenVerifier
from portero_py.core.counters import Counters
from portero_py.core.model import Backend, Halt, LeaseRequest, LeaseState, Standing
from portero_py.core.policies import (
    DEFAULTS,
    BasicAuth,
    FieldChanges,
    Maintenance,
    RateLimit,
    ServicePolicy,
    ServiceTimeouts,
)
from portero_py.core.registry import Registry
from portero_py.core.routes import Route, Routes
from portero_py.feed.feed import Feed

SECRET = "s" * 40
WALL = 1_700_000_000.0


class Worker:
    """Says what it was told to say of backends; late, when it has been told so."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.says: list[Standing] | asyncio.Future[list[Standing]] = []

    def apply(self, table: object) -> None: ...

    def apply_certificates(self, certificates: object) -> None: ...

    def apply_challenges(self, challenges: object) -> None: ...

    def standings(self, service: str) -> list[Standing] | asyncio.Future[list[Standing]]:
        return self.says


class Desk:
    """The endpoint, two workers, and a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.workers = Worker(), Worker()
        self.feed = Feed(ack_seconds=0.05)
        for worker in self.workers:
            self.feed.subscribe(worker)
        self.errors: dict[tuple[str, str, int], str] = {}
        self.leases = Leases(Registry(), self.feed, clock=lambda: self.now, count_fault=lambda _: None)
        self.client: ClientSession

    async def services(self) -> list[dict[str, Any]]:
        async with self.client.get("/backends", headers={"X-Register-Secret": SECRET}) as response:
            assert response.status == 200
            found: list[dict[str, Any]] = (await response.json())["services"]
            return found

    async def backend(self) -> dict[str, Any]:
        [service] = await self.services()
        [backend] = service["backends"]
        assert isinstance(backend, dict)
        return backend


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    one = Desk()
    endpoint = BackendsEndpoint(
        one.leases,
        Admission(SECRET, TokenVerifier([("", "k" * 32)])),
        clock=lambda: one.now,
        wall_clock=lambda: WALL + one.now,
        error_at=lambda *place: one.errors.get(place, ""),
    )
    application = web.Application()
    application.add_routes([web.get("/backends", endpoint.get)])
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await one.leases.start()
    async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as one.client:
        yield one
    await runner.cleanup()
    await one.leases.close()


ASKED = LeaseRequest("app.example", Backend("::1", 80), None, health_path="/up", max_in_flight=7)


async def test_a_state_is_shown_with_the_time_since_when(desk: Desk) -> None:
    await desk.leases.grant(ASKED)
    desk.now += 100
    shown = await desk.backend()
    assert (shown["state"], shown["since"]) == ("starting", "2023-11-14T22:30:00Z")
    assert (shown["health_path"], shown["max_in_flight"], shown["expires_in"]) == ("/up", 7, None)
    await desk.leases.set_state("app.example", "::1", 80, LeaseState.READY)
    desk.now += 0.6
    shown = await desk.backend()
    assert (shown["state"], shown["since"]) == ("ready", "2023-11-14T22:31:40Z")


async def test_what_the_workers_say_is_added_up(desk: Desk) -> None:
    await desk.leases.grant(ASKED)
    standing = Standing("app.example", "::1", 80, in_flight=3)
    desk.workers[0].says = [standing, Standing("other.example", "::1", 80, 100)]
    desk.workers[1].says = [replace(standing, in_flight=4, is_ejected=True)]
    shown = await desk.backend()
    assert (shown["in_flight"], shown["ejected"]) == (7, 1)


async def test_a_worker_that_does_not_answer_is_not_waited_for(desk: Desk) -> None:
    await desk.leases.grant(ASKED)
    desk.workers[0].says = [Standing("app.example", "::1", 80, 3)]
    desk.workers[1].says = asyncio.get_running_loop().create_future()
    assert (await desk.backend())["in_flight"] == 3


async def test_the_last_error_is_the_probes_or_a_workers(desk: Desk) -> None:
    await desk.leases.grant(ASKED)
    assert (await desk.backend())["last_error"] == ""
    desk.workers[1].says = [Standing("app.example", "::1", 80, error="reset by the backend")]
    assert (await desk.backend())["last_error"] == "worker: reset by the backend"
    desk.errors["app.example", "::1", 80] = "probe: status 500 at /up"
    assert (await desk.backend())["last_error"] == "probe: status 500 at /up"
    await desk.leases.set_state("app.example", "::1", 80, LeaseState.READY)
    assert (await desk.backend())["last_error"] == "worker: reset by the backend"


async def test_a_service_is_serving_paused_or_stopped(desk: Desk) -> None:
    await desk.leases.grant(ASKED)
    seen = []
    for halt in (None, Halt(30), Halt(None, "back soon")):
        await desk.leases.halt("app.example", halt)
        seen += [service["state"] for service in await desk.services()]
    assert seen == ["serving", "paused", "stopped"]


async def test_policies_and_routes_are_shown_without_what_is_secret(desk: Desk) -> None:
    hashed = "$2b$10$" + "h" * 53
    policy = ServicePolicy(
        balance="hash",
        hash_on="path",
        allow=("10.0.0.0/8",),
        timeouts=ServiceTimeouts(connect=1),
        rate_limits=(RateLimit(5),),
        basic_auth=BasicAuth((("ann", hashed),)),
        maintenance=Maintenance("<p>soon</p>"),
        request_headers=FieldChanges(set=(("X-A", "b"),)),
    )
    routes = Routes(
        [Route("www.example", "/api", "app.example", True), Route("old.example", redirect="https://x$uri")]
    )
    policies = {"app.example": policy, "plain.example": DEFAULTS}
    await desk.leases.configure(policies, routes, "", "static", [replace(ASKED, service="app.example")])
    await desk.leases.grant(ASKED)
    async with desk.client.get("/backends", headers={"X-Register-Secret": SECRET}) as response:
        text = await response.text()
        found = json.loads(text)
    assert hashed not in text
    assert "soon" not in text
    assert found["routes"] == [
        {"host": "www.example", "path": "/api", "service": "app.example", "strip_path": True},
        {"host": "old.example", "path": "", "redirect": "https://x$uri", "status": 308},
    ]
    app, plain = found["services"]
    assert plain["policy"] is None
    users = app["policy"]["basic_auth"]["users"]
    assert users["ann"].startswith("sha256 ")
    assert app["policy"] == {
        "balance": "hash",
        "hash_on": "path",
        "allow": ["10.0.0.0/8"],
        "timeouts": {"connect": 1},
        "rate_limits": [{"requests": 5, "seconds": 1.0, "key": "client"}],
        "basic_auth": {"realm": "restricted", "users": users},
        "maintenance": {
            "page": f"11 characters, {app['policy']['maintenance']['page'].partition(', ')[2]}",
            "content_type": "text/html; charset=utf-8",
            "retry_after": 0,
        },
        "request_headers": {"set": [["X-A", "b"]]},
    }
    [backend] = app["backends"]
    assert (backend["source"], backend["also"]) == ("static", ["[::1]:80"])
