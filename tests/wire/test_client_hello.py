"""The look at a ClientHello, against Python's own TLS client, record fragmentation, and garbage."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.wire.client_hello import MAX_HELLO, NOT_TLS, ClientHello, HelloReader


def hello(name: str | None, *protocols: str) -> bytes:
    """What OpenSSL's client sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def read_hello(data: bytes) -> ClientHello | None:
    return HelloReader().feed(data)


def record(payload: bytes, kind: int = 22) -> bytes:
    return bytes([kind, 3, 1]) + len(payload).to_bytes(2) + payload


def message(body: bytes, kind: int = 1) -> bytes:
    return bytes([kind]) + len(body).to_bytes(3) + body


def vector(content: bytes, width: int = 2) -> bytes:
    return len(content).to_bytes(width) + content


def made(*extensions: tuple[int, bytes]) -> bytes:
    """A hello with these extensions, in one record."""
    listed = b"".join(kind.to_bytes(2) + vector(content) for kind, content in extensions)
    body = b"\x03\x03" + bytes(32) + vector(b"", 1) + vector(b"\x13\x01") + vector(b"\x00", 1)
    return record(message(body + vector(listed)))


ACME = hello("app.example", "acme-tls/1")
SEEN = ClientHello("app.example", (b"acme-tls/1",))


def test_the_hello_of_a_validating_ca_is_read() -> None:
    assert read_hello(ACME) == SEEN


def test_a_browsers_hello_is_read() -> None:
    assert read_hello(hello("www.app.example", "h2", "http/1.1")) == ClientHello(
        "www.app.example", (b"h2", b"http/1.1")
    )


def test_a_hello_without_name_and_protocols_offers_nothing() -> None:
    assert read_hello(hello(None)) == ClientHello("", ())


def test_a_hello_that_comes_byte_by_byte_is_read_at_its_last_byte() -> None:
    reader = HelloReader()
    assert [reader.feed(bytes([byte])) for byte in ACME] == [None] * (len(ACME) - 1) + [SEEN]
    assert bytes(reader.data) == ACME


def test_every_shorter_beginning_is_incomplete() -> None:
    for end in range(len(ACME)):
        assert read_hello(ACME[:end]) is None, end


def test_what_follows_the_hello_does_not_matter() -> None:
    assert read_hello(ACME + record(b"\xff" * 100, 23) + b"more") == SEEN


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_a_hello_spread_over_records_is_put_together(lengths: list[int]) -> None:
    payload, records = ACME[5:], b""
    for length in lengths:
        if payload:
            records += record(payload[:length])
            payload = payload[length:]
    records += record(payload) if payload else b""
    assert read_hello(records) == SEEN
    assert all(read_hello(records[:end]) is None for end in range(0, len(records), 7))


def test_a_hello_of_one_byte_a_record_is_put_together() -> None:
    assert read_hello(b"".join(record(bytes([byte])) for byte in ACME[5:])) == SEEN


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x02",
        b"\x80\x2e\x01\x00\x02",  # SSL 2
        record(b""),
        record(b"x", 21),
        bytes([22, 3, 1]) + (0x4001).to_bytes(2),
        record(b"\x02\x00\x00\x00"),  # a ServerHello
        record(ACME[5:20]) + record(b"x", 23),
        record(message(bytes(20))),
        record(message(b"")),
        record(message(ACME[9:-1])),  # its last extension breaks off
    ],
    ids=range(11),  # ACME is another one in every process
)
def test_what_is_no_client_hello_is_told_at_once(data: bytes) -> None:
    assert read_hello(data) is NOT_TLS


def test_a_hello_that_announces_too_much_is_given_up_at_once() -> None:
    assert read_hello(record(b"\x01" + (MAX_HELLO - 3).to_bytes(3))) is NOT_TLS
    assert read_hello(record(b"\x01" + (MAX_HELLO - 4).to_bytes(3))) is None


def test_a_hello_that_never_ends_is_given_up_at_the_limit() -> None:
    drip = record(b"\x01") + record(b"\x00") + record(b"\x20\x00")
    drip += record(b"\x00") * (MAX_HELLO // 6)
    assert read_hello(drip[:MAX_HELLO]) is None
    assert read_hello(drip[: MAX_HELLO + 1]) is NOT_TLS
    reader = HelloReader()
    assert [reader.feed(drip[at : at + 1]) for at in range(MAX_HELLO)] == [None] * MAX_HELLO
    assert reader.feed(b"\x16") is NOT_TLS


def test_a_name_of_another_kind_is_no_name() -> None:
    assert read_hello(made((0, vector(b"\x01" + vector(b"app.example"))))) == ClientHello()


@pytest.mark.parametrize("content", [b"", b"\x00", vector(b"\x00\x00\x09app"), b"\x00\x09\x00\x00\x09app"])
def test_a_name_that_breaks_off_is_no_name(content: bytes) -> None:
    assert read_hello(made((0, content))) == ClientHello()


def test_a_name_that_is_not_ascii_is_some_other_name() -> None:
    found = read_hello(made((0, vector(b"\x00" + vector("bücher.example".encode())))))
    assert found is not None
    assert not found.server_name.isascii()


@pytest.mark.parametrize("content", [b"", vector(b"\x0aacme-tls/"), vector(b"\x0aacme-tls/1\x02h")])
def test_a_protocol_list_that_breaks_off_offers_nothing(content: bytes) -> None:
    assert read_hello(made((16, content))) == ClientHello()


def test_unknown_extensions_are_passed_over() -> None:
    alpn = (16, vector(vector(b"acme-tls/1", 1)))
    assert read_hello(made((0xFF01, b"\x00"), alpn, (43, b"xyz"))) == ClientHello("", (b"acme-tls/1",))


@given(st.binary(max_size=400))
def test_garbage_is_never_an_exception(data: bytes) -> None:
    read_hello(data)


@given(st.binary(max_size=300))
def test_a_hello_with_garbage_in_it_is_never_an_exception(body: bytes) -> None:
    assert read_hello(record(message(body))) is not None


@given(st.integers(0, len(ACME) - 1), st.integers(0, 255))
def test_a_hello_with_one_byte_changed_is_never_an_exception(at: int, byte: int) -> None:
    changed = bytearray(ACME)
    changed[at] = byte
    read_hello(bytes(changed))
