"""The HTTP/2 frame layer: frame headers, settings, error codes, and the frames that portero sends.

A frame (RFC 9113, 4.1) is nine bytes, length (24 bits), type (8), flags (8), a reserved bit and the stream
(31 bits), and then `length` bytes of payload. `FRAME.unpack_from` gives the length in two parts (16 and 8
bits), because struct knows no 24-bit integer: one call for the whole header, 0.15 µs.

Constants are plain ints: an enum member costs an attribute look-up more, several times a request. Only
`ErrorCode` is an enum, because it is looked at when things end, by people.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from struct import Struct
from typing import Final

from portero_py.errors import WireError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

#: length >> 8, length & 0xff, type, flags, stream
FRAME: Final = Struct(">HBBBL")
FRAME_HEADER: Final = 9

# types
DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

# flags
END_STREAM: Final = 0x01
ACK: Final = 0x01
END_HEADERS: Final = 0x04
PADDED: Final = 0x08
PRIORITY_FLAG: Final = 0x20

# settings
HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6
ENABLE_CONNECT_PROTOCOL: Final = 8
NO_RFC7540_PRIORITIES: Final = 9

DEFAULT_WINDOW: Final = 65_535
LARGEST_WINDOW: Final = 2**31 - 1
LARGEST_STREAM: Final = 2**31 - 1
#: The largest frame that portero takes: the least that RFC 9113 allows, as frames are kept until whole.
FRAME_LIMIT: Final = 16_384

_SETTING = Struct(">HL")
SETTING_SIZE: Final = _SETTING.size
_LONG = Struct(">L")


class ErrorCode(IntEnum):
    """RFC 9113, section 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ConnectionFault(WireError):
    """A connection error (RFC 9113, 5.4.1): GOAWAY with `code`, and the connection ends."""

    reason = "http2_connection"

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class InternalFault(ConnectionFault):
    """A fault of portero's own that ends the connection."""

    status = 500
    reason = "internal_error"


def frame_header(length: int, kind: int, flags: int, stream: int) -> bytes:
    """Return the nine bytes before a payload of `length` bytes."""
    return FRAME.pack(length >> 8, length & 0xFF, kind, flags, stream)


def header_frames(stream: int, block: bytes, flags: int, limit: int) -> list[bytes]:
    """Return HEADERS, and CONTINUATION frames when `block` is longer than `limit`, as headers and payloads.

    `flags` is END_STREAM or 0; the first item is the header of the HEADERS frame.
    """
    if len(block) <= limit:
        return [frame_header(len(block), HEADERS, flags | END_HEADERS, stream), block]
    pieces = [frame_header(limit, HEADERS, flags, stream), block[:limit]]
    for start in range(limit, len(block), limit):
        piece = block[start : start + limit]
        last = END_HEADERS if start + limit >= len(block) else 0
        pieces += [frame_header(len(piece), CONTINUATION, last, stream), piece]
    return pieces


def settings_frame(settings: Iterable[tuple[int, int]]) -> bytes:
    """Return a SETTINGS frame with (identifier, value) pairs."""
    payload = b"".join([_SETTING.pack(identifier, value) for identifier, value in settings])
    return frame_header(len(payload), SETTINGS, 0, 0) + payload


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """Return the checked (identifier, value) pairs of a SETTINGS frame; unknown ones are left out.

    Raises ConnectionFault (RFC 9113, 6.5 and 6.5.2).
    """
    if len(payload) % 6:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "the length of SETTINGS is not a multiple of 6")
    for identifier, value in _SETTING.iter_unpack(payload):
        rule = _SETTING_RULES.get(identifier)
        if rule is not None:
            lowest, highest, code = rule
            if not lowest <= value <= highest:
                raise ConnectionFault(code, f"setting {identifier} cannot be {value}")
            yield identifier, value


SETTINGS_ACK: Final = frame_header(0, SETTINGS, ACK, 0)


def ping_frame(payload: bytes, *, ack: bool) -> bytes:
    """Return a PING; `payload` has eight bytes."""
    return frame_header(8, PING, ACK if ack else 0, 0) + payload


def reset_frame(stream: int, code: ErrorCode) -> bytes:
    """Return a RST_STREAM."""
    return frame_header(4, RST_STREAM, 0, stream) + _LONG.pack(code)


def window_frame(stream: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE of 1 to 2^31 - 1 bytes; stream 0 is the connection."""
    return frame_header(4, WINDOW_UPDATE, 0, stream) + _LONG.pack(increment)


def goaway_frame(last_stream: int, code: ErrorCode, text: bytes = b"") -> bytes:
    """Return a GOAWAY; `text` is for the people at the other end."""
    return frame_header(8 + len(text), GOAWAY, 0, 0) + _LONG.pack(last_stream) + _LONG.pack(code) + text


def read_long(payload: bytes) -> int:
    """Return the first four bytes as a number without its reserved bit."""
    return int.from_bytes(payload[:4], "big") & LARGEST_WINDOW


def without_padding(flags: int, payload: bytes) -> bytes:
    """Return the payload of HEADERS or DATA without padding and priority (RFC 9113, 6.1 and 6.2).

    Raises ConnectionFault.
    """
    start = 0
    end = len(payload)
    if flags & PADDED:
        if not payload:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without a padding length")
        start = 1
        end -= payload[0]
    if flags & PRIORITY_FLAG:
        start += 5
        if len(payload) < start:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS without its priority")
    if start > end:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than payload")
    return payload[start:end]


# Private

_ANY: Final = 2**32 - 1
_SETTING_RULES: Final = {
    HEADER_TABLE_SIZE: (0, _ANY, ErrorCode.PROTOCOL_ERROR),
    ENABLE_PUSH: (0, 1, ErrorCode.PROTOCOL_ERROR),
    INITIAL_WINDOW_SIZE: (0, LARGEST_WINDOW, ErrorCode.FLOW_CONTROL_ERROR),
    MAX_FRAME_SIZE: (FRAME_LIMIT, 2**24 - 1, ErrorCode.PROTOCOL_ERROR),
    ENABLE_CONNECT_PROTOCOL: (0, 1, ErrorCode.PROTOCOL_ERROR),
    NO_RFC7540_PRIORITIES: (0, 1, ErrorCode.PROTOCOL_ERROR),
}
