"""Where a body ends: the one place where request smuggling is refused.

Two parties that disagree about the length of a message can be made to see different messages on one
connection. So nothing here guesses, repairs or prefers one reading to another: a message whose length can
be read in two ways is refused, and what is forwarded is framed anew from the one length found here.

The rules (RFC 9112, sections 6 and 7, always the strict side)
- A request with Transfer-Encoding is chunked, exactly that, once, in HTTP/1.1, without Content-Length.
- Content-Length is 1 to 18 digits, zeros before the number among them. No sign, no white space inside.
- A request has it once: RFC 9110, 8.6 lets a recipient refuse equal ones, nginx does, and no client is known
  to send them but those who try whether two parties take different ones. A response may say the same several
  times, in several fields or as a list: RFC 9110, 8.6 and all peers let that pass, and applications behind
  other middleware do it.
- White space around a value is no part of it (RFC 9110, 5.5): who calls has taken it off. What goes on is
  never what came but our own spelling of the number.
- Chunk sizes are 1 to 15 hexadecimal digits; lines end with CRLF and never with a bare LF or CR. Extensions
  have the grammar of RFC 9112, 7.1.1, and end here.
- Trailers are never merged into the head, and fields that frame, route or authenticate are dropped.
- What surrounds the data (chunk lines, extensions, trailers) is bounded, so that a peer cannot make
  us read for ever without moving a byte.
- So are the chunks that are decoded at once: 44,000 of one byte fit into one read, and take 97 ms.
"""

from __future__ import annotations

import re
from typing import Final

from portero_py.errors import BadRequest, BadResponse, WireError
from portero_py.wire.message import CHUNKED, UNTIL_CLOSE, Fields

#: Longest chunk-size line, extensions included.
CHUNK_LINE_LIMIT: Final = 1024
#: Chunks that are decoded in one call, before the other connections have their turn.
CHUNKS_AT_ONCE: Final = 2048
#: Longest trailer section.
TRAILER_LIMIT: Final = 8192
#: Bytes of chunk extensions allowed in one message, plus one for each byte of data.
EXTENSION_ALLOWANCE: Final = 16384

_LENGTH = re.compile(rb"[0-9]{1,18}")
# Possessive (++, *+), because a peer chooses the text: with two plain repetitions that could share white
# space, a trailer of 8 KB that was wrong in its last byte took 190 ms.
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:[ \t]*+;[ \t]*+" + _TOKEN + rb"(?:[ \t]*+=[ \t]*+(?:" + _TOKEN + rb"|"
    rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"))?)*'
)
_TRAILER = re.compile(rb"(" + _TOKEN + rb"):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)")

# RFC 9110, 6.5.1: fields that frame, route, authenticate, modify the request or describe the content
# mean nothing, or too much, in a trailer.
_NOT_IN_TRAILERS: Final = frozenset(
    b"authorization cache-control connection content-encoding content-length content-range content-type "
    b"cookie expect forwarded host keep-alive max-forwards proxy-authenticate proxy-authorization "
    b"proxy-connection range set-cookie te trailer transfer-encoding upgrade www-authenticate "
    b"x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-prefix x-forwarded-proto "
    b"x-forwarded-scheme x-forwarded-server x-forwarded-ssl x-real-ip x-request-id".split()
)


def request_body_length(version: bytes, lengths: list[bytes], codings: list[bytes]) -> int:
    """Return how many body bytes follow a request's head, or CHUNKED.

    `lengths` and `codings` are the values of all Content-Length and Transfer-Encoding fields, without white
    space around them. Raises BadRequest when that can be read in two ways (RFC 9112, 6.3).
    """
    if codings:
        if lengths:
            raise BadRequest("Content-Length and Transfer-Encoding in one request")
        if version != b"1.1":
            raise BadRequest("Transfer-Encoding in an HTTP/1.0 request")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise BadRequest("Transfer-Encoding is not exactly 'chunked'")
        return CHUNKED
    if not lengths:
        return 0
    if len(lengths) > 1:
        raise BadRequest("more than one Content-Length field")
    return _number(lengths[0], BadRequest)


def response_content_length(values: list[bytes]) -> int:
    """Return the number that all Content-Length fields of a response say; there is at least one.

    Raises BadResponse when they do not all say the same.
    """
    value = values[0]
    if len(values) > 1 or b"," in value:
        values = [each.strip(b" \t") for each in b",".join(values).split(b",")]
        value = values[0]
        if values.count(value) != len(values):
            raise BadResponse("different values of Content-Length")
    return _number(value, BadResponse)


def response_body_length(
    method: bytes, status: int, version: bytes, content_length: int, codings: list[bytes]
) -> int:
    """Return how many body bytes follow a response's head, or CHUNKED, or UNTIL_CLOSE.

    `method` is that of the request, `content_length` what the response says, or UNTIL_CLOSE when it says
    nothing. Raises BadResponse when the length can be read in two ways.
    """
    if codings and content_length != UNTIL_CLOSE:
        raise BadResponse("Content-Length and Transfer-Encoding in one response")
    if method == b"HEAD" or status == 304 or status == 204 or status < 200:
        return 0
    if codings:
        if version != b"1.1":
            raise BadResponse("Transfer-Encoding in an HTTP/1.0 response")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise BadResponse("Transfer-Encoding is not exactly 'chunked'")
        return CHUNKED
    return content_length


def may_trail(name: bytes) -> bool:
    """Say whether a field of this name may be passed on in a trailer section."""
    return name.lower().replace(b"_", b"-") not in _NOT_IN_TRAILERS


def body_decoder(length: int, error: type[WireError]) -> LengthDecoder | ChunkedDecoder:
    """Return what reads a body of `length` bytes, 1 at least, or CHUNKED."""
    return ChunkedDecoder(error) if length == CHUNKED else LengthDecoder(length)


def chunk(data: bytes) -> bytes:
    """Return `data`, which is not empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: Fields | None) -> bytes:
    """Return the end of a chunked body."""
    if not trailers:
        return b"0\r\n\r\n"
    return b"0\r\n%b\r\n" % b"".join([b"%b: %b\r\n" % field for field in trailers])


class LengthDecoder:
    """Takes one body of `length` bytes, 1 at least, from what was read. The same calls as ChunkedDecoder."""

    __slots__ = ("_left",)

    trailers: Fields = []  # noqa: RUF012  # there are none, and nobody adds any
    behind = False

    def __init__(self, length: int) -> None:
        self._left = length

    def decode(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Return the body bytes found in `data`, and the rest when the body is complete, else None."""
        size = len(data)
        left = self._left
        if size < left:
            self._left = left - size
            return data, None
        self._left = 0
        if size == left:
            return data, b""
        return data[:left], data[left:]


class ChunkedDecoder:
    """Decodes one chunked body, however its bytes are cut.

    Call `decode` with what was read until it returns a rest that is not None: the body is complete, the
    rest belongs to the next message, and `trailers` holds the trailer fields that may be passed on.
    While it is `behind` there is more to decode at hand than a call may do: read no more, and call
    `decode(b"")` in the next turn of the event loop.
    Raises `error` (BadRequest or BadResponse) at the first byte that is not in the grammar.
    """

    __slots__ = (
        "_allowance",
        "_error",
        "_in_trailers",
        "_left",
        "_pending",
        "_trailer_bytes",
        "behind",
        "trailers",
    )

    def __init__(self, error: type[WireError]) -> None:
        self._error = error
        self._left = 0  # of the current chunk, with the CRLF behind it
        self._pending = b""  # a line that is not complete, or all that is left while it is behind
        self._in_trailers = False
        self._trailer_bytes = 0
        self._allowance = EXTENSION_ALLOWANCE
        self.behind = False
        self.trailers: Fields = []

    def decode(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Return the body bytes found in `data`, and the rest when the body is complete, else None."""
        if self._pending:
            data = self._pending + data
            self._pending = b""
            self.behind = False
        pieces: list[bytes] = []
        position = 0
        end = len(data)
        chunks = CHUNKS_AT_ONCE
        while not self._in_trailers:
            if self._left:
                position = self._take_data(data, position, pieces)
                if self._left:
                    return b"".join(pieces), None
            if chunks <= 0 and position < end:
                self._pending = data[position:]
                self.behind = True
                return b"".join(pieces), None
            chunks -= 1
            line_end = data.find(b"\r\n", position)
            if line_end < 0 or line_end - position > CHUNK_LINE_LIMIT:
                self._keep_line(data[position:], CHUNK_LINE_LIMIT + 1)  # the CR may be there already
                return b"".join(pieces), None
            size = self._chunk_size(data[position:line_end])
            position = line_end + 2
            if size:
                self._left = size + 2
                self._allowance += size
            else:
                self._in_trailers = True
        while True:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                self._keep_line(data[position:end], TRAILER_LIMIT - self._trailer_bytes)
                return b"".join(pieces), None
            line = data[position:line_end]
            position = line_end + 2
            if not line:
                return b"".join(pieces), data[position:]
            self._take_trailer(line)

    # Private

    def _take_data(self, data: bytes, position: int, pieces: list[bytes]) -> int:
        """Take what there is of the current chunk and the CRLF behind it; return the new position."""
        left = self._left
        available = len(data) - position
        if left > 2:
            piece = data[position : position + left - 2]
            if piece:
                pieces.append(piece)
        if available >= left:
            if data[position + max(left - 2, 0) : position + left] != b"\r\n"[-left:]:
                raise self._error("a chunk is not followed by CRLF")
            self._left = 0
            return position + left
        if available > max(left - 2, 0) and left >= 2 and data[position + left - 2] != 0x0D:
            raise self._error("a chunk is not followed by CRLF")
        self._left = left - available
        return len(data)

    def _chunk_size(self, line: bytes) -> int:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise self._error("malformed chunk size or extension")
        self._allowance -= len(line)
        if self._allowance < 0:
            raise self._error("too many bytes of chunk extensions")
        return int(match[1], 16)

    def _keep_line(self, line: bytes, limit: int) -> None:
        """Keep the beginning of a line for the next call; refuse what cannot become a good one."""
        if len(line) > limit:
            raise self._error("a chunk line or trailer section is too long")
        if b"\n" in line or b"\r" in line[:-1]:
            raise self._error("a bare CR or LF in a chunk line or trailer")
        self._pending = line

    def _take_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > TRAILER_LIMIT:
            raise self._error("the trailer section is too long")
        match = _TRAILER.fullmatch(line)
        if match is None:
            raise self._error("malformed trailer field")
        name = match[1]
        if may_trail(name):
            self.trailers.append((name, match[2].rstrip(b" \t")))


def _number(value: bytes, error: type[WireError]) -> int:
    if _LENGTH.fullmatch(value) is None:
        raise error("Content-Length is not exactly one decimal number")
    return int(value)
