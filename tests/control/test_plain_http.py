"""Port 80: a way to https, and the ACME challenges."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import ClientSession, web

from portero_py.config.model import Address
from portero_py.control.plain_http import MAX_CHALLENGE, PlainHttp, no_challenges

CHALLENGE = "/.well-known/acme-challenge/"


@contextlib.asynccontextmanager
async def serving(runner: web.BaseRunner) -> AsyncIterator[int]:
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@contextlib.asynccontextmanager
async def upstream(
    answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
) -> AsyncIterator[Address]:
    async with serving(web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)) as port:
        yield Address("127.0.0.1", port)


async def dialogue(plain_http: PlainHttp, request: bytes) -> tuple[int, dict[str, str], str]:
    """Send raw bytes to the server; returns the status, the header fields (names in lower case), the body."""
    async with serving(plain_http.runner()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = [line.partition(": ") for line in head[1:] if line]
        fields = {name.lower(): value for name, _, value in pairs}
        assert len(fields) == len(pairs)  # no field twice, nothing smuggled in
        body = b""
        if not request.startswith(b"HEAD"):
            body = await reader.readexactly(int(fields["content-length"]))
        writer.close()
        await writer.wait_closed()
    return int(head[0].split()[1]), fields, body.decode()


async def located(line: str, host: str | None, https_port: int = 443) -> tuple[int, str]:
    """The status and Location for a request line and a Host."""
    field = "" if host is None else f"Host: {host}\r\n"
    status, fields, _ = await dialogue(
        PlainHttp(https_port), f"{line} HTTP/1.1\r\n{field}\r\n".encode("utf-8", "surrogateescape")
    )
    return status, fields.get("location", "")


# The redirect


@pytest.mark.parametrize(
    ("method", "status"),
    [("GET", 301), ("HEAD", 301), ("POST", 308), ("PUT", 308), ("DELETE", 308), ("OPTIONS", 308)],
)
async def test_what_is_not_read_only_is_repeated_with_its_method(method: str, status: int) -> None:
    assert await located(f"{method} /a", "app.example") == (status, "https://app.example/a")


@pytest.mark.parametrize(
    ("target", "host", "https_port", "location"),
    [
        ("/", "app.example", 443, "https://app.example/"),
        (
            "/a%20b/%2e%2e/?q=%26&r=a+b&&",
            "app.example",
            443,
            "https://app.example/a%20b/%2e%2e/?q=%26&r=a+b&&",
        ),
        ("/a//b/../c;d?x=/y", "app.example", 443, "https://app.example/a//b/../c;d?x=/y"),
        ("/", "APP.Example.:80", 443, "https://app.example/"),
        ("/", "app.example:80", 8443, "https://app.example:8443/"),
        ("/", "[::1]:80", 443, "https://[::1]/"),
        ("/", "[0:0:0:0:0:0:0:1]", 8443, "https://[::1]:8443/"),
        ("/", "192.0.2.7:80", 443, "https://192.0.2.7/"),
        ("//evil.example/x", "app.example", 443, "https://app.example//evil.example/x"),
        ("/\\evil.example", "app.example", 443, "https://app.example/\\evil.example"),
        ("/@evil.example", "app.example", 443, "https://app.example/@evil.example"),
        ("/%0d%0aSet-Cookie:%20a=b", "app.example", 443, "https://app.example/%0d%0aSet-Cookie:%20a=b"),
        ("http://app.example/a?b", "other.example", 443, "https://app.example/a?b"),
        ("HTTP://app.example:80?b", "other.example", 443, "https://app.example/?b"),
    ],
)
async def test_host_path_and_query_are_kept(target: str, host: str, https_port: int, location: str) -> None:
    assert await located(f"GET {target}", host, https_port) == (301, location)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "app example",
        "evil.example/app.example",
        "evil.example#",
        "a@evil.example",
        "app.example:x",
        "[::1",
        "app.example\r\nHost: other.example",
    ],
)
async def test_without_one_valid_host_there_is_nowhere_to_go(host: str | None) -> None:
    assert await located("GET /a", host) == (400, "")


async def test_an_absolute_target_without_a_valid_host_is_a_400_whatever_host_says() -> None:
    assert await located("GET http://user@evil.example/a", "app.example") == (400, "")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /\xc3\xbc HTTP/1.1\r\nHost: app.example\r\n\r\n",
        b"GET /a\x00b HTTP/1.1\r\nHost: app.example\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: app.example\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01 a ClientHello\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_a_400_and_nothing_for_the_log(
    request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    status, fields, _ = await dialogue(PlainHttp(), request_bytes)
    assert (status, "location" in fields) == (400, False)
    assert not caplog.records


async def test_the_server_does_not_name_its_parts() -> None:
    _, fields, _ = await dialogue(PlainHttp(), b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n")
    assert fields["server"] == "portero"


# Challenges


async def challenge(
    plain_http: PlainHttp, path: str = f"{CHALLENGE}token-1_A", method: str = "GET"
) -> tuple[int, str]:
    status, _, body = await dialogue(
        plain_http, f"{method} {path} HTTP/1.1\r\nHost: App.example:80\r\n\r\n".encode()
    )
    return status, body


async def test_without_an_acme_client_a_challenge_is_a_404() -> None:
    assert (await challenge(PlainHttp()))[0] == 404


async def test_a_challenge_of_our_own_is_answered_with_its_key_authorization() -> None:
    async def never(request: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError("the upstream was asked")

    async with upstream(never) as address:
        ours = {"token-1_A": "token-1_A.thumbprint"}
        plain_http = PlainHttp(acme_upstream=address, challenges=ours.get)
        assert await challenge(plain_http) == (200, "token-1_A.thumbprint")
        assert await challenge(plain_http, f"{CHALLENGE}token-1_A?x=y") == (200, "token-1_A.thumbprint")


async def test_what_is_not_ours_is_asked_of_the_acme_upstream() -> None:
    asked = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        asked.append((request.method, request.raw_path, request.headers["Host"]))
        assert "Cookie" not in request.headers
        return web.Response(text="theirs", headers={"Set-Cookie": "a=b"})

    async with upstream(answer) as address:
        status, fields, body = await dialogue(
            PlainHttp(acme_upstream=address, challenges=no_challenges),
            f"GET {CHALLENGE}other HTTP/1.1\r\nHost: App.example:80\r\nCookie: a=b\r\n\r\n".encode(),
        )
        assert (status, body) == (200, "theirs")
        assert "set-cookie" not in fields
        await challenge(PlainHttp(acme_upstream=address), f"{CHALLENGE}other", "HEAD")
    assert asked == [
        ("GET", f"{CHALLENGE}other", "app.example"),
        ("HEAD", f"{CHALLENGE}other", "app.example"),
    ]


async def test_the_upstreams_own_refusals_and_redirects_are_passed_as_they_are() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path.endswith("missing"):
            return web.Response(status=404, text="unknown")
        return web.Response(status=302, text="elsewhere", headers={"Location": "http://127.0.0.1:1/"})

    async with upstream(answer) as address:
        plain_http = PlainHttp(acme_upstream=address)
        assert await challenge(plain_http, f"{CHALLENGE}missing") == (404, "unknown")
        assert await challenge(plain_http, f"{CHALLENGE}moved") == (302, "elsewhere")


@pytest.mark.parametrize(
    "path", ["", "a/b", "..", "%2e%2e", "a%2fb", "a.b", "x" * 257, "../../secret", "a\\b", "?token"]
)
async def test_what_is_no_token_reaches_no_upstream(path: str) -> None:
    async def never(request: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError("the upstream was asked")

    async with upstream(never) as address:
        assert (await challenge(PlainHttp(acme_upstream=address), f"{CHALLENGE}{path}"))[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_challenge_is_only_read(method: str) -> None:
    assert (await challenge(PlainHttp(challenges=lambda token: token), method=method))[0] == 405


async def test_an_upstream_that_is_not_there_is_a_502() -> None:
    async with upstream(lambda request: asyncio.sleep(0, web.Response())) as address:
        pass
    assert (await challenge(PlainHttp(acme_upstream=address)))[0] == 502


async def test_an_upstream_that_answers_garbage_is_a_502() -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x00\x01 not http\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    assert (await challenge(PlainHttp(acme_upstream=address)))[0] == 502
    server.close()
    await server.wait_closed()


async def test_an_upstream_that_is_too_slow_is_a_504() -> None:
    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async with upstream(slow) as address:
        plain_http = PlainHttp(acme_upstream=address, upstream_timeout=0.05)
        assert (await challenge(plain_http))[0] == 504


async def test_an_answer_of_the_upstream_has_a_largest_size() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="x" * (MAX_CHALLENGE + request.path.endswith("more")))

    async with upstream(answer) as address:
        plain_http = PlainHttp(acme_upstream=address)
        assert await challenge(plain_http, f"{CHALLENGE}just") == (200, "x" * MAX_CHALLENGE)
        assert (await challenge(plain_http, f"{CHALLENGE}more"))[0] == 502


async def test_an_answer_that_comes_in_pieces_is_put_together() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in (b"token", b".", b"thumbprint"):
            await response.write(piece)
            await asyncio.sleep(0.02)
        return response

    async with upstream(answer) as address:
        assert await challenge(PlainHttp(acme_upstream=address)) == (200, "token.thumbprint")


async def test_an_ordinary_client_ends_up_where_it_should() -> None:
    async with serving(PlainHttp(8443).runner()) as port, ClientSession() as session:
        url = f"http://127.0.0.1:{port}/a?b=c"
        async with session.get(url, allow_redirects=False) as response:
            assert response.headers["Location"] == "https://127.0.0.1:8443/a?b=c"
