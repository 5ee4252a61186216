"""docs/registration.md, row by row, over a real server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession
from aiohttp.web import AppRunner

from portero_py.config.model import Registration
from portero_py.control.api import body as bodies
from portero_py.control.api.application import RegistrationApi
from portero_py.control.api.metrics import Metrics
from portero_py.control.api.state import State
from portero_py.control.leases import Leases
from portero_py.control.open_server import MAX_CONNECTIONS, OpenSite
from portero_py.core.auth import FAILURE_BURST, sign_token
from portero_py.core.model import Backend, Lease, LeaseRequest, LeaseState, Service
from portero_py.core.registry import LINGER, Registry
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import ConfigError
from portero_py.feed.feed import Feed
from tests.control.workers import Worker
from tests.waiting import until

SECRET = "s\u00e9same-open"
KEY = "k" * 32
WALL = 1_700_000_000.0

BODY: dict[str, Any] = {
    "service_name": "app.example",
    "host": "::1",
    "port": 8080,
    "ttl_seconds": 30,
    "use_tls": False,
}


class Running:
    """The API on a loopback port, with a clock that the test turns."""

    def __init__(self, *, max_connections: int = MAX_CONNECTIONS, **config: Any) -> None:
        self.now = 1000.0
        self.worker = Worker()
        self.registry = Registry()
        self.feed = Feed()
        self.feed.subscribe(self.worker)
        self.metrics = Metrics(self.registry, self.feed.counters)
        self.faults: list[str] = []
        self.config = Registration(**{"secret": SECRET, "hmac_keys": (("", KEY),), **config})
        self.leases = Leases(self.registry, self.feed, clock=lambda: self.now, count_fault=self.metrics.fault)
        self.api = RegistrationApi(
            self.config,
            self.leases,
            self.metrics,
            clock=lambda: self.now,
            wall_clock=lambda: WALL + self.now,
            faults=lambda: self.faults,
            max_connections=max_connections,
        )
        self.client: ClientSession
        self.runner: AppRunner
        self.port = 0

    def token(self, service: str = "app.example") -> str:
        return sign_token(service, KEY, "", 60, WALL + self.now)

    def headers(self, **replaced: str | None) -> dict[str, str]:
        """Good ones; a keyword replaces one (`_` is `-`), None leaves it out."""
        headers: dict[str, str | None] = {
            "X-Register-Secret": SECRET,
            "Authorization": f"Bearer {self.token()}",
            "Content-Type": "application/json",
        }
        headers |= {name.replace("_", "-"): value for name, value in replaced.items()}
        return {name: value for name, value in headers.items() if value is not None}

    async def post(self, body: object = BODY, **headers: str | None) -> ClientResponse:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post("/register", data=data, headers=self.headers(**headers))

    async def delete(self, body: object, **headers: str | None) -> ClientResponse:
        return await self.client.delete(
            "/register", data=json.dumps(body).encode(), headers=self.headers(**headers)
        )


@contextlib.asynccontextmanager
async def running(**config: Any) -> AsyncIterator[Running]:
    one = Running(**config)
    await one.leases.start()
    runner = one.runner = one.api.runner()
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        await OpenSite(runner, sock, one.api.door).start()
        one.port = sock.getsockname()[1]
        async with ClientSession(f"http://127.0.0.1:{one.port}") as one.client:
            yield one
        await runner.cleanup()
    await one.leases.close()


@pytest.fixture
async def api() -> AsyncIterator[Running]:
    async with running() as one:
        yield one


async def problem(response: ClientResponse, status: int, reason: str) -> dict[str, Any]:
    """Check that the answer is a problem document; returns it."""
    document: dict[str, Any] = await response.json(content_type="application/problem+json")
    assert (response.status, document["status"], document["reason"]) == (status, status, reason)
    assert document["type"] == f"urn:portero:problem:{reason}"
    assert document["title"]
    assert SECRET not in str(document)
    assert KEY not in str(document)
    return document


# 200


async def test_a_backend_is_in_the_workers_table_when_its_post_is_answered(api: Running) -> None:
    response = await api.post()
    assert response.status == 200
    assert response.content_type == "application/json"
    assert await response.json() == {
        "status": "registered",
        "service_name": "app.example",
        "instance_id": "[::1]:8080",
        "expires_in": 30,
        "renew_after": 10,
    }
    lease = api.worker.table.services["app.example"].leases[0]
    assert (lease.backend.address, lease.expires_at, lease.weight) == ("[::1]:8080", 1030.0, 1)


async def test_the_post_is_not_answered_before_the_feed_has_delivered() -> None:
    delivered = asyncio.Event()
    async with running() as api:

        async def slow(table: RoutingTable) -> None:
            await delivered.wait()
            api.worker.apply(table)

        api.feed.publish = slow  # type: ignore[method-assign]
        answer = asyncio.ensure_future(api.post())
        while api.registry.lease_count == 0:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert not answer.done()
        delivered.set()
        assert (await answer).status == 200


async def test_everything_that_a_backend_may_say_arrives(api: Running) -> None:
    digits = "AB" * 32
    response = await api.post(
        {
            **BODY,
            "service_name": "APP.Example.",
            "host": "fe80::1%eth0",
            "use_tls": True,
            "instance_id": "one",
            "weight": 7,
            "protocol": "http1",
            "health_path": "/up?deep=1",
            "tls_fingerprint": ":".join(digits[i : i + 2] for i in range(0, 64, 2)),
            "something_new": {"ignored": True},
        }
    )
    assert (await response.json())["instance_id"] == "one"
    lease = api.worker.table.services["app.example"].leases[0]
    backend = lease.backend
    assert (backend.host, backend.use_tls, backend.tls_fingerprint) == ("fe80::1%eth0", True, "ab" * 32)
    assert (lease.weight, lease.health_path) == (7, "/up?deep=1")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.7", "192.0.2.7:8080"),
        ("2001:DB8:0::1", "[2001:db8::1]:8080"),
        ("::ffff:192.0.2.7", "192.0.2.7:8080"),
    ],
)
async def test_ipv4_and_ipv6_backends_register_under_one_spelling(
    api: Running, host: str, address: str
) -> None:
    assert (await api.post({**BODY, "host": host})).status == 200
    assert api.worker.addresses() == [address]


async def test_null_and_absent_mean_the_same_for_what_is_optional(api: Running) -> None:
    optional = ("use_tls", "instance_id", "weight", "protocol", "health_path", "tls_fingerprint")
    assert (await api.post({**BODY, **dict.fromkeys(optional)})).status == 200
    assert (await api.post({key: BODY[key] for key in BODY if key != "use_tls"})).status == 200
    assert api.worker.addresses() == ["[::1]:8080"]


async def test_a_renewal_with_another_address_is_in_the_table_at_once(api: Running) -> None:
    await api.post({**BODY, "instance_id": "one"})
    api.now += 20
    await api.post({**BODY, "instance_id": "one", "port": 8081})
    assert api.worker.addresses() == ["[::1]:8081"]
    assert api.worker.table.services["app.example"].leases[0].expires_at == 1050.0


@pytest.mark.parametrize(("ttl", "renew_after"), [(1, 0.33), (2, 0.67), (3, 1), (100, 33), (86_400, 28_800)])
async def test_renewal_is_asked_for_after_about_a_third(api: Running, ttl: int, renew_after: float) -> None:
    answer = await (await api.post({**BODY, "ttl_seconds": ttl})).json()
    assert (answer["expires_in"], answer["renew_after"]) == (ttl, renew_after)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON;x=y"])
async def test_the_content_type_may_have_parameters(api: Running, content_type: str) -> None:
    assert (await api.post(Content_Type=content_type)).status == 200


async def test_a_wildcard_service_registers_with_a_token_for_the_wildcard(api: Running) -> None:
    token = f"Bearer {api.token('*.Example.com')}"
    response = await api.post({**BODY, "service_name": "*.example.com"}, Authorization=token)
    assert (await response.json())["service_name"] == "*.example.com"


# 400, 413, 415


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"a": NaN}', b'{"a": 1} x'])
async def test_what_is_no_json_is_a_400(api: Running, data: bytes) -> None:
    await problem(await api.post(data), 400, "bad_json")


@pytest.mark.parametrize("body", [[], "text", 1, None])
async def test_json_that_is_no_object_is_a_400(api: Running, body: object) -> None:
    await problem(await api.post(body), 400, "bad_json")


@pytest.mark.parametrize("field", ["service_name", "host", "port", "ttl_seconds"])
async def test_a_missing_field_is_named(api: Running, field: str) -> None:
    for body in ({key: BODY[key] for key in BODY if key != field}, {**BODY, field: None}):
        document = await problem(await api.post(body), 400, "bad_field")
        assert document["field"] == field
        assert "missing" in document["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("service_name", ""),
        ("service_name", 1),
        ("service_name", "app.example:443"),
        ("service_name", "not a name"),
        ("service_name", "*"),
        ("host", 1),
        ("host", ""),
        ("host", "backend.internal"),
        ("host", "[::1]"),
        ("host", "::"),
        ("host", "0.0.0.0"),
        ("host", "::ffff:0.0.0.0"),
        ("host", "224.0.0.1"),
        ("host", "255.255.255.255"),
        ("host", "ff02::1%eth0"),
        ("host", "fe80::1%"),
        ("host", "fe80::1%a b"),
        ("host", "fe80::1%eth0\n"),
        ("host", "010.0.0.1"),
        ("port", 0),
        ("port", 65_536),
        ("port", -1),
        ("port", 80.0),
        ("port", "80"),
        ("port", True),
        ("ttl_seconds", 0),
        ("ttl_seconds", 86_401),
        ("ttl_seconds", True),
        ("ttl_seconds", 1.5),
        ("use_tls", 1),
        ("use_tls", "true"),
        ("instance_id", 1),
        ("instance_id", "two words"),
        ("instance_id", "line\nbreak"),
        ("instance_id", "x" * 129),
        ("weight", 0),
        ("weight", 1_001),
        ("weight", True),
        ("protocol", "http3"),
        ("protocol", 1),
        ("protocol", "h2"),
        ("protocol", "h2c"),
        ("health_path", "up"),
        ("health_path", "/a b"),
        ("health_path", "/a\r\nb"),
        ("health_path", "/" * 1_025),
        ("tls_fingerprint", "ab" * 31),
        ("tls_fingerprint", "xy" * 32),
        ("tls_fingerprint", 1),
    ],
)
async def test_a_field_that_cannot_be_is_named(api: Running, field: str, value: object) -> None:
    document = await problem(await api.post({**BODY, "use_tls": True, field: value}), 400, "bad_field")
    assert document["field"] == field
    assert api.registry.lease_count == 0


async def test_a_protocol_that_is_not_there_yet_is_said_so(api: Running) -> None:
    document = await problem(await api.post({**BODY, "protocol": "h2c"}), 400, "bad_field")
    assert "not supported by this version" in document["detail"]


async def test_a_fingerprint_without_tls_is_a_400(api: Running) -> None:
    document = await problem(await api.post({**BODY, "tls_fingerprint": "ab" * 32}), 400, "bad_field")
    assert document["field"] == "tls_fingerprint"


async def test_a_body_over_64_kib_is_a_413(api: Running) -> None:
    padded = json.dumps({**BODY, "padding": ""}).encode()
    largest = json.dumps({**BODY, "padding": "x" * (65_536 - len(padded))}).encode()
    assert (await api.post(largest)).status == 200
    await problem(await api.post(largest + b" "), 413, "too_large")


async def test_a_body_without_a_length_is_cut_off_at_64_kib(api: Running) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(70):
            yield b" " * 1024

    response = await api.client.post("/register", data=endless(), headers=api.headers())
    await problem(response, 413, "too_large")


async def test_a_body_that_does_not_come_is_a_408(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT", 0.05)
    head = "".join(f"{name}: {value}\r\n" for name, value in api.headers().items())
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"POST /register HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 10\r\n\r\n{{".encode())
    assert (await reader.readline()).split()[1] == b"408"
    writer.close()
    await writer.wait_closed()


async def test_a_backend_that_vanishes_amid_its_body_is_no_bug_of_ours(
    api: Running, caplog: pytest.LogCaptureFixture
) -> None:
    head = "".join(f"{name}: {value}\r\n" for name, value in api.headers().items())
    _, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"POST /register HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 10\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()
    await until(lambda: api.metrics._registrations["bad_json"] == 1)
    assert not caplog.records


async def test_a_compressed_body_is_a_415_and_never_unpacked(api: Running) -> None:
    await problem(await api.post(b"no gzip at all", Content_Encoding="gzip"), 415, "not_json")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/jsonp", "application/x-www-form"])
async def test_what_is_not_declared_as_json_is_a_415(api: Running, content_type: str | None) -> None:
    kept = {name: value for name, value in api.headers().items() if name != "Content-Type"}
    declared = {"Content-Type": content_type} if content_type else {}
    response = await api.client.post(
        "/register",
        data=json.dumps(BODY).encode(),
        headers={**kept, **declared},
        skip_auto_headers=["Content-Type"],
    )
    await problem(response, 415, "not_json")


# 401, 403


@pytest.mark.parametrize(
    ("header", "value", "status", "reason"),
    [
        ("X_Register_Secret", None, 401, "secret_missing"),
        ("X_Register_Secret", "wrong", 403, "secret_wrong"),
        ("X_Register_Secret", "", 403, "secret_wrong"),
        ("Authorization", None, 401, "token_missing"),
        ("Authorization", "Basic YTpi", 401, "token_missing"),
        ("Authorization", "Bearer nonsense", 401, "token_malformed"),
    ],
)
async def test_a_bad_secret_or_bearer_is_refused(
    api: Running, header: str, value: str | None, status: int, reason: str
) -> None:
    for send in (api.post, api.delete):
        response = await send(BODY, **{header: value})
        await problem(response, status, reason)
        assert ("WWW-Authenticate" in response.headers) is (status == 401)
    assert api.registry.lease_count == 0


async def test_an_expired_token_is_a_401(api: Running) -> None:
    token = f"Bearer {api.token()}"
    api.now += 59
    assert (await api.post(Authorization=token)).status == 200
    api.now += 1
    await problem(await api.post(Authorization=token), 401, "token_expired")


async def test_a_token_with_another_algorithm_is_a_403(api: Running) -> None:
    await problem(await api.post(Authorization="Bearer eyJhbGciOiJub25lIn0.e30."), 403, "token_algorithm")


async def test_a_token_for_another_service_is_a_403(api: Running) -> None:
    other = f"Bearer {api.token('other.example')}"
    await problem(await api.post(Authorization=other), 403, "token_mismatch")
    await api.post()
    await problem(await api.delete(BODY, Authorization=other), 403, "token_mismatch")
    assert api.worker.addresses() == ["[::1]:8080"]


async def test_audience_and_issuer_are_checked_when_they_are_configured() -> None:
    async with running(audience="edge", issuer="deploy") as api:
        await problem(await api.post(), 403, "token_mismatch")
        good = sign_token("app.example", KEY, "", 60, WALL + api.now, audience="edge", issuer="deploy")
        assert (await api.post(Authorization=f"Bearer {good}")).status == 200


async def test_a_key_is_chosen_by_its_name() -> None:
    async with running(hmac_keys=(("old", "o" * 32), ("new", KEY))) as api:
        for kid, key in (("old", "o" * 32), ("new", KEY)):
            token = sign_token("app.example", key, kid, 60, WALL + api.now)
            assert (await api.post(Authorization=f"Bearer {token}")).status == 200
        token = sign_token("app.example", "o" * 32, "new", 60, WALL + api.now)
        await problem(await api.post(Authorization=f"Bearer {token}"), 401, "token_malformed")


async def test_an_address_outside_the_allowed_networks_is_a_403() -> None:
    networks = (ip_network("10.0.0.0/8"), ip_network("fe80::/10"))
    async with running(backend_cidrs=networks) as api:
        for host in ("10.1.2.3", "::ffff:10.1.2.4", "fe80::1%eth0"):
            assert (await api.post({**BODY, "host": host})).status == 200
        for host in ("::1", "11.0.0.1", "::ffff:11.0.0.1"):
            await problem(await api.post({**BODY, "host": host}), 403, "backend_refused")
        assert api.registry.lease_count == 3


async def test_secret_then_token_then_body_is_the_order_of_the_checks(api: Running) -> None:
    huge = b"x" * 100_000
    response = await api.post(
        huge, X_Register_Secret="wrong", Authorization="Bearer nonsense", Content_Type="text/plain"
    )
    await problem(response, 403, "secret_wrong")
    response = await api.post(huge, Authorization="Bearer nonsense", Content_Type="text/plain")
    await problem(response, 401, "token_malformed")
    await problem(await api.post(huge, Content_Type="text/plain"), 415, "not_json")
    await problem(await api.post(huge), 413, "too_large")


# 429, 503


async def test_a_peer_that_fails_too_often_is_told_when_to_come_back(api: Running) -> None:
    for _ in range(FAILURE_BURST):
        await problem(await api.post(X_Register_Secret="wrong"), 403, "secret_wrong")
    response = await api.post(X_Register_Secret="wrong")
    await problem(response, 429, "rate_limited")
    assert response.headers["Retry-After"] == "1"
    assert (await api.post()).status == 200  # its neighbour behind the same address goes on
    await problem(await api.client.get("/backends", headers=api.headers()), 429, "rate_limited")
    api.now += 1
    await problem(await api.post(X_Register_Secret="wrong"), 403, "secret_wrong")


async def test_a_full_registry_is_a_503(api: Running) -> None:
    api.registry._max_leases = 1
    await api.post()
    await problem(await api.post({**BODY, "port": 8081}), 503, "registry_full")


# DELETE


@pytest.mark.parametrize("which", [{"instance_id": "one"}, {"host": "::1", "port": 8080}])
async def test_a_deregistered_backend_is_out_of_the_table_when_that_is_answered(
    api: Running, which: dict[str, object]
) -> None:
    await api.post({**BODY, "instance_id": "one"})
    await api.post({**BODY, "port": 8081})
    response = await api.delete({"service_name": "App.example", **which})
    assert response.status == 200
    assert await response.json() == {
        "status": "deregistered",
        "service_name": "app.example",
        "instance_id": "one",
        "in_flight": 0,
    }
    assert api.worker.addresses() == ["[::1]:8081"]


async def test_a_lease_that_is_not_there_cannot_be_deregistered(api: Running) -> None:
    await api.post({**BODY, "instance_id": "one"})
    for which in ({"instance_id": "two"}, {"host": "::1", "port": 1}):
        await problem(await api.delete({"service_name": "app.example", **which}), 404, "no_such_lease")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"instance_id": "one"}, "service_name"),
        ({"service_name": "app.example"}, "instance_id"),
        ({"service_name": "app.example", "host": "::1"}, "port"),
        ({"service_name": "app.example", "port": 80}, "host"),
        ({"service_name": "app.example", "instance_id": "a b"}, "instance_id"),
    ],
)
async def test_a_delete_says_which_lease(api: Running, body: dict[str, object], field: str) -> None:
    document = await problem(await api.delete(body), 400, "bad_field")
    assert document["field"] == field


# GET


@pytest.mark.parametrize("path", ["/health", "/livez"])
async def test_who_lives_says_ok(api: Running, path: str) -> None:
    response = await api.client.get(path)
    assert (response.status, await response.text()) == (200, "ok")


async def test_readiness_begins_when_all_is_up_and_ends_with_the_drain(api: Running) -> None:
    seen = []
    for state in (State.STARTING, State.READY, State.DRAINING):
        api.api.state = state
        response = await api.client.get("/readyz")
        seen.append((response.status, await response.text()))
    assert seen == [(503, "starting"), (200, "ready"), (503, "draining")]


async def test_the_registry_can_be_read_with_the_secret(api: Running) -> None:
    await problem(await api.client.get("/backends"), 401, "secret_missing")
    wrong = {"X-Register-Secret": "wrong"}
    await problem(await api.client.get("/backends", headers=wrong), 403, "secret_wrong")
    await api.post({**BODY, "instance_id": "one", "use_tls": True, "weight": 2})
    await api.post({**BODY, "ttl_seconds": 5})
    await api.post({**BODY, "instance_id": "one", "use_tls": True, "weight": 2, "port": 8081})
    api.now += 7.5
    response = await api.client.get("/backends", headers={"X-Register-Secret": SECRET})
    backend = {"host": "::1", "protocol": "http1", "tls_fingerprint": "", "also": []}
    assert await response.json() == {
        "version": 3,
        "default_service": "",
        "routes": [],
        "services": [
            {
                "service_name": "app.example",
                "state": "serving",
                "policy": None,
                "backends": [
                    {
                        **backend,
                        "instance_id": "one",
                        "port": 8081,
                        "use_tls": True,
                        "weight": 2,
                        "max_in_flight": 0,
                        "health_path": "",
                        "source": "api",
                        "state": "ready",
                        "since": "2023-11-14T22:30:00Z",
                        "last_error": "",
                        "in_flight": 0,
                        "ejected": 0,
                        "expires_in": 22.5,
                    },
                ],
            }
        ],
    }


async def test_a_lease_that_has_expired_is_not_shown_swept_or_not(api: Running) -> None:
    await api.post()
    await api.post({**BODY, "port": 8081, "ttl_seconds": 60})
    api.now += 30
    response = await api.client.get("/backends", headers={"X-Register-Secret": SECRET})
    [service] = (await response.json())["services"]
    assert [backend["port"] for backend in service["backends"]] == [8081]


async def test_backends_of_another_source_are_shown_beside_and_never_end(api: Running) -> None:
    backends = [Backend("192.0.2.7", 80), Backend("::1", 8080)]
    await api.leases.replace("static", [LeaseRequest("app.example", each, None) for each in backends])
    await api.post({**BODY, "instance_id": "one"})  # at an address that is there already: one backend
    await api.post({**BODY, "instance_id": "two", "port": 8081})
    response = await api.client.get("/backends", headers={"X-Register-Secret": SECRET})
    [service] = (await response.json())["services"]
    shown = ("instance_id", "source", "state", "expires_in")
    assert [tuple(backend[key] for key in shown) for backend in service["backends"]] == [
        ("192.0.2.7:80 (static)", "static", "ready", None),
        ("[::1]:8080 (static)", "static", "ready", None),
        ("two", "api", "ready", 30.0),
    ]


async def test_a_backend_that_drains_is_shown_to_drain_until_its_lease_ends(api: Running) -> None:
    lease = Lease("app.example", "one", Backend("::1", 8080), 1020.0, 30, state=LeaseState.DRAINING)
    api.leases.restore([Service("app.example", (lease,))], 1)
    response = await api.client.get("/backends", headers={"X-Register-Secret": SECRET})
    [service] = (await response.json())["services"]
    assert [(each["state"], each["expires_in"]) for each in service["backends"]] == [("draining", 20.0)]


async def test_a_backend_ends_no_lease_of_another_source(api: Running) -> None:
    await api.leases.grant(LeaseRequest("app.example", Backend("::1", 8080), None), "static")
    await problem(await api.delete(BODY), 404, "no_such_lease")
    assert (await api.post()).status == 200
    assert (await api.delete(BODY)).status == 200
    assert api.worker.addresses() == ["[::1]:8080"]


async def test_metrics_count_the_registrations_by_result(api: Running) -> None:
    await api.post()
    await api.post()
    await api.post(X_Register_Secret="wrong")
    await api.post(b"{")
    await api.delete(BODY)
    response = await api.client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    text = await response.text()
    for result in ("registered", "renewed", "secret_wrong", "bad_json", "deregistered"):
        assert f'portero_registrations_total{{result="{result}"}} 1.0' in text
    assert "portero_registry_backends 0.0" in text


async def test_what_aiohttp_refuses_is_a_problem_document_too(api: Running) -> None:
    await problem(await api.client.get("/nothing"), 404, "not_found")
    response = await api.client.put("/register")
    await problem(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "DELETE,POST"


async def test_a_bug_is_a_500_that_tells_the_log_and_not_the_client(
    api: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: object, now: float, source: str) -> None:
        raise RuntimeError("the inner workings")

    api.registry.register = broken  # type: ignore[method-assign,assignment]
    document = await problem(await api.post(), 500, "internal_error")
    assert "inner workings" not in str(document)
    assert "inner workings" in caplog.text


async def test_readyz_names_what_fails_and_only_while_it_would_be_ready() -> None:
    async with running() as api:
        faults = api.faults
        faults += ["snapshot", "certificates"]
        api.api.state = State.READY
        for expected in ("fault: certificates, snapshot", "ready"):
            response = await api.client.get("/readyz")
            assert (response.status, await response.text()) == (200 if not faults else 503, expected)
            faults.clear()
        faults.append("certificates")
        api.api.state = State.DRAINING
        assert await (await api.client.get("/readyz")).text() == "draining"


# The sweep


async def test_what_expired_is_swept_out_of_the_workers_table(api: Running) -> None:
    await api.post()
    version = api.worker.table.version
    await api.leases.sweep()
    assert api.worker.table.version == version
    api.now += 30
    await api.leases.sweep()
    assert api.worker.addresses() == []
    api.now += LINGER
    await api.leases.sweep()
    assert not api.worker.table.services


# The log


async def test_first_registrations_moves_and_ends_are_logged_and_renewals_are_not(
    api: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "portero_py")
    await api.post({**BODY, "instance_id": "one"})
    await api.post({**BODY, "instance_id": "one"})
    await api.post({**BODY, "instance_id": "one", "port": 8081})
    await api.delete({**BODY, "instance_id": "one"})
    await api.post({**BODY, "use_tls": True})
    api.now += 30
    await api.leases.sweep()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("portero_py")] == [
        "registered: app.example at http://[::1]:8080 (one) for 30 s",
        "moved: app.example at http://[::1]:8081 (one), was [::1]:8080",
        "deregistered: app.example at http://[::1]:8081 (one)",
        "registered: app.example at https://[::1]:8080 for 30 s",
        "expired: app.example at https://[::1]:8080",
    ]


async def test_nothing_secret_is_ever_logged(api: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = api.token()
    await api.post()
    await api.post(b"{")
    await api.post(X_Register_Secret="nearly-right")
    await api.post(Authorization="Bearer nearly.right.too")
    await api.delete(BODY)
    for secret in (SECRET, KEY, token, "nearly"):
        assert secret not in caplog.text
    assert SECRET not in repr(api.config)


# The start


@pytest.mark.parametrize("config", [{"secret": ""}, {"hmac_keys": ()}, {"hmac_keys": (("", ""),)}])
def test_an_api_that_anybody_could_use_does_not_start(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Running(**config)
