"""Which header lists are requests, and which are refused (RFC 9113, 8.1.1 to 8.5)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.errors import BadRequest, HeadTooLarge, TargetTooLong, WireError
from portero_py.wire.http2.heads import HeadLimits, RequestReader, read_trailers
from portero_py.wire.http2.hpack import HeaderList
from portero_py.wire.message import CHUNKED, RequestHead

Pairs = list[tuple[bytes, bytes]]

LIMITS = HeadLimits(100, 2000, 12)
METHOD, SCHEME = (b":method", b"GET"), (b":scheme", b"https")
AUTHORITY, PATH = (b":authority", b"app.example"), (b":path", b"/a?b=c")
GET: Pairs = [METHOD, SCHEME, AUTHORITY, PATH]


def listed(pairs: Pairs) -> HeaderList:
    return [(name, value, False) for name, value in pairs]


def read(pairs: Pairs, *, ends: bool = True) -> RequestHead:
    return RequestReader(LIMITS).read(listed(pairs), ends=ends)


def with_(name: bytes, value: bytes) -> Pairs:
    """GET with another value for one pseudo-header, or with one more field."""
    if name in (b":method", b":scheme", b":authority", b":path"):
        return [(n, value if n == name else v) for n, v in GET]
    return [*GET, (name, value)]


def test_an_ordinary_request_is_read() -> None:
    head = read([*GET, (b"accept", b"*/*"), (b"x-empty", b""), (b"x-latin", b"\xe9\t\xff")])
    assert (head.method, head.target, head.authority, head.version) == (
        b"GET",
        b"/a?b=c",
        b"app.example",
        b"2",
    )
    assert head.fields == [(b"accept", b"*/*"), (b"x-empty", b""), (b"x-latin", b"\xe9\t\xff")]
    assert head.body_length == 0
    assert not head.wants_trailers
    assert not head.expects_continue
    assert list(head.forwarded) == []


def test_fields_that_have_a_meaning_of_their_own_are_taken_out() -> None:
    head = read(
        [
            METHOD,
            SCHEME,
            PATH,
            (b"host", b"app.example:8443"),
            (b"te", b"Trailers"),
            (b"expect", b"100-Continue"),
            (b"x-forwarded-for", b"192.0.2.1"),
            (b"x_forwarded_for", b"192.0.2.1"),
            (b"proxy-authorization", b"Basic"),
            (b"x-kept", b"1"),
        ],
        ends=False,
    )
    assert head.authority == b"app.example:8443"
    assert head.wants_trailers
    assert head.expects_continue
    assert list(head.forwarded) == [(b"x-forwarded-for", b"192.0.2.1")]
    assert head.fields == [(b"x-kept", b"1")]
    assert head.body_length == CHUNKED


def test_an_expectation_without_a_body_is_none_and_an_unknown_one_passes() -> None:
    assert not read(with_(b"expect", b"100-continue")).expects_continue
    head = read(with_(b"expect", b"tea"), ends=False)
    assert not head.expects_continue
    assert head.fields == [(b"expect", b"tea")]


def test_the_length_of_the_body_is_content_length_or_unknown() -> None:
    assert read(with_(b"content-length", b"12"), ends=False).body_length == 12
    assert read(with_(b"content-length", b"12"), ends=False).fields == [(b"content-length", b"12")]
    assert read(with_(b"content-length", b"0")).body_length == 0
    assert read(with_(b"content-length", b"0012"), ends=False).fields == [(b"content-length", b"12")]
    assert read(with_(b"content-length", b"000")).fields == [(b"content-length", b"0")]
    assert read(GET, ends=False).body_length == CHUNKED


def test_cookie_crumbs_are_joined() -> None:
    assert read([*GET, (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")]).fields == [
        (b"x", b"y"),
        (b"cookie", b"a=1; b=2"),
    ]


def test_options_may_ask_for_the_whole_server() -> None:
    assert read([(b":method", b"OPTIONS"), SCHEME, AUTHORITY, (b":path", b"*")]).target == b"*"


def test_a_connect_request_is_read_for_the_exchange_to_refuse() -> None:
    head = read([(b":method", b"CONNECT"), (b":authority", b"db.example:5432")], ends=False)
    assert (head.method, head.target, head.authority) == (b"CONNECT", b"db.example:5432", b"db.example:5432")


def test_an_equal_host_beside_the_authority_is_harmless() -> None:
    assert read([*GET, (b"host", b"APP.example")]).authority == b"app.example"


def test_another_path_with_the_same_fields_keeps_the_fields() -> None:
    reader = RequestReader(LIMITS)
    first = reader.read(listed([*GET, (b"accept", b"a"), (b"te", b"trailers")]), ends=True)
    other = reader.read(
        listed([*GET[:3], (b":path", b"/z"), (b"accept", b"a"), (b"te", b"trailers")]), ends=True
    )
    third = reader.read(listed([*GET, (b"accept", b"b")]), ends=True)
    assert (first.target, other.target) == (b"/a?b=c", b"/z")
    assert other.fields == first.fields == [(b"accept", b"a")]
    assert other.wants_trailers
    assert third.fields == [(b"accept", b"b")]
    assert not third.wants_trailers


def test_a_good_request_before_it_does_not_excuse_a_bad_one() -> None:
    reader = RequestReader(LIMITS)
    reader.read(listed([*GET, (b"host", b"app.example")]), ends=True)
    with pytest.raises(BadRequest):
        reader.read(
            listed([METHOD, SCHEME, (b":authority", b"other"), PATH, (b"host", b"app.example")]), ends=True
        )
    with pytest.raises(BadRequest):
        reader.read(listed([*GET, (b"host", b"app.example\r\nx: y")]), ends=True)


MALFORMED: dict[str, Pairs] = {
    "nothing at all": [],
    "no method": [SCHEME, AUTHORITY, PATH],
    "no scheme": [METHOD, AUTHORITY, PATH],
    "no path": [METHOD, SCHEME, AUTHORITY],
    "no authority and no host": [METHOD, SCHEME, PATH],
    "two methods": [METHOD, *GET],
    "two paths": [*GET, PATH],
    "two authorities": [AUTHORITY, *GET],
    "two schemes": [SCHEME, *GET],
    "unknown pseudo-header": [*GET, (b":protocol", b"websocket")],
    "unknown pseudo-header first": [(b":x", b"y"), *GET],
    "response pseudo-header": [*GET, (b":status", b"200")],
    "pseudo-header behind a field": [METHOD, SCHEME, AUTHORITY, (b"x", b"y"), PATH],
    "empty name": with_(b"", b"x"),
    "upper-case name": with_(b"X-Upper", b"x"),
    "space in a name": with_(b"x y", b"x"),
    "colon in a name": with_(b"x:y", b"x"),
    "CR in a name": with_(b"x\ry", b"x"),
    "LF in a name": with_(b"x\ny", b"x"),
    "NUL in a name": with_(b"x\0", b"x"),
    "DEL in a name": with_(b"x\x7f", b"x"),
    "non-ASCII name": with_(b"x\xe9", b"x"),
    "CRLF in a value": with_(b"x", b"a\r\ntransfer-encoding: chunked"),
    "LF in a value": with_(b"x", b"a\nb"),
    "CR in a value": with_(b"x", b"a\rb"),
    "NUL in a value": with_(b"x", b"a\0b"),
    "escape in a value": with_(b"x", b"a\x1bb"),
    "space before a value": with_(b"x", b" a"),
    "space behind a value": with_(b"x", b"a "),
    "tab before a value": with_(b"x", b"\ta"),
    "tab behind a value": with_(b"x", b"a\t"),
    "a value of white space": with_(b"x", b" "),
    "connection": with_(b"connection", b"close"),
    "keep-alive": with_(b"keep-alive", b"5"),
    "proxy-connection": with_(b"proxy-connection", b"close"),
    "transfer-encoding": with_(b"transfer-encoding", b"chunked"),
    "upgrade": with_(b"upgrade", b"websocket"),
    "te gzip": with_(b"te", b"gzip"),
    "te trailers and more": with_(b"te", b"trailers, gzip"),
    "empty method": with_(b":method", b""),
    "space in the method": with_(b":method", b"GET /evil HTTP/1.1"),
    "CRLF in the method": with_(b":method", b"GET / HTTP/1.1\r\nhost: evil\r\n\r\nGET"),
    "colon in the method": with_(b":method", b"G:T"),
    "long method": with_(b":method", b"G" * 33),
    "scheme ftp": with_(b":scheme", b"ftp"),
    "scheme with more": with_(b":scheme", b"https://evil/"),
    "empty path": with_(b":path", b""),
    "relative path": with_(b":path", b"a"),
    "absolute path": with_(b":path", b"https://app.example/"),
    "asterisk with GET": with_(b":path", b"*"),
    "space in the path": with_(b":path", b"/ HTTP/1.1"),
    "CRLF in the path": with_(b":path", b"/ HTTP/1.1\r\nhost: evil\r\n\r\nGET /"),
    "LF behind the path": with_(b":path", b"/\n"),
    "tab in the path": with_(b":path", b"/\t"),
    "NUL in the path": with_(b":path", b"/\0"),
    "non-ASCII path": with_(b":path", b"/\xe9"),
    "fragment": with_(b":path", b"/#x"),
    "empty authority": with_(b":authority", b""),
    "userinfo": with_(b":authority", b"user@app.example"),
    "space in the authority": with_(b":authority", b"app.example evil"),
    "CRLF in the authority": with_(b":authority", b"app.example\r\nx: y"),
    "path in the authority": with_(b":authority", b"app.example/x"),
    "port that is none": with_(b":authority", b"app.example:x"),
    "two authorities in one": with_(b":authority", b"app.example,other"),
    "another host": with_(b"host", b"evil.example"),
    "two hosts": [*GET, (b"host", b"app.example"), (b"host", b"app.example")],
    "host with userinfo": [METHOD, SCHEME, PATH, (b"host", b"user@app.example")],
    "empty host": [METHOD, SCHEME, PATH, (b"host", b"")],
    "two lengths": [*GET, (b"content-length", b"0"), (b"content-length", b"0")],
    "length list": with_(b"content-length", b"0, 0"),
    "negative length": with_(b"content-length", b"-1"),
    "length with a sign": with_(b"content-length", b"+0"),
    "empty length": with_(b"content-length", b""),
    "length without a body": with_(b"content-length", b"5"),
    "CONNECT with a path": [(b":method", b"CONNECT"), AUTHORITY, PATH],
    "CONNECT with a scheme": [(b":method", b"CONNECT"), AUTHORITY, SCHEME],
    "CONNECT with a host only": [(b":method", b"CONNECT"), (b"host", b"app.example:1")],
}


@pytest.mark.parametrize("pairs", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_refused(pairs: Pairs) -> None:
    with pytest.raises(BadRequest):
        read(pairs)


@given(
    st.lists(st.tuples(st.sampled_from([n for n, _ in GET]) | st.binary(max_size=8), st.binary(max_size=12)))
)
def test_whatever_is_accepted_is_one_request_in_http1(extra: Pairs) -> None:
    for pairs in (extra, [*GET, *extra], [*GET[: len(extra) % 4], *extra]):
        try:
            head = read(pairs, ends=False)
        except WireError:
            continue
        line = b"%b %b HTTP/1.1\r\n" % (head.method, head.target)
        assert line.split() == [head.method, head.target, b"HTTP/1.1"]
        assert line.count(b"\n") == line.count(b"\r") == 1
        for name, value in [*head.fields, *head.forwarded, (b"host", head.authority)]:
            assert name
            assert not set(b"\r\n\0: ") & set(name)
            assert not set(b"\r\n\0") & set(value)
            assert value == value.strip(b" \t")


def test_too_long_a_target_too_many_fields_and_too_large_a_list_have_their_own_errors() -> None:
    with pytest.raises(TargetTooLong):
        read(with_(b":path", b"/" * 101))
    with pytest.raises(HeadTooLarge):
        read([*GET, *[(b"x", b"y")] * 9])
    with pytest.raises(HeadTooLarge):
        read(with_(b"x", b"y" * 1900))
    assert read([*with_(b":path", b"/" * 100), *[(b"x", b"y")] * 8]).target == b"/" * 100


def test_trailers_are_read_without_those_that_mean_too_much() -> None:
    received = listed([(b"grpc-status", b"0"), (b"authorization", b"x"), (b"x-request-id", b"1")])
    assert read_trailers(received, LIMITS) == [(b"grpc-status", b"0")]
    assert read_trailers([], LIMITS) == []


@pytest.mark.parametrize(
    "pair",
    [
        (b":path", b"/"),
        (b"X-Upper", b"1"),
        (b"x", b"a\r\nb"),
        (b"x", b" a"),
        (b"content-length", b"5"),
        (b"transfer-encoding", b"chunked"),
        (b"connection", b"close"),
        (b"host", b"evil"),
        (b"te", b"trailers"),
    ],
)
def test_malformed_trailers_are_refused(pair: tuple[bytes, bytes]) -> None:
    with pytest.raises(BadRequest):
        read_trailers(listed([(b"ok", b"1"), pair]), LIMITS)


@pytest.mark.parametrize("pairs", [[(b"x", b"y")] * 13, [(b"x", b"y" * 2000)]])
def test_too_many_trailers_are_refused(pairs: Pairs) -> None:
    with pytest.raises(HeadTooLarge):
        read_trailers(listed(pairs), LIMITS)
