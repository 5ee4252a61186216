"""Leases that are kept for others, through an API that answers as it is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from portero_py.client import registrar
from portero_py.client.discovery import keepers as module
from portero_py.client.discovery.keepers import Keepers
from portero_py.client.registrar import Api, Registration

WEB = Registration("app.example", "10.0.0.1", 80, instance_id="docker-e-web-80")
MOVED = Registration("app.example", "10.0.0.2", 80, instance_id="docker-e-web-80")
OTHER = Registration("app.example", "10.0.0.3", 80, instance_id="docker-e-other-80")


class ScriptedApi:
    """Grants what it is asked for, unless `answers` has something else for the method; status 0 is none."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []  # method, and instance id or address
        self.answers: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.listing: dict[str, Any] = {"services": []}
        self.granted: dict[str, str] = {}
        self.held: asyncio.Event | None = None
        self.delay = 0.0
        self.expires_in, self.renew_after = 60.0, 20.0
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == "/backends":
            assert request.headers["X-Register-Secret"] == "hush"
            return web.json_response(self.listing)
        body = await request.json()
        name = body["instance_id"]
        self.requests.append((request.method, name))
        if self.held is not None:
            await self.held.wait()
        await asyncio.sleep(self.delay)
        scripted = self.answers.get(request.method)
        if scripted:
            status, said = scripted.pop(0) if len(scripted) > 1 else scripted[0]
            if not status:
                assert request.transport is not None
                request.transport.abort()
            if status != 200:
                return web.json_response(said, status=status or 500)
        if request.method == "POST":
            self.granted[name] = body["host"]
            return web.json_response({"expires_in": self.expires_in, "renew_after": self.renew_after})
        known = self.granted.pop(name, None) is not None
        return web.json_response({"in_flight": 2}, status=200 if known else 404)

    def methods(self) -> list[str]:
        return [method for method, _ in self.requests]


@pytest.fixture
async def api() -> AsyncIterator[ScriptedApi]:
    scripted = ScriptedApi()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", scripted.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield scripted
    await runner.cleanup()


def keeping(api: ScriptedApi) -> Keepers:
    return Keepers(Api(api.url, "hush", "k" * 32))


async def until(check: Any) -> None:
    async with asyncio.timeout(60):
        while not check():
            await asyncio.sleep(0.005)


async def test_what_is_wanted_is_granted_renewed_and_given_back(
    api: ScriptedApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "portero_py")
    async with keeping(api) as keepers:
        api.renew_after = 0.05
        keepers.want("web", "web", [WEB])
        assert keepers.names == {("app.example", "docker-e-web-80")}
        await until(lambda: api.methods() == ["POST"] * 4)
        keepers.want("web", "web", [WEB])
        keepers.want("web", "", [], "it has ended")
        assert keepers.names == set()
        await until(lambda: not api.granted)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("portero_py.")] == [
        "web: app.example at 10.0.0.1:80 is registered",
        "web: app.example at 10.0.0.1:80 is deregistered: it has ended, 2 in flight",
    ]


async def test_what_was_never_granted_is_not_given_back(api: ScriptedApi) -> None:
    api.answers["POST"] = [(403, {"detail": "no"})]
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(api.methods)
        keepers.want("web", "", [])
        await asyncio.sleep(0.1)
    assert set(api.methods()) == {"POST"}


@pytest.mark.parametrize("status", [0, 500])
async def test_what_may_have_been_granted_is_given_back(api: ScriptedApi, status: int) -> None:
    api.answers["POST"] = [(status, {})]
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(api.methods)
        await asyncio.sleep(0.05)
        keepers.want("web", "", [])
        await until(lambda: "DELETE" in api.methods())
    assert api.methods()[-1] == "DELETE"


async def test_the_end_of_a_lease_does_not_overtake_its_renewal(api: ScriptedApi) -> None:
    api.held = asyncio.Event()
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(api.methods)
        keepers.want("web", "", [])
        await asyncio.sleep(0.1)
        assert api.methods() == ["POST"]
        api.held.set()
        await until(lambda: api.methods() == ["POST", "DELETE"])
        await until(lambda: not api.granted)


async def test_what_is_wanted_again_while_it_is_given_back_is_granted_again(api: ScriptedApi) -> None:
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(lambda: api.granted)
        api.held = asyncio.Event()
        keepers.want("web", "", [])
        await until(lambda: "DELETE" in api.methods())
        keepers.want("web", "web", [WEB])
        api.held.set()
        await until(lambda: api.methods() == ["POST", "DELETE", "POST"])
        await until(lambda: api.granted)


async def test_what_moves_is_said_at_once_and_under_the_same_name(api: ScriptedApi) -> None:
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(lambda: api.granted)
        keepers.want("web", "web", [MOVED])
        await until(lambda: api.granted == {"docker-e-web-80": "10.0.0.2"})
    assert api.methods() == ["POST", "POST"]


async def test_a_goodbye_that_fails_is_said_again_until_the_lease_has_ended(
    api: ScriptedApi, caplog: pytest.LogCaptureFixture
) -> None:
    async with keeping(api) as keepers:
        api.expires_in = 3.0
        keepers.want("web", "web", [WEB])
        await until(lambda: api.granted)
        api.answers["DELETE"] = [(503, {"detail": "busy"})]
        keepers.want("web", "", [], "it has ended")
        async with asyncio.timeout(60):
            while keepers._tasks:
                await asyncio.sleep(0.01)
    assert api.methods().count("DELETE") > 1
    assert len([each for each in caplog.messages if "is not deregistered (it has ended)" in each]) == 1


async def test_a_lease_that_is_gone_already_is_as_good_as_given_back(
    api: ScriptedApi, caplog: pytest.LogCaptureFixture
) -> None:
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(lambda: api.granted)
        api.granted.clear()
        keepers.want("web", "", [])
        async with asyncio.timeout(60):
            while keepers._tasks:
                await asyncio.sleep(0.01)
    assert api.methods() == ["POST", "DELETE"]
    assert "not deregistered" not in caplog.text


async def test_closing_leaves_what_is_wanted_and_finishes_what_is_not(api: ScriptedApi) -> None:
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        keepers.want("other", "other", [OTHER])
        await until(lambda: len(api.granted) == 2)
        keepers.want("web", "", [])
    assert api.granted == {"docker-e-other-80": "10.0.0.3"}


async def test_closing_does_not_wait_for_an_api_that_hangs(
    api: ScriptedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GOODBYE_TIMEOUT", 0.1)
    async with asyncio.timeout(60), keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(lambda: api.granted)
        api.held = asyncio.Event()
        keepers.want("web", "", [])
        await until(lambda: "DELETE" in api.methods())
    api.held.set()


async def test_a_fault_of_our_own_ends_no_lease(
    api: ScriptedApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "AFTER_FAULT", 0.01)
    faults = [ZeroDivisionError(), None]

    def draw() -> float:
        fault = faults.pop(0) if len(faults) > 1 else None
        if fault is not None:
            raise fault
        return 0.5

    monkeypatch.setattr(module, "_draw", draw)
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(lambda: len(api.requests) == 2)
    assert "web: a lease could not be seen to" in caplog.text


async def test_only_ours_that_nobody_wants_are_released(api: ScriptedApi) -> None:
    def backend(instance_id: str) -> dict[str, Any]:
        return {"instance_id": instance_id, "host": "10.0.0.1", "port": 80}

    names = ("docker-e-web-80", "docker-e-gone-80", "docker-f-gone-80", "10.0.0.1:80", "docker-e-late-80")
    backends = [backend(name) for name in names]
    api.listing = {"services": [{"service_name": "app.example", "backends": backends}]}
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(lambda: api.granted)
        api.granted["docker-e-gone-80"] = "10.0.0.1"
        # The last one has ended by the time that it is asked for: that is what was wanted.
        found = await keepers.release_others("docker-e-")
    assert found == [("app.example", "docker-e-gone-80"), ("app.example", "docker-e-late-80")]
    assert api.requests[1:] == [("DELETE", "docker-e-gone-80"), ("DELETE", "docker-e-late-80")]


async def test_one_that_is_wanted_while_it_is_released_is_asked_for_again(api: ScriptedApi) -> None:
    backend = {"instance_id": WEB.instance_id, "host": WEB.host, "port": WEB.port}
    api.listing = {"services": [{"service_name": WEB.service_name, "backends": [backend]}]}
    api.granted[WEB.instance_id] = WEB.host
    api.held = asyncio.Event()
    async with keeping(api) as keepers:
        releasing = asyncio.create_task(keepers.release_others("docker-e-"))
        await until(lambda: api.methods() == ["DELETE"])
        keepers.want("web", "web", [WEB])
        await until(lambda: api.methods() == ["DELETE", "POST"])
        api.held.set()
        # Whichever of the two came last: it is there in the end.
        assert await releasing == []
        await until(lambda: api.methods() == ["DELETE", "POST", "POST"])
        assert api.granted == {WEB.instance_id: WEB.host}


async def test_thousands_that_begin_at_once_wait_for_their_turn_and_not_for_an_answer(
    api: ScriptedApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # One at a time, and all of them together take longer than one may.
    monkeypatch.setattr(module, "REQUESTS", 1)
    monkeypatch.setattr(registrar, "REQUEST_TIMEOUT", 4.0)
    api.delay = 0.4
    names = [f"docker-e-{number}-80" for number in range(15)]
    async with keeping(api) as keepers:
        for name in names:
            keepers.want(name, name, [replace(WEB, instance_id=name)])
        await until(lambda: len(api.granted) == len(names))
    assert sorted(api.requests) == sorted(("POST", name) for name in names)
    assert "does not answer" not in caplog.text


async def test_what_is_wanted_no_longer_when_its_turn_comes_is_not_asked_for(
    api: ScriptedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUESTS", 1)
    api.held = asyncio.Event()
    async with keeping(api) as keepers:
        keepers.want("web", "web", [WEB])
        await until(lambda: api.requests)
        keepers.want("other", "other", [OTHER])
        await asyncio.sleep(0)
        keepers.want("other", "", [])
        api.held.set()
        await until(lambda: WEB.instance_id in api.granted)
        await until(lambda: len(keepers._keepers) == 1)
    assert api.requests == [("POST", WEB.instance_id)]
