"""Routes, changed fields and maintenance, as clients and backends see them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from portero_py.core.model import Service
from portero_py.core.policies import FieldChanges, Maintenance, ServicePolicy
from portero_py.core.routes import Route, Routes
from portero_py.core.routing_table import RoutingTable
from tests.proxy.dialogue import GET, OK, World


def serve(world: World, policy: ServicePolicy | None = None, *routes: Route) -> None:
    """Serve app.example by `policy`, with these routes."""
    [service] = world.table.services.values()
    services = {"app.example": replace(service, policy=policy), "empty.example": Service("empty.example", ())}
    world.apply(RoutingTable(world.table.version + 1, services, routes=Routes(routes)))


def get(target: str, host: str = "www.example") -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("target", "stripped"),
    [("/api", "/"), ("/api/", "/"), ("/api?x=1", "/?x=1"), ("/api/a/b?c", "/a/b?c"), ("/api//a", "//a")],
)
async def test_a_route_leads_to_its_service_and_strips_its_path(
    world: World, target: str, stripped: str
) -> None:
    serve(world, None, Route("www.example", "/api", "app.example", strip_path=True))
    client = world.client()
    client.send(get(target))
    backend = await world.backend()
    assert backend.received.startswith(f"GET {stripped} HTTP/1.1\r\nHost: www.example\r\n".encode())
    assert b"\r\nX-Forwarded-Prefix: /api\r\n" in backend.received
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")
    [done] = world.done
    assert (done.head.target, done.service) == (target.encode(), "app.example")


async def test_other_paths_of_that_host_are_nobodys(world: World) -> None:
    serve(world, None, Route("www.example", "/api", "app.example"))
    client = world.client()
    client.send(get("/other"))
    assert client.received.startswith(b"HTTP/1.1 404")


async def test_a_route_to_a_service_without_backends_is_503_and_to_none_404(world: World) -> None:
    serve(
        world,
        None,
        Route("www.example", "/a", "empty.example"),
        Route("www.example", "/b", "unknown.example"),
    )
    one, two = world.client(), world.client()
    one.send(get("/a"))
    assert one.received.startswith(b"HTTP/1.1 503")
    two.send(get("/b"))
    assert two.received.startswith(b"HTTP/1.1 404")


async def test_a_retry_stays_on_the_route_though_its_target_was_stripped(world: World) -> None:
    world.register(2)
    serve(world, None, Route("www.example", "/api", "app.example", strip_path=True))
    client = world.client()
    client.send(get("/api/x"))
    (await world.backend()).vanish(ConnectionResetError())
    backend = await world.backend()
    assert backend.received.startswith(b"GET /x HTTP/1.1\r\n")
    backend.send(OK)
    assert client.received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("redirect", "target", "location"),
    [
        ("https://example.com$uri", "/a?b=c", "https://example.com/a?b=c"),
        ("https://example.com/", "/a", "https://example.com/"),
        ("$uri", "//elsewhere/x", "/elsewhere/x"),
    ],
)
async def test_a_redirect_is_answered_at_once(
    world: World, redirect: str, target: str, location: str
) -> None:
    serve(world, None, Route("www.example", redirect=redirect, status=301))
    client = world.client()
    client.send(get(target) + get(target))
    assert client.received.startswith(b"HTTP/1.1 301 Moved Permanently\r\n")
    assert client.received.count(f"\r\nLocation: {location}\r\n".encode()) == 2
    assert [(done.status, done.service, done.error) for done in world.done] == [(301, "", None)] * 2


async def test_a_redirect_of_a_post_takes_no_body_and_of_a_head_sends_none(world: World) -> None:
    serve(world, None, Route("www.example", redirect="https://example.com$uri"))
    one, two = world.client(), world.client()
    one.send(b"POST /a HTTP/1.1\r\nHost: www.example\r\nContent-Length: 5\r\n\r\n")
    assert one.received.startswith(b"HTTP/1.1 308 Permanent Redirect\r\n")
    two.send(b"HEAD /a HTTP/1.1\r\nHost: www.example\r\n\r\n")
    assert two.received.endswith(b"\r\n\r\n")


async def test_fields_are_changed_both_ways(world: World) -> None:
    changes = FieldChanges(("X-Debug",), (("X-Env", "prod"),), (("X-More", "1"),))
    serve(world, ServicePolicy(request_headers=changes, response_headers=changes))
    client = world.client()
    request = GET[:-2] + b"x-env: forged\r\nx-debug: 1\r\nAccept: */*\r\n\r\n"
    answer = OK.replace(b"\r\n\r\n", b"\r\nX-Env: inner\r\nX-DEBUG: secret\r\n\r\n")
    for _ in range(2):
        client.send(request)
    backend = await world.backend()
    for _ in range(2):
        assert b"\r\nAccept: */*\r\nX-Env: prod\r\nX-More: 1\r\n" in backend.received
        assert b"forged" not in backend.received
        assert b"debug" not in backend.received.lower()
        backend.received = b""
        backend.send(answer)
    assert client.received.count(b"\r\nX-Env: prod\r\nX-More: 1\r\n") == 2
    assert b"inner" not in client.received
    assert b"secret" not in client.received


async def test_under_maintenance_everybody_gets_the_page(world: World) -> None:
    serve(world, ServicePolicy(maintenance=Maintenance("<h1>Soon</h1>", retry_after=600)))
    client = world.client()
    client.send(GET)
    assert client.received.startswith(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/html")
    assert b"\r\nRetry-After: 600\r\n" in client.received
    assert client.received.endswith(b"\r\n\r\n<h1>Soon</h1>")
    [done] = world.done
    assert done.error is not None
    assert done.error.reason == "maintenance"


async def test_a_program_hears_of_maintenance_in_its_own_words(world: World) -> None:
    serve(world, ServicePolicy(maintenance=Maintenance("<h1>Soon</h1>")))
    client = world.client()
    client.send(GET[:-2] + b"Accept: application/json\r\n\r\n")
    assert b"\r\nContent-Type: application/problem+json\r\n" in client.received
    assert b'"reason":"maintenance"' in client.received
    assert b"\r\nRetry-After: 60\r\n" in client.received
