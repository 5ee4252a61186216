"""Drain, ready, pause, stop, resume, and answers that a caller waits for: over a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientResponse

from portero_py.core.auth import FAILURE_BURST
from portero_py.core.model import Backend, Halt, Lease, LeaseRequest, LeaseState
from tests.control.api.test_registration import BODY, Running, problem, running
from tests.waiting import until

SERVICE = "app.example"
PLACE = (SERVICE, "::1", 8080)
WHICH = {"service_name": SERVICE, "host": "::1", "port": 8080}
BACKEND = "/backends/drain", "/backends/ready"
SERVICES = "/services/pause", "/services/stop", "/services/resume"


@pytest.fixture
async def api() -> AsyncIterator[Running]:
    async with running() as one:
        yield one


async def act(api: Running, path: str, body: object, **headers: str | None) -> ClientResponse:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await api.client.post(path, data=data, headers=api.headers(Authorization=None, **headers))


async def said(response: ClientResponse) -> dict[str, Any]:
    assert response.status == 200, await response.text()
    found: dict[str, Any] = await response.json()
    return found


def lease_of(api: Running, service: str = SERVICE) -> Lease:
    return api.worker.table.services[service].leases[0]


# Backends


async def test_a_drain_is_in_force_when_it_is_answered(
    api: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await api.post()
    api.worker.held[PLACE] = 3
    answer = await said(await act(api, "/backends/drain", WHICH))
    assert answer == {
        "service_name": SERVICE,
        "instance_id": "[::1]:8080",
        "host": "::1",
        "port": 8080,
        "state": "draining",
        "in_flight": 3,
    }
    assert not lease_of(api).can_serve(api.now)
    assert caplog.messages[-1] == "draining: app.example at http://[::1]:8080: asked by 127.0.0.1"


async def test_a_backend_may_be_named_by_its_id_and_its_service_in_any_spelling(api: Running) -> None:
    await api.post({**BODY, "instance_id": "one"})
    answer = await said(
        await act(api, "/backends/drain", {"service_name": "APP.example.", "instance_id": "one"})
    )
    assert (answer["service_name"], answer["state"]) == (SERVICE, "draining")


async def test_leases_of_every_source_can_be_meant(api: Running) -> None:
    await api.leases.grant(LeaseRequest(SERVICE, Backend("::1", 8080), None, "one"), "docker")
    listing = await (await api.client.get("/backends", headers=api.headers())).json()
    [backend] = listing["services"][0]["backends"]
    which = {"service_name": SERVICE, "instance_id": backend["instance_id"]}
    assert backend["instance_id"] == "one (docker)"
    assert (await said(await act(api, "/backends/drain", which)))["state"] == "draining"
    await api.post()  # joins it at its address, and takes its state on
    assert (await said(await act(api, "/backends/ready", WHICH)))["instance_id"] == "one (docker)"
    assert {grant.state for grant in lease_of(api).grants} == {LeaseState.READY}


async def test_asking_again_is_fine(api: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await api.post()
    for path, state in [("drain", "draining"), ("drain", "draining"), ("ready", "ready"), ("ready", "ready")]:
        assert (await said(await act(api, f"/backends/{path}", WHICH)))["state"] == state
    assert [line.split(":")[0] for line in caplog.messages] == ["registered", "draining", "ready"]


async def test_a_drain_is_kept_through_renewals(api: Running) -> None:
    await api.post()
    await act(api, "/backends/drain", WHICH)
    await api.post()
    assert lease_of(api).state is LeaseState.DRAINING


@pytest.mark.parametrize("state", [LeaseState.STARTING, LeaseState.DOWN])
async def test_ready_leaves_to_the_probes_what_is_theirs(api: Running, state: LeaseState) -> None:
    await api.post({**BODY, "health_path": "/up"})
    if state is LeaseState.DOWN:
        await api.leases.set_state(SERVICE, "::1", 8080, LeaseState.READY)
        await api.leases.set_state(SERVICE, "::1", 8080, LeaseState.DOWN)
    assert (await said(await act(api, "/backends/ready", WHICH)))["state"] == state.value
    assert lease_of(api).state is state
    await act(api, "/backends/drain", WHICH)
    assert (await said(await act(api, "/backends/ready", WHICH)))["state"] == "ready"


@pytest.mark.parametrize("path", BACKEND)
async def test_a_backend_that_nobody_knows_is_a_404(api: Running, path: str) -> None:
    await api.post()
    for which in ({"instance_id": "two"}, {"host": "::1", "port": 1}):
        await problem(await act(api, path, {"service_name": SERVICE, **which}), 404, "no_such_lease")
    other = {**WHICH, "service_name": "other.example"}
    await problem(await act(api, path, other), 404, "no_such_lease")
    api.now += 30  # it has ended, swept or not
    await problem(await act(api, path, WHICH), 404, "no_such_lease")


@pytest.mark.parametrize("path", BACKEND)
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"instance_id": "one"}, "service_name"),
        ({"service_name": SERVICE}, "instance_id"),
        ({"service_name": SERVICE, "host": "::1"}, "port"),
        ({"service_name": SERVICE, "instance_id": "a b"}, "instance_id"),
        ({"service_name": SERVICE, "instance_id": "a (b) (c)"}, "instance_id"),
        ({**WHICH, "wait_seconds": -1}, "wait_seconds"),
        ({**WHICH, "wait_seconds": 300.1}, "wait_seconds"),
        ({**WHICH, "wait_seconds": "1"}, "wait_seconds"),
        ({**WHICH, "wait_seconds": True}, "wait_seconds"),
    ],
)
async def test_a_field_that_cannot_be_is_named(
    api: Running, path: str, body: dict[str, object], field: str
) -> None:
    await api.post()
    assert (await problem(await act(api, path, body), 400, "bad_field"))["field"] == field
    assert lease_of(api).state is LeaseState.READY


# Services


async def test_a_service_is_paused_stopped_and_resumed(
    api: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await api.post()
    name = {"service_name": "App.Example"}

    answer = await said(await act(api, "/services/pause", {**name, "seconds": 12.5}))
    assert answer == {"service_name": SERVICE, "state": "paused", "seconds": 12.5}
    assert api.worker.table.services[SERVICE].halt == Halt(12.5)

    message = "Zur\u00fcck um 12 \U0001f6e0"
    answer = await said(await act(api, "/services/stop", {**name, "message": message}))
    assert answer == {"service_name": SERVICE, "state": "stopped", "message": message}
    assert api.worker.table.services[SERVICE].halt == Halt(None, message)

    assert (await said(await act(api, "/services/stop", name)))["message"] == ""
    for _ in range(2):
        answer = await said(await act(api, "/services/resume", name))
        assert answer == {"service_name": SERVICE, "state": "serving"}
        assert api.worker.table.services[SERVICE].halt is None
    assert caplog.messages[1:] == [
        "app.example is paused: asked by 127.0.0.1",
        "app.example is stopped: asked by 127.0.0.1",
        "app.example is stopped: asked by 127.0.0.1",
        "app.example is resumed: asked by 127.0.0.1",
    ]


@pytest.mark.parametrize("path", SERVICES)
async def test_a_service_that_nobody_knows_is_a_404(api: Running, path: str) -> None:
    body = {"service_name": "other.example", "seconds": 5}
    await problem(await act(api, path, body), 404, "no_such_service")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("pause", {}, "service_name"),
        ("pause", {"service_name": SERVICE}, "seconds"),
        ("pause", {"service_name": SERVICE, "seconds": 0.5}, "seconds"),
        ("pause", {"service_name": SERVICE, "seconds": 3601}, "seconds"),
        ("pause", {"service_name": SERVICE, "seconds": "5"}, "seconds"),
        ("stop", {"service_name": SERVICE, "message": 5}, "message"),
        ("stop", {"service_name": SERVICE, "message": "x" * 1001}, "message"),
        ("stop", {"service_name": SERVICE, "message": "a\nb"}, "message"),
        ("stop", {"service_name": SERVICE, "message": "a\u202eb"}, "message"),
        ("resume", {"service_name": "a b"}, "service_name"),
    ],
)
async def test_what_cannot_be_said_of_a_service_is_named(
    api: Running, path: str, body: dict[str, object], field: str
) -> None:
    await api.post()
    assert (await problem(await act(api, f"/services/{path}", body), 400, "bad_field"))["field"] == field
    assert api.worker.table.services[SERVICE].halt is None


# Who may


@pytest.mark.parametrize("path", [*BACKEND, *SERVICES])
async def test_the_secret_comes_before_the_body(api: Running, path: str) -> None:
    await problem(await act(api, path, b"{", X_Register_Secret=None), 401, "secret_missing")
    await problem(await act(api, path, b"{", X_Register_Secret="wrong"), 403, "secret_wrong")
    await problem(await act(api, path, b"{"), 400, "bad_json")
    await problem(await act(api, path, b"{}", Content_Type="text/plain"), 415, "not_json")
    await problem(await act(api, path, b" " * 65_537), 413, "too_large")
    await problem(await api.client.get(path, headers=api.headers()), 405, "method_not_allowed")


async def test_guessing_is_slowed_down_as_it_is_for_readers(api: Running) -> None:
    for _ in range(FAILURE_BURST):
        await problem(await act(api, "/backends/drain", WHICH, X_Register_Secret="x"), 403, "secret_wrong")
    await problem(await act(api, "/services/resume", WHICH), 429, "rate_limited")


async def test_each_answer_is_counted_by_what_came_of_it(api: Running) -> None:
    await api.post()
    await act(api, "/backends/drain", WHICH)
    await act(api, "/backends/drain", {**WHICH, "port": 1})
    await act(api, "/services/pause", {"service_name": SERVICE, "seconds": 5})
    await act(api, "/services/resume", WHICH, X_Register_Secret="x")
    lines = (await api.metrics.scrape()).decode().splitlines()
    assert [line for line in lines if line.startswith("portero_actions_total{")] == [
        'portero_actions_total{action="drain",result="ok"} 1.0',
        'portero_actions_total{action="drain",result="no_such_lease"} 1.0',
        'portero_actions_total{action="pause",result="ok"} 1.0',
        'portero_actions_total{action="resume",result="secret_wrong"} 1.0',
    ]


# Waiting


async def waiting(api: Running, seconds: float = 60) -> ClientResponse:
    """A DELETE that waits: its head is there, its body is not."""
    response = await api.delete({**WHICH, "wait_seconds": seconds})
    assert response.status == 200
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    return response


async def test_a_delete_that_waits_begins_at_once_and_ends_when_nothing_is_in_flight(api: Running) -> None:
    await api.post()
    api.worker.held[PLACE] = 2
    response = await waiting(api)
    assert api.worker.addresses() == []
    body = asyncio.ensure_future(response.json())
    await asyncio.sleep(0.1)
    assert not body.done()
    api.worker.held[PLACE] = 0
    assert await body == {
        "status": "deregistered",
        "service_name": SERVICE,
        "instance_id": "[::1]:8080",
        "in_flight": 0,
    }
    assert api.metrics._registrations["deregistered"] == 1


async def test_when_the_time_is_up_it_says_what_is_in_flight(api: Running) -> None:
    await api.post()
    api.worker.held[PLACE] = 2
    assert (await said(await waiting(api, 0.05)))["in_flight"] == 2


async def test_a_delete_that_does_not_wait_says_so_too(api: Running) -> None:
    await api.post()
    api.worker.held[PLACE] = 2
    response = await api.delete({**WHICH, "wait_seconds": 0})
    assert "Content-Length" in response.headers
    assert (await said(response))["in_flight"] == 2


async def test_a_delete_that_waits_for_what_is_not_there_has_its_status(api: Running) -> None:
    await problem(await api.delete({**WHICH, "wait_seconds": 60}), 404, "no_such_lease")
    document = await problem(await api.delete({**WHICH, "wait_seconds": -1}), 400, "bad_field")
    assert document["field"] == "wait_seconds"


async def test_a_drain_waits_and_a_ready_ends_that(api: Running) -> None:
    await api.post()
    api.worker.held[PLACE] = 2
    response = await act(api, "/backends/drain", {**WHICH, "wait_seconds": 60})
    body = asyncio.ensure_future(response.json())
    await asyncio.sleep(0.05)
    assert not body.done()
    await act(api, "/backends/ready", WHICH)
    answer = await body
    assert (answer["state"], answer["in_flight"]) == ("ready", 2)


async def test_the_answer_to_a_drain_has_the_last_state_of_one_that_left_meanwhile(api: Running) -> None:
    await api.post()
    api.worker.held[PLACE] = 1
    response = await act(api, "/backends/drain", {**WHICH, "wait_seconds": 60})
    await api.delete(WHICH)
    api.worker.held[PLACE] = 0
    answer = await said(response)
    assert (answer["state"], answer["in_flight"]) == ("draining", 0)


async def test_a_ready_waits_for_the_probes(api: Running) -> None:
    await api.post({**BODY, "health_path": "/up"})
    response = await act(api, "/backends/ready", {**WHICH, "wait_seconds": 60})
    body = asyncio.ensure_future(response.json())
    await asyncio.sleep(0.05)
    assert not body.done()
    await api.leases.set_state(SERVICE, "::1", 8080, LeaseState.READY)
    assert (await body)["state"] == "ready"


async def test_a_caller_that_hangs_up_waits_no_longer(api: Running, caplog: pytest.LogCaptureFixture) -> None:
    await api.post()
    api.worker.held[PLACE] = 1
    response = await waiting(api)
    assert len(api.api._drains) == 1
    response.close()
    await until(lambda: not len(api.api._drains))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_caller_that_has_shut_its_side_waits_no_longer(api: Running) -> None:
    await api.post()
    api.worker.held[PLACE] = 1
    body = json.dumps({**WHICH, "wait_seconds": 60})
    head = "".join(f"{name}: {value}\r\n" for name, value in api.headers().items())
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(
        f"DELETE /register HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    assert (await reader.readline()).split()[1] == b"200"
    writer.write_eof()
    await until(lambda: not len(api.api._drains))
    writer.close()
    await writer.wait_closed()


async def test_a_client_of_http_1_0_may_wait_too(api: Running) -> None:
    await api.post()
    api.worker.held[PLACE] = 1
    body = json.dumps({**WHICH, "wait_seconds": 60})
    head = "".join(f"{name}: {value}\r\n" for name, value in api.headers().items())
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"DELETE /register HTTP/1.0\r\n{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    assert (await reader.readline()).split()[1] == b"200"
    api.worker.held[PLACE] = 0
    assert (await reader.read()).endswith(b'"in_flight":0}')
    writer.close()
    await writer.wait_closed()


async def test_a_wait_outlasts_what_other_answers_may_take(api: Running) -> None:
    api.api.door.busy_seconds = 0.05
    await api.post()
    api.worker.held[PLACE] = 1
    response = await waiting(api)
    await asyncio.sleep(0.2)
    api.worker.held[PLACE] = 0
    assert (await said(response))["in_flight"] == 0


async def test_those_who_wait_leave_half_of_the_places_to_others() -> None:
    async with running(max_connections=4) as api:
        for port in range(1, 5):
            await api.post({**BODY, "port": port})
            api.worker.held[SERVICE, "::1", port] = 1
        which = [{**WHICH, "port": port, "wait_seconds": 60} for port in range(1, 5)]
        held = [await api.delete(which[0]), await act(api, "/backends/drain", which[1])]
        assert [response.status for response in held] == [200, 200]
        for response in (await api.delete(which[2]), await act(api, "/backends/drain", which[2])):
            assert response.headers["Retry-After"] == "1"
            await problem(response, 503, "too_many_waits")
        assert "[::1]:3" in api.worker.addresses(), "nothing was done for whom was refused"
        assert lease_of(api).backend.port == 2
        for _ in range(10):  # renewals, and whoever does not wait
            assert (await api.post({**BODY, "port": 4})).status == 200
        assert (await said(await api.delete({**WHICH, "port": 3})))["in_flight"] == 1
        held[0].close()  # makes a place
        await until(lambda: len(api.api._drains) == 1)
        third = await api.delete(which[3])
        assert third.status == 200
        api.worker.held.clear()
        for response in (held[1], third):
            assert (await said(response))["in_flight"] == 0


async def test_who_waits_when_portero_closes_hears_what_is_in_flight() -> None:
    async with running() as api:
        await api.post()
        api.worker.held[PLACE] = 3
        response = await waiting(api, 300)
        closing = asyncio.ensure_future(api.runner.cleanup())
        assert (await said(response))["in_flight"] == 3
        await closing
