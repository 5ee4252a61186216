"""HPACK: round trips against the `hpack` package, and blocks that the Rust decoder must never see."""

from __future__ import annotations

from contextlib import suppress

import hpack
import pytest
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.huffman_table import decode_huffman
from hypothesis import given
from hypothesis import strategies as st

from portero_py.wire.http2.frames import ConnectionFault, ErrorCode
from portero_py.wire.http2.hpack import (
    HeaderDecoder,
    HeaderEncoder,
    HeaderList,
    changes_table,
    field_list,
    response_list,
)
from portero_py.wire.message import Fields

NAMES = st.sampled_from([b"accept", b"cookie", b"x-a", b"x-b", b"etag", b"set-cookie"]) | st.binary(
    min_size=1, max_size=40
)
LISTS = st.lists(st.tuples(NAMES, st.binary(max_size=300), st.booleans()), max_size=12)


@given(st.lists(LISTS, max_size=6))
def test_what_is_encoded_is_decoded_by_another_implementation(lists: list[HeaderList]) -> None:
    encoder = HeaderEncoder()
    decoder = hpack.Decoder()
    decoder.max_header_list_size = 1 << 20
    for fields in lists:
        decoded = decoder.decode(encoder.encode(fields), raw=True)
        assert [(name, value) for name, value in decoded] == [(name, value) for name, value, _ in fields]


@given(st.lists(LISTS, max_size=6))
def test_what_another_implementation_encodes_is_decoded(lists: list[HeaderList]) -> None:
    encoder = hpack.Encoder()
    decoder = HeaderDecoder(1 << 18)
    for fields in lists:
        decoded, _ = decoder.decode(encoder.encode([(n, v, s) for n, v, s in fields]))
        assert [(name, value) for name, value, _ in decoded] == [(name, value) for name, value, _ in fields]


@given(st.lists(st.sampled_from([0, 100, 300, 4096, 9999]), min_size=1, max_size=20))
def test_a_table_that_shrinks_and_grows_is_announced_by_two_updates_at_most(sizes: list[int]) -> None:
    encoder = HeaderEncoder()
    decoder = hpack.Decoder()
    fields = [(b"x-one", b"1" * 60, False), (b"x-two", b"2" * 60, False)]
    decoder.decode(encoder.encode(fields))
    for size in sizes:
        encoder.set_table_size(size)
    decoder.max_allowed_table_size = sizes[-1]
    block = encoder.encode(fields)
    updates = 0
    rest = block
    while rest[0] & 0xE0 == 0x20:
        updates += 1
        rest = rest[1:] if rest[0] != 0x3F else rest[2 + (rest[1] >= 0x80) :]
    assert updates <= 2
    for _ in range(2):
        assert [(bytes(n), bytes(v)) for n, v in decoder.decode(block, raw=True)] == [
            (n, v) for n, v, _ in fields
        ]
        block = encoder.encode(fields)


@given(st.binary(max_size=60))
def test_no_block_makes_the_decoder_raise_anything_but_a_connection_error(block: bytes) -> None:
    decoder = HeaderDecoder(4096)
    with suppress(ConnectionFault):
        decoder.decode(block)


@given(LISTS.filter(bool), st.data())
def test_a_block_cut_short_is_an_error_or_a_shorter_list(fields: HeaderList, data: st.DataObject) -> None:
    block = HeaderEncoder().encode(fields)
    cut = data.draw(st.integers(0, len(block) - 1))
    with suppress(ConnectionFault):
        decoded, _ = HeaderDecoder(1 << 18).decode(block[:cut])
        assert len(decoded) < len(fields)


@pytest.mark.parametrize(
    "block",
    [
        b"\x40",  # no name
        b"\x40\x01a",  # no value
        b"\x40\x01a\x05ab",  # half a value
        b"\x41\x7f\x80",  # half a length
        b"\x41\x7f\xff\xff\xff\xff\xff\xff\x01",  # a length beyond measure
        b"\xff",  # half an index
        b"\x0f",  # half an index
        b"\x3f\x80",  # half a table size
        b"\x82\x20",  # a table size behind a field
        b"\x80",  # index 0
        b"\xbe",  # beyond the table
        b"\x3f\xe2\x1f",  # a table larger than allowed
        b"\x00\x01a\x81\xff",  # padding longer than 7 bits
    ],
)
def test_a_block_that_is_no_hpack_is_a_compression_error(block: bytes) -> None:
    with pytest.raises(ConnectionFault) as caught:
        HeaderDecoder(4096).decode(block)
    assert caught.value.code == ErrorCode.COMPRESSION_ERROR


def huffman(text: bytes) -> tuple[bytes, int]:
    """Code `text` by the table of the `hpack` package; also say how many bits of padding that takes."""
    bits = "".join([f"{REQUEST_CODES[byte]:0{REQUEST_CODES_LENGTH[byte]}b}" for byte in text])
    padding = -len(bits) % 8
    return int("0" + bits + "1" * padding, 2).to_bytes((len(bits) + padding) // 8, "big"), padding


def literal(name: bytes, value: bytes) -> bytes:
    """A field that never enters a table, of two Huffman-coded strings."""
    return b"\x10" + b"".join(
        (bytes([0x80 | len(text)]) if len(text) < 127 else b"\xff" + varint(len(text) - 127)) + text
        for text in (name, value)
    )


def varint(number: int) -> bytes:
    """RFC 7541, 5.1, behind a full prefix."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


@given(st.lists(st.tuples(st.binary(min_size=1), st.binary()), min_size=1), st.data())
def test_padding_is_ones_and_nothing_else(pairs: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    strings = [huffman(text) for pair in pairs for text in pair]

    def decode(strings: list[tuple[bytes, int]]) -> tuple[HeaderList, bool]:
        coded = [text for text, _ in strings]
        plain = b"\x82\x10\x01x\x01y"
        block = plain + b"".join([literal(*two) for two in zip(coded[::2], coded[1::2], strict=True)])
        return HeaderDecoder(1 << 18).decode(block)

    decoded, changed = decode(strings)
    assert [(name, value) for name, value, _ in decoded[2:]] == pairs
    assert not changed
    index = data.draw(st.integers(0, len(strings) - 1))
    coded, padding = strings[index]
    for bits in range(1 << padding):
        changed_end = coded[:-1] + bytes([coded[-1] >> padding << padding | bits]) if padding else coded
        strings[index] = (changed_end, padding)
        try:
            text = decode_huffman(changed_end)  # bits that are a code are no padding
        except hpack.HPACKDecodingError:
            with pytest.raises(ConnectionFault) as caught:
                decode(strings)
            assert caught.value.code == ErrorCode.COMPRESSION_ERROR
        else:
            assert decode(strings)[0][2 + index // 2][index % 2] == text


@pytest.mark.parametrize("text", [b"x" * 4000, b"\x01" * 2000], ids=["short codes", "long codes"])
def test_the_padding_of_long_strings_is_looked_at_too(text: bytes) -> None:
    for extra in range(8):  # every length of padding
        coded, padding = huffman(text + b"0" * extra)
        HeaderDecoder(1 << 18).decode(literal(b"\x1f", coded))
        if padding:
            with pytest.raises(ConnectionFault):
                HeaderDecoder(1 << 18).decode(literal(b"\x1f", coded[:-1] + bytes([coded[-1] ^ 1])))


@pytest.mark.parametrize(
    ("block", "changes"),
    [
        (b"", False),
        (b"\x82\x87", False),
        (b"\xff\x00", False),
        (b"\x82\x04\x01/", False),
        (b"\x14\x01/\x82", False),
        (b"\x0f\x10\x01/", False),
        (b"\x00\x01a\x01b", False),
        (b"\x00\x01a\x7f\x01" + bytes(128), False),
        (b"\x44\x01/", True),
        (b"\x40\x01a\x01b", True),
        (b"\x7f\x02\x01b", True),
        (b"\x20\x82", True),
        (b"\x3f\xe1\x1f\x82", True),
    ],
)
def test_it_is_known_beforehand_whether_a_block_changes_the_table(block: bytes, changes: bool) -> None:
    assert changes_table(block) is changes


def test_a_header_bomb_ends_the_connection_before_it_is_unpacked() -> None:
    decoder = HeaderDecoder(32768)
    decoder.decode(b"\x40\x01a\x7f\x81\x1d" + b"x" * 3840)
    with pytest.raises(ConnectionFault) as caught:
        decoder.decode(b"\xbe" * 16384)
    assert caught.value.code == ErrorCode.ENHANCE_YOUR_CALM


RESPONSE: Fields = [(b"Content-Type", b"text/plain"), (b"Content-Length", b"5"), (b"Server", b"b")]


def decoded(decoder: hpack.Decoder, block: bytes) -> Fields:
    return [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]


def test_the_same_response_many_times_is_the_same_to_the_client() -> None:
    encoder = HeaderEncoder()
    decoder = hpack.Decoder()
    blocks = [encoder.encode_response(200, RESPONSE) for _ in range(5)]
    for block in blocks:
        assert decoded(decoder, block)[1:] == [(n.lower(), v) for n, v in RESPONSE]
    assert blocks[3] is blocks[2]


def test_a_remembered_response_is_forgotten_when_anything_differs() -> None:
    encoder = HeaderEncoder()
    decoder = hpack.Decoder()
    steps: list[tuple[int, Fields]] = [
        *[(200, RESPONSE)] * 4,
        (404, RESPONSE),
        *[(200, RESPONSE)] * 4,
        (200, RESPONSE[:2]),
        (200, RESPONSE),
    ]
    for status, fields in steps:
        got = decoded(decoder, encoder.encode_response(status, fields))
        assert got == [(b":status", b"%d" % status), *[(n.lower(), v) for n, v in fields]]
    decoded(decoder, encoder.encode([(b"x-trailer", b"v", False)]))
    assert decoded(decoder, encoder.encode_response(200, RESPONSE))[0] == (b":status", b"200")
    encoder.encode_response(200, RESPONSE)
    encoder.set_table_size(0)
    decoder.max_allowed_table_size = 0
    assert encoder.encode_response(200, RESPONSE)[0] == 0x20


def test_a_response_that_always_changes_the_table_is_not_remembered() -> None:
    encoder = HeaderEncoder()
    decoder = hpack.Decoder()
    large: Fields = [(b"x-large", b"x" * 5000)]
    for _ in range(5):
        assert decoded(decoder, encoder.encode_response(200, large))[1:] == large


def test_connection_specific_fields_never_reach_a_client_and_names_are_lowered() -> None:
    fields: Fields = [
        (b"Connection", b"close"),
        (b"Keep-Alive", b"5"),
        (b"Proxy-Connection", b"x"),
        (b"Transfer-Encoding", b"chunked"),
        (b"UPGRADE", b"h2c"),
        (b"X-Kept", b"1"),
    ]
    assert response_list(204, fields) == [(b":status", b"204", False), (b"x-kept", b"1", False)]


def test_secrets_and_values_that_do_not_repeat_stay_out_of_the_table() -> None:
    assert field_list([(b"Set-Cookie", b"s"), (b"ETag", b"1"), (b"Vary", b"a")]) == [
        (b"set-cookie", b"s", True),
        (b"etag", b"1", True),
        (b"vary", b"a", False),
    ]
