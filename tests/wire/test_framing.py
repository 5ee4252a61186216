"""Where a body ends, and everything that tries to make two readers disagree about it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.errors import BadRequest, BadResponse, WireError
from portero_py.wire import framing
from portero_py.wire.framing import (
    CHUNK_LINE_LIMIT,
    CHUNKS_AT_ONCE,
    EXTENSION_ALLOWANCE,
    TRAILER_LIMIT,
    ChunkedDecoder,
    LengthDecoder,
    body_decoder,
    chunk,
    last_chunk,
    may_trail,
    request_body_length,
    response_body_length,
    response_content_length,
)
from portero_py.wire.message import CHUNKED, UNTIL_CLOSE, Fields

NOT_A_LENGTH = [
    b"",
    b" 1",
    b"1 ",
    b"+1",
    b"-1",
    b"0x1",
    b"1_0",
    b"1 1",
    b"1,",
    b",1",
    b"1, 2",
    b"1, 01",
    b"1, x",
    b"1;1",
    b"1.0",
    b"1\x00",
    b"\xb2",
    b"9" * 19,
]
NOT_CHUNKED = [
    b"",
    b"identity",
    b"gzip, chunked",
    b"chunked, gzip",
    b"chunked;x=y",
    b"chunked ",
    b"xchunked",
    b"chunked\x0b",
]


def decode(pieces: list[bytes]) -> tuple[bytes, bytes | None, Fields]:
    """Decode a body that comes in pieces; what comes behind its end is the rest."""
    decoder = ChunkedDecoder(BadRequest)
    body, rest = b"", None
    for piece in pieces:
        if rest is not None:
            rest += piece
            continue
        part, rest = decoder.decode(piece)
        body += part
    return body, rest, decoder.trailers


def outcome(pieces: list[bytes]) -> tuple[bytes, bytes | None, Fields] | str:
    try:
        return decode(pieces)
    except BadRequest:
        return "refused"


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, *(place % (len(data) + 1) for place in cuts), len(data)})
    return [data[begin:end] for begin, end in pairwise(places)]


# The length of a request


@pytest.mark.parametrize(
    ("lengths", "codings", "length"),
    [
        ([], [], 0),
        ([b"0"], [], 0),
        ([b"007"], [], 7),
        ([b"9" * 18], [], 10**18 - 1),
        ([], [b"chunked"], CHUNKED),
        ([], [b"ChUnKeD"], CHUNKED),
    ],
)
def test_a_request_says_its_length_in_one_way(
    lengths: list[bytes], codings: list[bytes], length: int
) -> None:
    assert request_body_length(b"1.1", lengths, codings) == length


@pytest.mark.parametrize("value", NOT_A_LENGTH)
def test_what_is_not_one_plain_number_is_no_length(value: bytes) -> None:
    with pytest.raises(BadRequest):
        request_body_length(b"1.1", [value], [])
    with pytest.raises(BadResponse):
        response_content_length([value])


@pytest.mark.parametrize("value", NOT_CHUNKED)
def test_what_is_not_exactly_chunked_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequest):
        request_body_length(b"1.1", [], [value])
    with pytest.raises(BadResponse):
        response_body_length(b"GET", 200, b"1.1", UNTIL_CLOSE, [value])


@pytest.mark.parametrize(
    ("version", "lengths", "codings"),
    [
        (b"1.1", [b"1"], [b"chunked"]),
        (b"1.1", [], [b"chunked", b"chunked"]),
        (b"1.1", [], [b"identity", b"chunked"]),
        (b"1.0", [], [b"chunked"]),
    ],
)
def test_a_message_with_two_lengths_is_refused(
    version: bytes, lengths: list[bytes], codings: list[bytes]
) -> None:
    with pytest.raises(BadRequest):
        request_body_length(version, lengths, codings)
    with pytest.raises(BadResponse):
        response_body_length(b"GET", 200, version, 1 if lengths else UNTIL_CLOSE, codings)


@pytest.mark.parametrize("values", [[b"1", b"1"], [b"1, 1"], [b"1,1"], [b"1 ,\t1", b"1"]])
def test_a_response_may_say_the_same_length_twice_and_a_request_may_not(values: list[bytes]) -> None:
    assert response_content_length(values) == 1
    with pytest.raises(BadRequest):
        request_body_length(b"1.1", values, [])


@pytest.mark.parametrize("values", [[b"1", b"2"], [b"1, 1", b"2"], [b"", b""], [b"1", b""], [b"1", b"01"]])
def test_a_response_that_says_two_lengths_is_refused(values: list[bytes]) -> None:
    with pytest.raises(BadResponse):
        response_content_length(values)


@given(
    st.sampled_from([b"1.0", b"1.1"]),
    st.lists(st.one_of(st.sampled_from([b"0", b"5", *NOT_A_LENGTH]), st.binary(max_size=4)), max_size=3),
    st.lists(st.one_of(st.sampled_from([b"chunked", *NOT_CHUNKED]), st.binary(max_size=8)), max_size=3),
)
def test_whatever_is_said_a_request_has_one_length_or_none(
    version: bytes, lengths: list[bytes], codings: list[bytes]
) -> None:
    plain = len(lengths) == 1 and lengths[0].isdigit() and len(lengths[0]) < 19
    try:
        length = request_body_length(version, lengths, codings)
    except BadRequest:
        assert lengths or codings
        assert codings or not plain
    else:
        if codings:
            assert (version, lengths, [coding.lower() for coding in codings]) == (b"1.1", [], [b"chunked"])
            assert length == CHUNKED
        else:
            assert length == (int(lengths[0]) if lengths else 0)
            assert plain or not lengths


# The length of a response


@pytest.mark.parametrize(
    ("method", "status", "said", "codings", "length"),
    [
        (b"GET", 200, UNTIL_CLOSE, [], UNTIL_CLOSE),
        (b"GET", 200, 5, [], 5),
        (b"GET", 999, 5, [], 5),
        (b"GET", 200, UNTIL_CLOSE, [b"chunked"], CHUNKED),
        (b"HEAD", 200, 5, [], 0),
        (b"HEAD", 200, UNTIL_CLOSE, [b"chunked"], 0),
        (b"HEAD", 200, UNTIL_CLOSE, [], 0),
        (b"GET", 204, 5, [], 0),
        (b"GET", 304, 5, [], 0),
        (b"GET", 100, UNTIL_CLOSE, [], 0),
        (b"GET", 199, 5, [], 0),
        (b"GET", 205, 0, [], 0),
    ],
)
def test_a_response_says_its_length_in_one_way(
    method: bytes, status: int, said: int, codings: list[bytes], length: int
) -> None:
    assert response_body_length(method, status, b"1.1", said, codings) == length


# Chunks


@pytest.mark.parametrize(
    ("data", "body", "rest"),
    [
        (b"0\r\n\r\n", b"", b""),
        (b"3\r\nabc\r\n0\r\n\r\nGET", b"abc", b"GET"),
        (b"00003;a=b;c\r\nabc\r\n000\r\n\r\n", b"abc", b""),
        (b'3;a="b;\\"\\\\";c\r\nabc\r\n0;z\r\n\r\n', b"abc", b""),
        (b"3 ; a\t=\tb ;c\r\nabc\r\n0\r\n\r\n", b"abc", b""),
        (b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2, b""),
        (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n", b""),
    ],
)
def test_chunks_are_taken_out_of_their_frames_however_they_are_cut(
    data: bytes, body: bytes, rest: bytes
) -> None:
    for begin in range(len(data) + 1):
        for end in range(begin, len(data) + 1):
            assert decode([data[:begin], data[begin:end], data[end:]]) == (body, rest, [])


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"g\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b" 1\r\n",
        b"1 \r\n",
        b"0x1\r\n",
        b"1;\r\n",
        b"1;;\r\n",
        b"1;a;\r\n",
        b"1;a;;b\r\n",
        b";abc:=1\r\n",
        b"1;abc:=1\r\n",
        b"1; =x\r\n",
        b"1;a=\r\n",
        b"1;a==b\r\n",
        b"1;a b\r\n",
        b"1;a \r\n",
        b'1;a="b\r\n',
        b'1;a="b\\"\r\n',
        b'1;a="b"c\r\n',
        b'1;a="\x01"\r\n',
        b"1;a=\x7f\r\n",
        b"1;a=\xff\r\n",
        b"1,1\r\n",
        b"\xb2\r\n",
        b"1_0\r\n",
        b"1" * 16 + b"\r\n",
        b"3\nabc\r\n",
        b"3\rabc\r\n",
        b"3;a\nb\r\nabc",
        b"3;a\rb\r\nabc",
        b"3;\x00\r\nabc",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n\r\n",
        b"3\r\nabc\rx",
        b"3\r\nabc\n",
        b"0\r\nX\r\n\r\n",
        b"0\r\n: y\r\n\r\n",
        b"0\r\nX : y\r\n\r\n",
        b"0\r\nX: a\r\n b\r\n\r\n",
        b"0\r\nX: a\nb\r\n\r\n",
        b"0\r\nX: \x00\r\n\r\n",
        b"0\r\n\nGET",
        b"0\r\n\rGET",
    ],
)
def test_what_is_not_in_the_grammar_is_refused_however_it_is_cut(data: bytes) -> None:
    for end in range(len(data)):
        with pytest.raises(BadRequest):
            decode([data[:end], data[end:]])


@pytest.mark.parametrize(
    "line",
    [
        b"0\r\nX:" + b" " * 4_000_000 + b"\x01\r\n",
        b"3;a=" + b"\t" * 4_000_000 + b"\x01\r\n",
        b"3" + b";a" * 2_000_000 + b"\x01\r\n",
        b'3;a="' + b"\\a" * 2_000_000 + b"\r\n",
    ],
)
def test_a_line_is_refused_in_linear_time(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    """Without limits, and so long that in quadratic time this test would not end today."""
    monkeypatch.setattr(framing, "CHUNK_LINE_LIMIT", len(line))
    monkeypatch.setattr(framing, "TRAILER_LIMIT", len(line))
    with pytest.raises(BadRequest, match="malformed"):
        decode([line])


def test_the_error_is_the_one_that_was_asked_for() -> None:
    with pytest.raises(BadResponse):
        ChunkedDecoder(BadResponse).decode(b"x\r\n")


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.binary(max_size=9), st.lists(st.integers(0))
)
def test_what_was_encoded_is_decoded_whatever_the_pieces(
    bodies: list[bytes], rest: bytes, cuts: list[int]
) -> None:
    data = b"".join(map(chunk, bodies)) + last_chunk([(b"X-Sum", b"1"), (b"Y", b"")]) + rest
    assert decode(cut(data, cuts)) == (b"".join(bodies), rest, [(b"X-Sum", b"1"), (b"Y", b"")])


@pytest.mark.parametrize("count", [CHUNKS_AT_ONCE, CHUNKS_AT_ONCE + 1, 3 * CHUNKS_AT_ONCE + 7])
@pytest.mark.parametrize("rest", [b"", b"next"])
def test_of_very_many_chunks_only_some_are_decoded_at_once(count: int, rest: bytes) -> None:
    decoder = ChunkedDecoder(BadRequest)
    body, found = decoder.decode(b"1\r\nx\r\n" * count + b"0\r\nX-Sum: 1\r\n\r\n" + rest)
    calls = 1
    while decoder.behind:
        assert found is None
        assert len(body) == calls * CHUNKS_AT_ONCE
        part, found = decoder.decode(b"")
        body += part
        calls += 1
    assert (body, found, decoder.trailers) == (b"x" * count, rest, [(b"X-Sum", b"1")])
    assert calls == 1 + count // CHUNKS_AT_ONCE


def test_a_decoder_is_not_behind_when_it_has_decoded_all_there_is() -> None:
    decoder = ChunkedDecoder(BadRequest)
    assert decoder.decode(b"1\r\nx\r\n" * CHUNKS_AT_ONCE) == (b"x" * CHUNKS_AT_ONCE, None)
    assert not decoder.behind
    assert decoder.decode(b"0\r\n\r\n") == (b"", b"")
    assert not LengthDecoder(1).behind


def test_more_that_comes_while_a_decoder_is_behind_is_decoded_after_the_rest() -> None:
    decoder = ChunkedDecoder(BadRequest)
    first, _ = decoder.decode(b"1\r\nx\r\n" * (CHUNKS_AT_ONCE + 2))
    second, rest = decoder.decode(b"1\r\ny\r\n0\r\n\r\n")
    assert first + second == b"x" * (CHUNKS_AT_ONCE + 2) + b"y"
    assert rest == b""


@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [b"3\r\nabc\r\n", b"0\r\n", b"\r\n", b"\r", b"\n", b"1;x", b"X: y\r\n", b"f\r\n"]
            ),
            st.binary(max_size=6),
        ),
        max_size=10,
    ).map(b"".join),
    st.lists(st.integers(0), max_size=6),
)
def test_garbage_is_refused_or_waits_for_more_whatever_the_pieces(data: bytes, cuts: list[int]) -> None:
    whole, pieces = outcome([data]), outcome(cut(data, cuts))
    assert pieces == whole


@pytest.mark.parametrize("size", [CHUNK_LINE_LIMIT, CHUNK_LINE_LIMIT + 1])
def test_the_longest_chunk_line_is_the_same_however_it_is_cut(size: int) -> None:
    line = b"3;" + b"x" * (size - 2)
    data = line + b"\r\nabc\r\n0\r\n\r\n"
    expected: tuple[bytes, bytes, Fields] | str = (b"abc", b"", []) if size == CHUNK_LINE_LIMIT else "refused"
    for end in (0, size - 1, size, size + 1, size + 2):
        assert outcome([data[:end], data[end:]]) == expected


def test_a_chunk_line_without_an_end_is_not_kept_for_ever() -> None:
    decoder = ChunkedDecoder(BadRequest)
    for _ in range(CHUNK_LINE_LIMIT + 1):
        decoder.decode(b"0")
    with pytest.raises(BadRequest):
        decoder.decode(b"0")


@pytest.mark.parametrize("size", [TRAILER_LIMIT, TRAILER_LIMIT + 1])
def test_the_longest_trailer_section_is_the_same_however_it_is_cut(size: int) -> None:
    line = b"X: " + b"x" * (size - 5)
    data = b"0\r\n" + line + b"\r\n\r\n"
    for end in (0, size, size + 1, size + 2, size + 3):
        assert (outcome([data[:end], data[end:]]) == "refused") == (size > TRAILER_LIMIT)


def test_many_trailers_are_as_bad_as_a_long_one() -> None:
    with pytest.raises(BadRequest):
        decode([b"0\r\n", b"X: y\r\n" * (TRAILER_LIMIT // 6 + 1)])


def test_a_trailer_without_an_end_is_not_kept_for_ever() -> None:
    decoder = ChunkedDecoder(BadRequest)
    decoder.decode(b"0\r\nX: ")
    for _ in range(TRAILER_LIMIT - len(b"X: ")):
        decoder.decode(b"x")
    with pytest.raises(BadRequest):
        decoder.decode(b"x")


def test_extensions_may_not_outweigh_the_data() -> None:
    piece = b"1;" + b"x" * 998 + b"\r\na\r\n"
    decoder = ChunkedDecoder(BadRequest)
    decoder.decode(piece * (EXTENSION_ALLOWANCE // 1000))
    with pytest.raises(BadRequest):
        decoder.decode(piece)


def test_bytes_of_data_earn_bytes_of_extensions() -> None:
    piece = b"400;" + b"x" * 996 + b"\r\n" + bytes(1024) + b"\r\n"
    assert len(ChunkedDecoder(BadRequest).decode(piece * 100)[0]) == 102_400


@pytest.mark.parametrize(
    "name",
    [b"Content-Length", b"transfer-encoding", b"HOST", b"Content_Length", b"Cookie", b"X-Real-IP"],
)
def test_trailers_that_frame_route_or_authenticate_are_dropped(name: bytes) -> None:
    assert decode([b"0\r\nX-Sum: 1 \r\n" + name + b": 1\r\n\r\n"]) == (b"", b"", [(b"X-Sum", b"1")])
    assert not may_trail(name)


def test_the_last_chunk_ends_the_body() -> None:
    assert last_chunk(None) == last_chunk([]) == b"0\r\n\r\n"
    assert last_chunk([(b"X", b"y")]) == b"0\r\nX: y\r\n\r\n"
    assert chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def test_every_error_of_a_decoder_is_a_wire_error() -> None:
    assert issubclass(BadRequest, WireError)
    assert issubclass(BadResponse, WireError)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_body_of_known_length_ends_where_its_length_says_however_it_is_cut(cut: int) -> None:
    data = b"body" + b"GET / HTTP"
    decoder = body_decoder(4, BadRequest)
    body, rest = b"", None
    position = 0
    while rest is None:
        piece, rest = decoder.decode(data[position : position + cut])
        body += piece
        position += cut
    assert body == b"body"
    assert rest + data[position:] == b"GET / HTTP"
    assert decoder.trailers == []


def test_a_body_of_unknown_length_is_read_as_chunks() -> None:
    assert body_decoder(CHUNKED, BadRequest).decode(b"2\r\nab\r\n0\r\n\r\nrest") == (b"ab", b"rest")
