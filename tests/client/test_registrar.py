"""A backend's registrar, against a registration API that answers as it is told."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from portero_py.client import call
from portero_py.client import registrar as module
from portero_py.client.registrar import Api, Registrar, Registration, RenewalSchedule
from portero_py.core.auth import TokenVerifier
from portero_py.errors import AnswerBrokeOff, PorteroUnreachable, RegistrationRefused
from tests.waiting import PATIENCE, until

KEY = "k" * 32
GRANTED = {"status": "registered", "instance_id": "one", "expires_in": 60, "renew_after": 20}
BACKEND = Registration("app.example", "::1", 8000, instance_id="one")


class ScriptedApi:
    """Answers each request with the next of `answers` (status, JSON, header fields); the last one stays.

    Status 0 is none: the connection breaks.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, str]]] = [(200, GRANTED, {})]
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.arrived = asyncio.Event()
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, await request.json(), dict(request.headers)))
        self.arrived.set()
        status, body, headers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not status and request.transport is not None:
            request.transport.abort()
            return web.Response()
        return web.json_response(body, status=status, headers=headers)

    async def saw(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.requests) < count:
                self.arrived.clear()
                await self.arrived.wait()

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.requests]


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedApi]:
    api = ScriptedApi()
    app = web.Application()
    app.router.add_route("*", "/register", api.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield api
    await runner.cleanup()


def registrar(api: ScriptedApi, **more: Any) -> Registrar:
    return Registrar(Api(api.url, "hush", KEY, **more), BACKEND)


class TestRenewalSchedule:
    def test_a_renewal_comes_at_the_time_the_api_named_or_a_little_before(self) -> None:
        schedule = RenewalSchedule(60)
        assert schedule.granted(20, 1.0) == 20
        assert schedule.granted(20, 0.0) == 16

    def test_it_never_comes_after_half_of_the_lease(self) -> None:
        assert RenewalSchedule(60).granted(59, 1.0) == 30

    def test_failures_back_off_up_to_a_limit(self) -> None:
        schedule = RenewalSchedule(60)
        assert [schedule.failed(1.0) for _ in range(7)] == [0.5, 1, 2, 4, 8, 15, 15]

    def test_chance_halves_a_wait_at_most(self) -> None:
        assert RenewalSchedule(60).failed(0.0) == 0.25

    def test_the_api_s_own_wish_is_a_minimum(self) -> None:
        assert RenewalSchedule(60).failed(0.0, retry_after=7) == 7

    def test_a_retry_comes_well_before_the_lease_ends(self) -> None:
        schedule = RenewalSchedule(60)
        assert schedule.failed(1.0, retry_after=3600, left=40.0) == 20.0
        assert schedule.failed(1.0, left=1.0) == 0.5
        assert schedule.failed(1.0, retry_after=3600, left=0.1) == 0.25

    def test_backing_off_stays_within_a_short_lease(self) -> None:
        schedule = RenewalSchedule(8)
        assert [schedule.failed(1.0) for _ in range(4)] == [0.5, 1, 2, 2]
        assert RenewalSchedule(1).failed(1.0) == 0.5

    def test_a_lease_that_is_shorter_than_was_asked_for_is_renewed_sooner(self) -> None:
        assert RenewalSchedule(3600).granted(1200, 1.0, lasts=60.0) == 30.0

    def test_a_lease_resets_the_backing_off(self) -> None:
        schedule = RenewalSchedule(60)
        schedule.failed(1.0)
        schedule.failed(1.0)
        schedule.granted(20, 1.0)
        assert schedule.failed(1.0) == 0.5


class TestRegistrar:
    async def test_it_registers_on_entering_and_deregisters_on_leaving(self, scripted: ScriptedApi) -> None:
        async with registrar(scripted) as entered:
            assert entered.is_registered
            assert scripted.methods() == ["POST"]
        assert scripted.methods() == ["POST", "DELETE"]
        (_, posted, headers), (_, deleted, _) = scripted.requests
        assert posted == {
            "service_name": "app.example",
            "host": "::1",
            "port": 8000,
            "ttl_seconds": 60,
            "use_tls": False,
            "instance_id": "one",
        }
        assert deleted == {"service_name": "app.example", "instance_id": "one", "wait_seconds": 30.0}
        assert headers["X-Register-Secret"] == "hush"
        assert headers["Content-Type"] == "application/json"

    async def test_its_token_is_one_that_portero_takes(self, scripted: ScriptedApi) -> None:
        async with registrar(scripted, kid="k1", audience="aud", issuer="iss"):
            pass
        authorization = scripted.requests[0][2]["Authorization"]
        verifier = TokenVerifier([("k1", KEY)], "aud", "iss")
        assert verifier.verify(authorization, time.time()).service == "app.example"

    async def test_a_backend_without_an_instance_id_is_named_by_its_address(
        self, scripted: ScriptedApi
    ) -> None:
        backend = Registration("app.example", "::1", 8000)
        async with Registrar(Api(scripted.url, "hush", KEY), backend, drain_seconds=0):
            pass
        assert scripted.requests[1][1] == {"service_name": "app.example", "host": "::1", "port": 8000}

    async def test_what_a_backend_says_of_itself_is_sent(self, scripted: ScriptedApi) -> None:
        backend = Registration("app.example", "::1", 8000, health_path="/up", max_in_flight=7, protocol="h2c")
        async with Registrar(Api(scripted.url, "hush", KEY), backend):
            pass
        posted = scripted.requests[0][1]
        assert (posted["health_path"], posted["max_in_flight"], posted["protocol"]) == ("/up", 7, "h2c")

    async def test_it_renews_when_the_api_said(self, scripted: ScriptedApi) -> None:
        scripted.answers = [(200, {**GRANTED, "renew_after": 0.01}, {})]
        async with registrar(scripted):
            await scripted.saw(3)
        assert scripted.methods()[:3] == ["POST", "POST", "POST"]
        assert scripted.methods()[-1] == "DELETE"

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415])
    async def test_a_refusal_that_waiting_cannot_cure_is_raised_at_once(
        self, scripted: ScriptedApi, status: int
    ) -> None:
        scripted.answers = [(status, {"detail": "the secret in X-Register-Secret is wrong"}, {})]
        with pytest.raises(RegistrationRefused, match="the secret in X-Register-Secret is wrong") as caught:
            await registrar(scripted).__aenter__()
        assert caught.value.answered == status
        assert scripted.methods() == ["POST"]

    @pytest.mark.parametrize("status", [429, 500, 503])
    async def test_a_busy_api_is_tried_again(self, scripted: ScriptedApi, status: int) -> None:
        scripted.answers = [(status, {}, {}), (200, GRANTED, {})]
        async with registrar(scripted) as entered:
            assert not entered.is_registered
            async with asyncio.timeout(PATIENCE):
                await entered.wait_registered()
        assert scripted.methods() == ["POST", "POST", "DELETE"]

    async def test_the_time_that_a_busy_api_asks_for_is_given(self, scripted: ScriptedApi) -> None:
        scripted.answers = [(429, {}, {"Retry-After": "3600"})]
        async with aiohttp.ClientSession() as session:
            single = Registrar(Api(scripted.url, "hush", KEY), BACKEND, session)
            with pytest.raises(RegistrationRefused) as caught:
                await single.register()
        assert caught.value.retry_after == 3600

    async def test_a_backend_starts_without_its_proxy_and_leaves_without_a_lease(
        self, scripted: ScriptedApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        gone = Api("http://127.0.0.1:1", "hush", KEY)
        async with Registrar(gone, BACKEND) as entered:
            assert not entered.is_registered
        assert "app.example is not registered: http://127.0.0.1:1: " in caplog.text
        assert "hush" not in caplog.text
        assert "not deregistered" not in caplog.text

    async def test_a_lease_that_cannot_be_given_back_is_a_warning(
        self, scripted: ScriptedApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        scripted.answers = [(200, GRANTED, {}), (500, {}, {})]
        async with registrar(scripted):
            pass
        assert [(r.levelno, r.name) for r in caplog.records if "not deregistered" in r.getMessage()] == [
            (logging.WARNING, "portero_py.client.registrar")
        ]

    async def test_a_later_refusal_is_logged_and_tried_again(
        self, scripted: ScriptedApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        soon = {**GRANTED, "renew_after": 0.01}
        scripted.answers = [(200, soon, {}), (403, {"detail": "wrong"}, {}), (200, GRANTED, {})]
        async with registrar(scripted) as entered:
            await scripted.saw(3)
            async with asyncio.timeout(PATIENCE):
                await entered.wait_registered()
        assert "403: wrong" in caplog.text

    @pytest.mark.parametrize("status", [403, 429, 500])
    async def test_it_deregisters_after_a_renewal_that_failed(
        self, scripted: ScriptedApi, status: int
    ) -> None:
        soon = {**GRANTED, "renew_after": 0.01}
        scripted.answers = [(200, soon, {}), (status, {}, {"Retry-After": "3600"})]
        async with registrar(scripted) as entered:
            await until(lambda: not entered.is_registered)
            assert scripted.methods() == ["POST", "POST"]
            scripted.answers = [(200, {}, {})]
        assert scripted.methods() == ["POST", "POST", "DELETE"]

    async def test_it_deregisters_when_the_answer_got_lost(self, scripted: ScriptedApi) -> None:
        scripted.answers = [(500, {}, {})]
        async with registrar(scripted):
            pass
        assert scripted.methods() == ["POST", "DELETE"]

    async def test_a_lease_that_has_ended_meanwhile_is_no_warning(
        self, scripted: ScriptedApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        scripted.answers = [(200, GRANTED, {}), (404, {"detail": "no such lease"}, {})]
        async with registrar(scripted):
            pass
        assert scripted.methods() == ["POST", "DELETE"]
        assert "not deregistered" not in caplog.text

    async def test_an_api_that_hangs_does_not_outlast_a_short_lease(self, scripted: ScriptedApi) -> None:
        hung = asyncio.Event()

        async def hang(request: web.Request) -> web.Response:
            if scripted.requests and request.method == "POST":
                scripted.requests.append((request.method, None, {}))
                scripted.arrived.set()
                await hung.wait()
            return await scripted.answer(request)

        app = web.Application()
        app.router.add_route("*", "/register", hang)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        api = Api(f"http://127.0.0.1:{runner.addresses[0][1]}", "hush", KEY)
        scripted.answers = [(200, {**GRANTED, "expires_in": 5, "renew_after": 0.01}, {})]
        async with Registrar(api, Registration("app.example", "::1", 8000, 5)) as entered:
            await scripted.saw(3)
            assert entered._lease_ends > time.monotonic(), "the second renewal came after the lease's end"
            hung.set()
        await runner.cleanup()

    async def test_a_renewal_that_breaks_off_is_not_the_last(
        self, scripted: ScriptedApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        scripted.answers = [(200, {**GRANTED, "renew_after": 0.01}, {})]
        async with registrar(scripted) as entered:
            with monkeypatch.context() as patch:
                patch.setattr(entered, "_ask", None)
                await until(lambda: "a renewal broke off" in caplog.text)
            seen = len(scripted.requests)
            await scripted.saw(seen + 1)
        assert scripted.methods()[-1] == "DELETE"

    async def test_a_redirect_is_not_followed_with_the_secret(self, scripted: ScriptedApi) -> None:
        scripted.answers = [(307, {}, {"Location": f"{scripted.url}/register"})]
        with pytest.raises(RegistrationRefused):
            await registrar(scripted).__aenter__()
        assert len(scripted.requests) == 1

    async def test_an_endless_answer_is_given_up(self, scripted: ScriptedApi) -> None:
        scripted.answers = [(200, {"x": "y" * 100_000}, {})]
        async with aiohttp.ClientSession() as session:
            single = Registrar(Api(scripted.url, "hush", KEY), BACKEND, session)
            with pytest.raises(PorteroUnreachable, match="too long"):
                await single.register()

    async def test_a_session_of_the_caller_s_stays_open(self, scripted: ScriptedApi) -> None:
        async with aiohttp.ClientSession() as session:
            async with Registrar(Api(scripted.url, "hush", KEY), BACKEND, session):
                pass
            assert not session.closed
            async with session.post(f"{scripted.url}/register", json={}) as response:
                assert response.status == 200

    def test_no_repr_shows_a_secret(self) -> None:
        assert "hush" not in repr(Api("http://x", "hush", "hush"))


class SlowApi:
    """Answers a DELETE with a head, and with the rest when `last` is set; `broken` cuts it off instead."""

    def __init__(self) -> None:
        self.url = ""
        self.deleted: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.last: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.hung_up = asyncio.Event()
        self.has_head = True
        self.loses = 0  # requests that are cut off

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                length = 0
                while (field := await reader.readline()) not in (b"\r\n", b""):
                    if field.lower().startswith(b"content-length:"):
                        length = int(field.partition(b":")[2])
                asked = json.loads(await reader.readexactly(length))
                if line.startswith(b"POST"):
                    granted = json.dumps(GRANTED).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(granted) + granted)
                    continue
                if self.loses:
                    self.loses -= 1
                    writer.transport.abort()
                    return
                if self.has_head:
                    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                self.deleted.put_nowait(asked)
                gone = asyncio.ensure_future(reader.read())
                await asyncio.wait({gone, self.last}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    self.hung_up.set()
                    return
                gone.cancel()
                body = self.last.result()
                if not body:
                    writer.transport.abort()
                    return
                writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
                return
        finally:
            writer.close()


@pytest.fixture
async def slow() -> AsyncIterator[SlowApi]:
    api = SlowApi()
    server = await asyncio.start_server(api.take, "127.0.0.1", 0)
    api.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield api
    server.close()


async def left(api: SlowApi, entered: asyncio.Event, leave: asyncio.Event, seconds: float = 30) -> None:
    async with Registrar(Api(api.url, "hush", KEY), BACKEND, drain_seconds=seconds):
        entered.set()
        await leave.wait()


class TestLeaving:
    """Leaving waits for what is in flight, as long as portero says that it is there."""

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "GOODBYE_TIMEOUT", 1.5)
        monkeypatch.setattr(call, "WAIT_SLACK", 0.05)

    @pytest.fixture
    async def leaving(self, slow: SlowApi) -> AsyncIterator[asyncio.Task[None]]:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(left(slow, entered, leave))
        async with asyncio.timeout(30):
            await entered.wait()
        leave.set()
        yield task
        task.cancel()
        await asyncio.wait({task})

    async def test_it_ends_when_nothing_is_in_flight(
        self, slow: SlowApi, leaving: asyncio.Task[None], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert (await slow.deleted.get())["wait_seconds"] == 30
        await asyncio.sleep(2.0)  # longer than a portero that does not answer is given
        assert not leaving.done()
        slow.last.set_result(b'{"status": "deregistered", "in_flight": 0}')
        async with asyncio.timeout(30):
            await leaving
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize(
        ("last", "why"),
        [(b'{"in_flight": 3}', "3 in flight"), (b"", "what is in flight is unknown: ")],
        ids=["told", "broken off"],
    )
    async def test_what_may_be_in_flight_is_given_the_rest_of_the_time(
        self, slow: SlowApi, last: bytes, why: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        leave = asyncio.Event()
        leave.set()
        slow.last.set_result(last)
        leaving = asyncio.create_task(left(slow, asyncio.Event(), leave, 2))
        async with asyncio.timeout(30):
            while "app.example is deregistered, it leaves in " not in caplog.text:
                await asyncio.sleep(0.001)
            assert not leaving.done()
            await leaving
        assert why in caplog.text
        assert "not deregistered" not in caplog.text

    async def test_cancelling_it_hangs_up_at_once(self, slow: SlowApi, leaving: asyncio.Task[None]) -> None:
        await slow.deleted.get()
        leaving.cancel()
        async with asyncio.timeout(30):
            await slow.hung_up.wait()
        with pytest.raises(asyncio.CancelledError):
            await leaving

    async def test_an_answer_that_never_ends_is_left_after_the_time_that_was_asked_for(
        self, slow: SlowApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        leave = asyncio.Event()
        leave.set()
        async with asyncio.timeout(30):
            await left(slow, asyncio.Event(), leave, 0.1)
            await slow.hung_up.wait()
        assert "what is in flight is unknown: " in caplog.text
        assert "no answer in time" in caplog.text

    async def test_a_portero_that_does_not_answer_costs_no_more_than_a_goodbye(
        self, slow: SlowApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        slow.has_head = False
        leave = asyncio.Event()
        leave.set()
        async with asyncio.timeout(30):
            await left(slow, asyncio.Event(), leave, 300)
        assert "app.example was not deregistered: " in caplog.text

    @pytest.mark.parametrize("seconds", [0, 30])
    async def test_an_answer_that_got_lost_is_asked_for_again(
        self, slow: SlowApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: float
    ) -> None:
        monkeypatch.setattr(module, "LEAST_RETRY", 0.01)
        leave = asyncio.Event()
        leave.set()
        slow.loses = 2
        slow.last.set_result(b'{"in_flight": 0}')
        async with asyncio.timeout(30):
            await left(slow, asyncio.Event(), leave, seconds)
        assert slow.deleted.qsize() == 1
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    async def test_a_lease_that_is_gone_when_it_asks_again_may_have_something_in_flight(
        self, scripted: ScriptedApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(module, "LEAST_RETRY", 0.01)
        # aiohttp itself asks a second time where a connection was used before.
        scripted.answers = [
            (200, GRANTED, {}),
            (0, {}, {}),
            (0, {}, {}),
            (404, {"detail": "no such lease"}, {}),
        ]
        async with Registrar(Api(scripted.url, "hush", KEY), BACKEND, drain_seconds=0.2):
            pass
        assert "what is in flight is unknown: " in caplog.text

    async def test_the_caller_of_deregister_hears_it_too(self, slow: SlowApi) -> None:
        slow.last.set_result(b"")
        async with aiohttp.ClientSession() as session:
            with pytest.raises(AnswerBrokeOff):
                await Registrar(Api(slow.url, "hush", KEY), BACKEND, session).deregister(5)

    async def test_where_no_place_is_left_to_wait_it_asks_again(
        self, scripted: ScriptedApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LEAST_RETRY", 0.01)
        busy = (503, {"reason": "too_many_waits", "detail": "come again"}, {"Retry-After": "0.01"})
        scripted.answers = [(200, GRANTED, {}), busy, busy, (200, {"in_flight": 0}, {})]
        async with registrar(scripted):
            pass
        assert scripted.methods() == ["POST", "DELETE", "DELETE", "DELETE"]
        waits = [deleted["wait_seconds"] for _, deleted, _ in scripted.requests[1:]]
        assert waits == sorted(waits, reverse=True)

    async def test_and_leaves_without_waiting_when_there_is_no_time_for_that(
        self, scripted: ScriptedApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LEAST_RETRY", 0.01)
        busy: tuple[int, Any, dict[str, str]] = (503, {"reason": "too_many_waits"}, {})
        scripted.answers = [(200, GRANTED, {}), busy]
        async with asyncio.timeout(30):
            async with Registrar(Api(scripted.url, "hush", KEY), BACKEND, drain_seconds=0.1):
                pass
        assert "wait_seconds" in scripted.requests[1][1]
        assert scripted.requests[-1][1] == {"service_name": "app.example", "instance_id": "one"}

    @pytest.mark.parametrize("status", [403, 500, 503])
    async def test_another_refusal_is_not_asked_again(self, scripted: ScriptedApi, status: int) -> None:
        scripted.answers = [(200, GRANTED, {}), (status, {"reason": "registry_full"}, {})]
        async with registrar(scripted):
            pass
        assert scripted.methods() == ["POST", "DELETE"]

    async def test_nobody_asks_for_more_than_portero_gives(self, scripted: ScriptedApi) -> None:
        async with Registrar(Api(scripted.url, "hush", KEY), BACKEND, drain_seconds=3600):
            pass
        assert scripted.requests[-1][1]["wait_seconds"] == 300
