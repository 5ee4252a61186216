"""What a field name means to us, and the fields that are ours."""

from __future__ import annotations

import pytest

from portero_py.wire.headers import (
    CODING,
    CONNECTION,
    FORWARDED,
    HOP,
    HOST,
    LENGTH,
    REQUEST_KINDS,
    RESPONSE_KINDS,
    SPOOF,
    Forwarded,
    Forwarding,
    connection_options,
    is_authority,
    without_nominated,
)
from portero_py.wire.message import Fields


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b"host", HOST),
        (b"content-length", LENGTH),
        (b"transfer-encoding", CODING),
        (b"connection", CONNECTION),
        (b"keep-alive", HOP),
        (b"proxy-connection", HOP),
        (b"proxy-authorization", HOP),
        (b"http2-settings", HOP),
        (b"trailer", HOP),
        (b"x-forwarded-for", FORWARDED),
        (b"x-real-ip", FORWARDED),
        (b"forwarded", FORWARDED),
        (b"x-request-id", FORWARDED),
        (b"x_forwarded_for", SPOOF),
        (b"x-forwarded_for", SPOOF),
        (b"x_forwarded-for", SPOOF),
        (b"content_length", SPOOF),
        (b"transfer_encoding", SPOOF),
        (b"x-my-header", None),
        (b"cookie", None),
    ],
)
def test_what_a_name_means_in_a_request(name: bytes, kind: int | None) -> None:
    assert REQUEST_KINDS.get(name) == kind


def test_an_underscore_alone_makes_no_name_suspicious() -> None:
    assert b"forwarded" in REQUEST_KINDS
    assert b"my_header" not in REQUEST_KINDS
    assert all(b"_" in name for name, kind in REQUEST_KINDS.items() if kind == SPOOF)


def test_what_a_backend_says_about_forwarding_is_its_own_business() -> None:
    assert b"x-request-id" not in RESPONSE_KINDS
    assert RESPONSE_KINDS[b"keep-alive"] == HOP


@pytest.mark.parametrize(
    "value",
    [
        b"a",
        b"App.Example",
        b"app.example:8443",
        b"app_1.example.",
        b"192.0.2.1:80",
        b"[::1]",
        b"[2001:db8::192.0.2.1]:443",
    ],
)
def test_a_host_with_or_without_a_port_is_an_authority(value: bytes) -> None:
    assert is_authority(value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b":80",
        b"a:",
        b"a:x",
        b"a:123456",
        b"a:80:80",
        b"a b",
        b" a",
        b"a ",
        b"a,b",
        b"u@a",
        b"a/",
        b"a/b",
        b"a?b",
        b"a#b",
        b"a\\b",
        b"a%2eb",
        b"a\x00",
        b"a\r\nX: y",
        b"\xc3\xa4.example",
        b"::1",
        b"[::1",
        b"::1]",
        b"[::1]x",
        b"[::g]",
        b"[]",
        b"[fe80::1%25eth0]",
        b"a" * 256,
    ],
)
def test_nothing_else_is_an_authority(value: bytes) -> None:
    assert not is_authority(value)


def test_connection_options_are_a_set_of_lower_case_words() -> None:
    assert connection_options([b"Close, X-Foo ,,\tTE", b"keep-alive"]) == {
        b"close",
        b"x-foo",
        b"te",
        b"keep-alive",
    }
    assert connection_options([b"", b" , "]) == set()


def test_fields_that_connection_names_are_taken_out_but_not_those_that_matter() -> None:
    fields: Fields = [(b"X-Foo", b"1"), (b"Content-Length", b"3"), (b"Cookie", b"c"), (b"X-Bar", b"2")]
    kept = without_nominated(fields, {b"x-foo", b"content-length", b"cookie", b"authorization", b"host"})
    assert kept == [(b"Content-Length", b"3"), (b"Cookie", b"c"), (b"X-Bar", b"2")]


def test_our_own_fields_say_who_asked_how_and_for_what() -> None:
    made = Forwarding(b"192.0.2.7", b"https", trusted=False).fields(b"app.example", ())
    assert made.fields == [
        (b"X-Forwarded-For", b"192.0.2.7"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", b"app.example"),
    ]
    assert made.lines == (
        b"X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: app.example\r\n"
    )


def test_the_fields_follow_the_authority_of_each_request() -> None:
    forwarding = Forwarding(b"192.0.2.7", b"http", trusted=False)
    first = forwarding.fields(b"a.example", ())
    assert forwarding.fields(b"a.example", ()) is first
    assert forwarding.fields(b"b.example", ()).fields[2] == (b"X-Forwarded-Host", b"b.example")
    assert forwarding.fields(b"a.example", ()).fields == first.fields


def test_what_a_stranger_sent_is_not_passed_on() -> None:
    forwarding = Forwarding(b"192.0.2.7", b"http", trusted=False)
    sent = [(b"X-Forwarded-For", b"10.0.0.1"), (b"Forwarded", b"for=x"), (b"X-Request-ID", b"theirs")]
    assert forwarding.fields(b"a", sent).fields == forwarding.fields(b"a", ()).fields
    assert forwarding.request_id(sent) == b""


def test_what_a_trusted_proxy_sent_is_kept_and_its_address_appended() -> None:
    forwarding = Forwarding(b"192.0.2.7", b"http", trusted=True)
    made = forwarding.fields(
        b"a.example",
        [
            (b"x-forwarded-for", b"198.51.100.1"),
            (b"X-Forwarded-Proto", b"https"),
            (b"X-Forwarded-Host", b"public.example"),
            (b"X-FORWARDED-FOR", b"198.51.100.2"),
            (b"X-Request-ID", b"theirs"),
            (b"X-Real-IP", b"198.51.100.1"),
        ],
    )
    assert made.fields == [
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", b"public.example"),
        (b"X-Real-IP", b"198.51.100.1"),
        (b"X-Forwarded-For", b"198.51.100.1, 198.51.100.2, 192.0.2.7"),
    ]


def test_what_a_trusted_proxy_left_out_is_added() -> None:
    forwarding = Forwarding(b"192.0.2.7", b"https", trusted=True)
    assert forwarding.fields(b"a.example", [(b"X-Real-IP", b"198.51.100.1")]).fields == [
        (b"X-Real-IP", b"198.51.100.1"),
        (b"X-Forwarded-For", b"192.0.2.7"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", b"a.example"),
    ]
    assert forwarding.fields(b"a.example", ()).fields[0] == (b"X-Forwarded-For", b"192.0.2.7")


@pytest.mark.parametrize(("value", "kept"), [(b"", False), (b"x" * 128, True), (b"x" * 129, False)])
def test_a_trusted_proxys_request_id_is_kept_when_its_length_is_sane(value: bytes, kept: bool) -> None:
    forwarding = Forwarding(b"192.0.2.7", b"http", trusted=True)
    sent = [(b"X-Real-IP", b"1"), (b"X-Request-ID", value)]
    assert forwarding.request_id(sent) == (value if kept else b"")
    assert forwarding.request_id([]) == b""


def test_the_lines_are_the_fields() -> None:
    assert Forwarded([(b"A", b"b"), (b"C", b"")]).lines == b"A: b\r\nC: \r\n"
    assert Forwarded([]).lines == b""


def test_how_the_client_came_is_what_the_backend_is_told() -> None:
    sent = [(b"X-Request-ID", b"1"), (b"X-Forwarded-Proto", b"HTTPS, http")]
    assert Forwarding(b"192.0.2.7", b"http", trusted=False).scheme(sent) == b"http"
    trusted = Forwarding(b"192.0.2.7", b"http", trusted=True)
    assert (trusted.scheme(sent), trusted.scheme(sent[:1]), trusted.scheme(())) == (
        b"https",
        b"http",
        b"http",
    )
