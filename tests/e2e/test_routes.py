"""Routes, redirects, changed fields and maintenance, over HTTP/1 and HTTP/2."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.backends import RecordingBackend, answer_with
from tests.e2e.certificates import Authority, client_context
from tests.e2e.conftest import SHORT_GOODBYE, Need, StartBackend
from tests.e2e.curl_answers import ask_by_curl
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually

TOML = (
    SHORT_GOODBYE
    + """
[[service]]
name = "api.e2e.test"
request_headers.set = { "X-Set" = "by the proxy" }
request_headers.add = { "X-Added" = ["1", "2"] }
request_headers.remove = ["X-Gone"]
response_headers = { set = { "Strict-Transport-Security" = "max-age=60" }, remove = ["Server"] }

[[route]]
host = "front.e2e.test"
path = "/api"
service = "api.e2e.test"
strip_path = true

[[route]]
host = "front.e2e.test"
path = "/api/whole"
service = "api.e2e.test"

[[route]]
host = "old.e2e.test"
redirect = "https://front.e2e.test$uri"

[[route]]
host = "here.e2e.test"
redirect = "/$uri"
status = 302

[[route]]
host = "*.e2e.test"
path = "/wild"
service = "api.e2e.test"

[[service]]
name = "closed.e2e.test"
maintenance = { page = "<h1>Back soon</h1>", retry_after = 30 }
"""
)

#: Runs curl with flags for a URL's host and path.
Ask = Callable[..., str]


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, certificate_folder: Path) -> Iterator[ProxyProcess]:
    """A proxy with services and routes of its own."""
    proxy = ProxyProcess(tmp_path_factory.mktemp("routed"), certificates=certificate_folder, toml=TOML)
    proxy.start()
    try:
        yield proxy
        proxy.stop()
    finally:
        if proxy.is_running:
            proxy.kill()


@pytest.fixture(params=["--http1.1", "--http2"])
def ask(request: pytest.FixtureRequest, need: Need, routed: ProxyProcess, ca_file: Path) -> Ask:
    """Run curl, in one of two versions."""
    return partial(ask_by_curl, need("curl"), ca_file, routed.port, request.param)


@pytest.fixture
def api(routed: ProxyProcess, start_backend: StartBackend) -> Iterator[RecordingBackend]:
    """What serves api.e2e.test."""
    backend = start_backend(
        answer_with(b"HTTP/1.1 200 OK\r\nServer: secret/1.0\r\nContent-Length: 2\r\n\r\nok")
    )
    routed.register("api.e2e.test", backend.host, backend.port, instance_id="api")
    yield backend
    routed.deregister("api.e2e.test", instance_id="api")


def test_a_route_leads_to_a_service_under_its_rules(
    ask: Ask, routed: ProxyProcess, api: RecordingBackend
) -> None:
    answer = ask("front.e2e.test", "/api/a/../b?c=d", "-H", "X-Gone: 1", "-H", "X-Set: by the client")
    assert answer.split(" ")[1] == "200"
    assert "\r\nstrict-transport-security: max-age=60\r\n" in answer
    assert "secret/1.0" not in answer
    [request] = api.requests
    assert (request.method, request.path) == (b"GET", b"/a/../b?c=d")
    assert request.values(b"x-forwarded-prefix") == [b"/api"]
    assert request.values(b"x-set") == [b"by the proxy"]
    assert request.values(b"x-added") == [b"1", b"2"]
    assert request.values(b"x-gone") == []
    assert request.values(b"host") == [f"front.e2e.test:{routed.port}".encode()]
    [entry] = eventually(
        lambda: [each for each in routed.access_log() if "/api/a/" in each["path"]][-1:], "the log line"
    )
    assert entry["path"].startswith("/api/a/../b")
    assert entry["service"] == "api.e2e.test"


def test_the_longest_path_wins_and_a_part_of_a_segment_is_none(ask: Ask, api: RecordingBackend) -> None:
    assert ask("front.e2e.test", "/api/whole/x").split(" ")[1] == "200"
    assert ask("any.e2e.test", "/wild").split(" ")[1] == "200"
    assert [request.path for request in api.requests] == [b"/api/whole/x", b"/wild"]
    for path in ("/apix", "/other"):
        assert ask("front.e2e.test", path).split(" ")[1] == "404"
    for path in ("//api", "/%61pi", "/x/../api", "/api/../x"):
        assert ask("front.e2e.test", path).split(" ")[1] == "400"
    assert len(api.requests) == 2


def test_a_body_goes_along(ask: Ask, api: RecordingBackend, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"0123456789" * 300_000)
    answer = ask("front.e2e.test", "/api/up", "--data-binary", f"@{tmp_path / 'body'}")
    assert answer.split(" ")[1] == "200"
    [request] = api.requests
    assert (request.path, len(request.body)) == (b"/up", 3_000_000)


def test_a_redirect_keeps_path_and_query_and_takes_nobody_elsewhere(ask: Ask) -> None:
    answer = ask("old.e2e.test", "/a/b?c=d")
    assert answer.split(" ")[1] == "308"
    assert "\r\nlocation: https://front.e2e.test/a/b?c=d\r\n" in answer
    assert ask("old.e2e.test", "/", "-I").endswith("\r\n\r\n")
    for path in ("//evil.example/x", "/\\evil.example/x", "/\\/evil.example/x", "/evil.example/x"):
        answer = ask("here.e2e.test", path)
        assert answer.split(" ")[1] == "302"
        assert "\r\nlocation: /evil.example/x\r\n" in answer


def test_maintenance_is_a_page_or_a_problem(ask: Ask) -> None:
    answer = ask("closed.e2e.test")
    assert answer.split(" ")[1] == "503"
    assert "\r\nretry-after: 30\r\n" in answer
    assert "\r\ncontent-type: text/html; charset=utf-8\r\n" in answer
    assert answer.endswith("\r\n\r\n<h1>Back soon</h1>")
    assert ask("closed.e2e.test", "/", "-I").endswith("\r\n\r\n")
    problem = json.loads(
        ask("closed.e2e.test", "/", "-H", "Accept: application/json").partition("\r\n\r\n")[2]
    )
    assert (problem["status"], problem["reason"]) == (503, "maintenance")


@pytest.mark.parametrize("host", ["closed.e2e.test", "old.e2e.test"])
def test_an_answer_comes_before_a_body_that_is_never_read(
    routed: ProxyProcess, authority: Authority, host: str
) -> None:
    tls = client_context(authority.pem, "http/1.1")
    with Http1Client(("127.0.0.1", routed.port), tls=tls, sni=host) as client:
        response = client.ask(get(host, "/", "Content-Length: 1000000", method="POST") + b"x" * 10_000)
        assert response.status in (308, 503)
        assert response.value(b"connection") == b"close"
    with Http1Client(("127.0.0.1", routed.port), tls=tls, sni=host) as client:
        # What has a body of none, or none at all, leaves the connection as it was.
        client.send(post(host, b"") + get(host) + get(host, method="OPTIONS"))
        assert {client.read_response().status for _ in range(3)} in ({308}, {503})


@pytest.mark.parametrize("host", ["closed.e2e.test", "old.e2e.test"])
def test_a_stream_that_is_answered_early_takes_nothing_from_the_others(
    routed: ProxyProcess, authority: Authority, api: RecordingBackend, host: str
) -> None:
    tls: ssl.SSLContext = client_context(authority.pem, "h2")
    with Http2Client(("127.0.0.1", routed.port), tls, host) as client:
        for _ in range(200):  # 3 MB, more than any window of a connection
            early = client.ask(fields_of(host, method=b"POST"), b"x" * 16_000)
            assert early.status in (308, 503)
        assert client.ask(fields_of(host)).status in (308, 503)
