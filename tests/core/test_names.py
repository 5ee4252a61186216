"""How a Host is read, and which names a service may have."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.names import normalise_host, normalise_service_name, wildcard_over

LABEL = "a" * 63


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        (b"app.example", "app.example"),
        ("app.example", "app.example"),
        (b"APP.Example", "app.example"),
        (b"app.example:8443", "app.example"),
        (b"app.example:", "app.example"),
        (b"app.example:0", "app.example"),
        (b"app.example:65535", "app.example"),
        (b"app.example.", "app.example"),
        (b"App.Example.:443", "app.example"),
        (b"localhost", "localhost"),
        (b"my_app-1.internal", "my_app-1.internal"),
        (b"192.0.2.7:80", "192.0.2.7"),
        (b"[::1]", "::1"),
        (b"[::1]:443", "::1"),
        (b"[::1]:", "::1"),
        (b"[2001:DB8:0:0:0:0:0:1]:443", "2001:db8::1"),
        (f"{LABEL}.{LABEL}.{LABEL}.{'a' * 61}.:65535", f"{LABEL}.{LABEL}.{LABEL}.{'a' * 61}"),
    ],
)
def test_a_valid_authority_is_reduced_to_its_name(authority: bytes | str, name: str) -> None:
    assert normalise_host(authority) == name


@pytest.mark.parametrize(
    "authority",
    [
        b"",
        b".",
        b":443",
        b"app example",
        b" app.example",
        b"app.example ",
        b"app.example\n",
        b"app..example",
        b".app.example",
        b"app.example..",
        b"user@app.example",
        b"app.example/path",
        b"app%2eexample",
        b"*.example.com",
        b"app.example:http",
        b"app.example:65536",
        b"app.example:000443",
        b"app.example:+443",
        b"app.example:443:443",
        b"::1",
        b"[::1",
        b"::1]",
        b"[::1]443",
        b"[::1]:x",
        b"[::1]]",
        b"[]",
        b"[fe80::1%eth0]",
        b"[192.0.2.7]",
        b"[app.example]",
        "b\u00fccher.example".encode(),
        "\u212aelvin.example",
        b"\xff.example",
        "app.example:\u0664\u0664\u0663",
        LABEL.encode() + b"a.example",
        (LABEL + ".").encode() * 4,
        b"a" * 10_000,
    ],
)
def test_what_is_no_host_has_no_name(authority: bytes | str) -> None:
    assert normalise_host(authority) is None


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_whatever_comes_in_a_name_is_clean_and_is_its_own_name(authority: bytes | str) -> None:
    name = normalise_host(authority)
    if name is not None:
        assert normalise_host(f"[{name}]" if ":" in name else name) == name
        assert name == name.lower()
        assert not set(name) & set(" /@[]%*\r\n\0")


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("App.Example", "app.example"),
        ("app.example.", "app.example"),
        ("*.Example.com", "*.example.com"),
        ("*.localhost", "*.localhost"),
        ("192.0.2.7", "192.0.2.7"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        (f"*.{LABEL}.{LABEL}.{LABEL}.{'a' * 59}", f"*.{LABEL}.{LABEL}.{LABEL}.{'a' * 59}"),
    ],
)
def test_a_service_may_be_called_by_a_host_an_address_or_a_wildcard(name: str, normalised: str) -> None:
    assert normalise_service_name(name) == normalised


@pytest.mark.parametrize(
    "name",
    [
        "",
        "*",
        "*.",
        "*.*.example.com",
        "a.*.example.com",
        "*a.example.com",
        "app.example:443",
        "[::1]:443",
        "[::1",
        "[::1]]",
        "fe80::1%eth0",
        "app example",
        "app\r\nexample",
        "b\u00fccher.example",
        f"*.{LABEL}.{LABEL}.{LABEL}.{'a' * 60}",
    ],
)
def test_no_service_can_be_called_so(name: str) -> None:
    assert normalise_service_name(name) is None


def test_a_wildcard_stands_for_one_label() -> None:
    assert wildcard_over("a.b.example") == "*.b.example"
    assert wildcard_over("localhost") == ""
    assert wildcard_over("") == ""
