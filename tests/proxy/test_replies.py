"""The responses that portero itself writes."""

from __future__ import annotations

from email.utils import formatdate

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py import errors
from portero_py.proxy.replies import http_date, reply
from portero_py.wire.message import Fields, RequestHead

HEAD = RequestHead(b"GET", b"/", b"app.example", b"1.1", [])


def all_errors() -> list[type[errors.PorteroError]]:
    """Every error that can end a request."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, errors.WireError | errors.ExchangeError)]


@pytest.mark.parametrize("error_type", all_errors())
def test_every_error_has_a_reply_with_its_status_and_a_length_that_is_true(
    error_type: type[errors.PorteroError],
) -> None:
    head, body = reply(error_type("something to say"), HEAD, b"id-1")
    fields = dict(head.fields)
    assert head.status == error_type.status
    assert head.body_length == len(body) == int(fields[b"Content-Length"])
    assert head.phrase not in (b"", b"Error")
    assert fields[b"X-Request-ID"] == b"id-1"
    assert fields[b"Cache-Control"] == b"no-store"
    assert fields[b"Content-Type"].startswith(b"text/plain")


@pytest.mark.parametrize("error_type", all_errors())
def test_a_stranger_is_not_told_where_the_backends_are(error_type: type[errors.PorteroError]) -> None:
    _, body = reply(error_type("backend 10.0.0.1:80 cannot be reached"), HEAD, b"id-1")
    assert (b"10.0.0.1" in body) == (error_type.status not in (502, 504))


@pytest.mark.parametrize("accept", [b"application/json", b"text/html, Application/Problem+JSON;q=0.5"])
def test_who_asks_for_json_gets_it(accept: bytes) -> None:
    head, body = reply(
        errors.NoSuchService("no service"),
        RequestHead(b"GET", b"/", b"app.example", b"1.1", [(b"accept", accept)]),
        b"id-1",
    )
    assert dict(head.fields)[b"Content-Type"] == b"application/problem+json"
    assert orjson.loads(body) == {
        "title": "Not Found",
        "status": 404,
        "detail": "no service",
        "reason": "no_such_service",
        "request_id": "id-1",
    }


@pytest.mark.parametrize("fields", [[], [(b"Accept", b"text/html")], [(b"X-Accept", b"application/json")]])
def test_who_does_not_ask_for_json_gets_text(fields: Fields) -> None:
    head, body = reply(
        errors.NoSuchService("no service"), RequestHead(b"GET", b"/", b"a", b"1.1", fields), b""
    )
    assert body == b"404 Not Found: no service\n"
    assert head.phrase == b"Not Found"


def test_the_reply_to_head_has_the_length_and_not_the_body() -> None:
    head, body = reply(errors.NoBackend("nobody"), RequestHead(b"HEAD", b"/", b"a", b"1.1", []), b"")
    assert body == b""
    assert dict(head.fields)[b"Content-Length"] == b"%d" % len(b"503 Service Unavailable: nobody\n")


def test_a_reply_without_a_request_is_text() -> None:
    _, body = reply(errors.HeadTimeout("too late"), None, b"")
    assert body == b"408 Request Timeout: too late\n"


def test_an_unavailable_service_says_when_to_come_back_and_nothing_else_does() -> None:
    assert dict(reply(errors.NoBackend(""), HEAD, b"")[0].fields)[b"Retry-After"] == b"2"
    assert b"Retry-After" not in dict(reply(errors.NoSuchService(""), HEAD, b"")[0].fields)


def test_a_refused_method_is_told_the_others() -> None:
    assert b"GET" in dict(reply(errors.MethodRefused(""), HEAD, b"")[0].fields)[b"Allow"]
    assert b"Allow" not in dict(reply(errors.NoBackend(""), HEAD, b"")[0].fields)


@given(st.integers(0, 253_402_300_799))
def test_a_date_is_what_the_rfc_wants(seconds: int) -> None:
    assert http_date(seconds).decode() == formatdate(seconds, usegmt=True)
