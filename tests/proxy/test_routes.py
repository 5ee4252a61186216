"""Routes, changed fields and maintenance, as clients and backends see them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from portero_py.core.model import Service
from portero_py.core.policies import FieldChanges, Maintenance, ServicePolicy
from portero_py.core.routes import Route, Routes
from portero_py.core.routing_table import RoutingTable
from tests.proxy.dialogue import GET, OK, World, post, statuses
from tests.proxy.dialogue import get as get_bytes


def serve(world: World, policy: ServicePolicy | None = None, *routes: Route) -> None:
    """Serve app.example by `policy`, with these routes."""
    service = world.table.services["app.example"]
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
        # What a browser would read as another host's name, which a client chose.
        ("$uri", "/\\elsewhere/x", "/elsewhere/x"),
        ("$uri", "/\\/elsewhere/x", "/elsewhere/x"),
        ("/$uri", "/elsewhere/x", "/elsewhere/x"),
        ("/new$uri", "/\\elsewhere", "/new/\\elsewhere"),
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


async def test_a_route_without_a_path_takes_the_asterisk_too(world: World) -> None:
    serve(world, None, Route("app.example", redirect="https://example.com$uri"))
    client = world.client()
    client.send(b"OPTIONS * HTTP/1.1\r\nHost: app.example\r\n\r\n")
    assert client.received.startswith(b"HTTP/1.1 308")
    assert b"\r\nLocation: https://example.com/\r\n" in client.received


async def test_connect_is_refused_and_not_redirected(world: World) -> None:
    serve(world, None, Route("app.example", redirect="https://example.com$uri"))
    client = world.client()
    client.send(b"CONNECT app.example:443 HTTP/1.1\r\nHost: app.example\r\n\r\n")
    assert b"Location" not in client.received
    assert statuses(client.received)[0] in (404, 405)


async def test_maintenance_keeps_nothing_of_the_requests_that_it_answered(world: World) -> None:
    serve(world, ServicePolicy(maintenance=Maintenance("later")))
    client = world.client()
    for _ in range(20):
        client.send(GET)
    depths = []
    for done in world.done:
        traceback, depth = done.error and done.error.__traceback__, 0
        while traceback:
            traceback, depth = traceback.tb_next, depth + 1
        depths.append(depth)
    assert max(depths) < 5


PROTECTED = FieldChanges(
    remove=("Content-Length", "Host"),
    set=(("Transfer-Encoding", "chunked"), ("Host", "other.example"), ("X-Forwarded-For", "192.0.2.99")),
    add=(("Content-Length", "1"), ("Connection", "close"), ("X-Good", "yes")),
)


async def test_what_frames_and_routes_a_message_cannot_be_changed(world: World) -> None:
    serve(world, ServicePolicy(request_headers=PROTECTED, response_headers=PROTECTED))
    client = world.client()
    client.send(post(b"hello"))
    backend = await world.backend()
    for line in (b"Host: app.example", b"Content-Length: 5", b"X-Forwarded-For: 192.0.2.7", b"X-Good: yes"):
        assert backend.received.count(b"\r\n" + line + b"\r\n") == 1
    for name in (b"other.example", b"Transfer-Encoding", b"192.0.2.99", b"Connection"):
        assert name not in backend.received
    backend.send(OK)
    assert client.received.count(b"Content-Length") == 1
    assert b"Content-Length: 2\r\n" in client.received
    assert b"Transfer-Encoding" not in client.received
    assert client.received.endswith(b"X-Good: yes\r\n\r\nok")


async def test_what_is_remembered_of_heads_is_bounded_over_all_services(world: World) -> None:
    [service] = world.table.services.values()
    add = FieldChanges(add=(("X-Added", "yes"),))
    names = [f"s{number}.example" for number in range(40)]
    services = {
        name: Service(
            name,
            tuple(replace(lease, service=name) for lease in service.leases),
            policy=ServicePolicy(request_headers=add, response_headers=add),
        )
        for name in names
    }
    world.apply(RoutingTable(world.table.version + 1, services))
    client = world.client()
    pairs = {}
    tracemalloc.start()
    try:
        for number in range(400):
            name = names[number % 40].encode()
            unique = b"X-Unique: %b\r\n" % (b"%08d" % number * 2500)
            client.send(get_bytes(b"/", unique, name))
            if name not in pairs:
                pairs[name] = await world.backend()
            backend = pairs[name]
            assert backend.received.count(b"\r\nX-Added: yes\r\n") == 1
            backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n%b\r\n" % unique)
            assert client.received.count(b"\r\nX-Added: yes\r\n") == 1
            client.received = backend.received = b""
            world.done.clear()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4 << 20


async def test_the_same_head_comes_out_the_same_again_and_by_other_rules_otherwise(world: World) -> None:
    for value in ("one", "two", "one"):
        add = FieldChanges(add=(("X-Added", value),))
        serve(world, ServicePolicy(request_headers=add, response_headers=add))
        for _ in range(3):
            client = world.client()
            client.send(GET)
            backend = await world.backend() if len(world.loop.connections) == 0 else world.loop.connections[0]
            assert backend.received.count(b"X-Added: %b\r\n" % value.encode()) == 1
            assert backend.received.count(b"X-Added") == 1
            backend.received = b""
            backend.send(OK)
            assert client.received.count(b"X-Added") == 1
            assert b"X-Added: %b\r\n" % value.encode() in client.received
