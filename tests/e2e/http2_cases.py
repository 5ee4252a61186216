"""The tables of malformed, good and connection-breaking HTTP/2."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.e2e.http2_client import (
    ACK,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    HEADERS,
    PADDED,
    PING,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    frame,
    rst_stream,
    window_update,
)

Pairs = list[tuple[bytes, bytes]]


def _without(pairs: Pairs, name: bytes) -> Pairs:
    return [pair for pair in pairs if pair[0] != name]


def _with(pairs: Pairs, name: bytes, value: bytes) -> Pairs:
    return [(name, value) if pair[0] == name else pair for pair in pairs]


HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


#: Name -> how an ordinary request's fields are spoilt.
MALFORMED: dict[str, Callable[[Pairs], Pairs]] = {
    "CR LF in a value": lambda p: [*p, (b"a", b"b\r\nContent-Length: 0\r\n\r\n" + HIDDEN)],
    "a CR in a value": lambda p: [*p, (b"a", b"b\rc: d")],
    "a LF in a value": lambda p: [*p, (b"a", b"b\nc: d")],
    "a NUL in a value": lambda p: [*p, (b"a", b"b\x00c")],
    "a space before a value": lambda p: [*p, (b"a", b" b")],
    "a space behind a value": lambda p: [*p, (b"a", b"b ")],
    "a tab before a value": lambda p: [*p, (b"a", b"\tb")],
    "CR LF in a name": lambda p: [*p, (b"a: b\r\nc", b"d")],
    "a LF in a name": lambda p: [*p, (b"a\nb", b"c")],
    "a NUL in a name": lambda p: [*p, (b"a\x00", b"b")],
    "a space in a name": lambda p: [*p, (b"a b", b"c")],
    "a colon in a name": lambda p: [*p, (b"a:b", b"c")],
    "Transfer-Encoding behind a colon in a name": lambda p: [*p, (b"transfer-encoding: chunked\r\na", b"b")],
    "an empty name": lambda p: [*p, (b"", b"b")],
    "a name in capitals": lambda p: [*p, (b"Abc", b"b")],
    "a name with a DEL": lambda p: [*p, (b"a\x7f", b"b")],
    "a name that is not ASCII": lambda p: [*p, (b"\xc3\xa9", b"b")],
    "CR LF in the path": lambda p: _with(p, b":path", b"/ HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    "a LF in the path": lambda p: _with(p, b":path", b"/a\nb"),
    "a NUL in the path": lambda p: _with(p, b":path", b"/a\x00b"),
    "a space in the path": lambda p: _with(p, b":path", b"/ HTTP/1.1"),
    "a tab in the path": lambda p: _with(p, b":path", b"/\tHTTP/1.1"),
    "a non-ASCII path": lambda p: _with(p, b":path", b"/\xc3\xa9"),
    "a fragment": lambda p: _with(p, b":path", b"/a#b"),
    "an empty path": lambda p: _with(p, b":path", b""),
    "a path without its slash": lambda p: _with(p, b":path", b"a/b"),
    "a URL for a path": lambda p: _with(p, b":path", b"http://other.e2e.test/"),
    "an asterisk for GET": lambda p: _with(p, b":path", b"*"),
    "CR LF in the method": lambda p: _with(p, b":method", b"GET /smuggled HTTP/1.1\r\nA: b\r\n\r\nGET"),
    "a space in the method": lambda p: _with(p, b":method", b"GET /smuggled"),
    "a LF in the method": lambda p: _with(p, b":method", b"GET\n"),
    "an empty method": lambda p: _with(p, b":method", b""),
    "CR LF in the authority": lambda p: _with(p, b":authority", p[2][1] + b"\r\nA: b"),
    "a space in the authority": lambda p: _with(p, b":authority", p[2][1] + b" x"),
    "a path in the authority": lambda p: _with(p, b":authority", p[2][1] + b"/x"),
    "a NUL in the authority": lambda p: _with(p, b":authority", p[2][1] + b"\x00"),
    "user information": lambda p: _with(p, b":authority", b"user@" + p[2][1]),
    "an empty authority": lambda p: _with(p, b":authority", b""),
    "CR LF in the scheme": lambda p: _with(p, b":scheme", b"https\r\nA: b"),
    "an empty scheme": lambda p: _with(p, b":scheme", b""),
    "no method": lambda p: _without(p, b":method"),
    "no path": lambda p: _without(p, b":path"),
    "no scheme": lambda p: _without(p, b":scheme"),
    "neither authority nor Host": lambda p: _without(p, b":authority"),
    "two methods": lambda p: [(b":method", b"GET"), *p],
    "two paths": lambda p: [(b":path", b"/smuggled"), *p],
    "two schemes": lambda p: [(b":scheme", b"https"), *p],
    "two authorities": lambda p: [(b":authority", b"x"), *p],
    "an unknown pseudo-header": lambda p: [(b":x", b"y"), *p],
    "a status in a request": lambda p: [(b":status", b"200"), *p],
    "a pseudo-header behind a field": lambda p: [*p[:3], (b"a", b"b"), *p[3:]],
    "Connection": lambda p: [*p, (b"connection", b"keep-alive")],
    "Connection: close": lambda p: [*p, (b"connection", b"close")],
    "Keep-Alive": lambda p: [*p, (b"keep-alive", b"timeout=5")],
    "Proxy-Connection": lambda p: [*p, (b"proxy-connection", b"keep-alive")],
    "Upgrade": lambda p: [*p, (b"upgrade", b"websocket")],
    "Transfer-Encoding: chunked": lambda p: [*p, (b"transfer-encoding", b"chunked")],
    "Transfer-Encoding: identity": lambda p: [*p, (b"transfer-encoding", b"identity")],
    "TE other than trailers": lambda p: [*p, (b"te", b"gzip")],
    "Host that does not agree": lambda p: [*p, (b"host", b"other.e2e.test")],
    "two Hosts": lambda p: [*_without(p, b":authority"), (b"host", p[2][1]), (b"host", p[2][1])],
    "two Content-Lengths": lambda p: [*p, (b"content-length", b"0"), (b"content-length", b"1")],
    "a Content-Length with a sign": lambda p: [*p, (b"content-length", b"+0")],
    "a negative Content-Length": lambda p: [*p, (b"content-length", b"-1")],
    "an empty Content-Length": lambda p: [*p, (b"content-length", b"")],
    "a list for Content-Length": lambda p: [*p, (b"content-length", b"0, 0")],
    "a Content-Length without DATA": lambda p: [*p, (b"content-length", b"5")],
}


GOOD: dict[str, tuple[Callable[[Pairs], Pairs], bytes | None, bytes]] = {
    "a GET": (lambda p: p, None, b"GET / "),
    "a POST": (lambda p: _with(p, b":method", b"POST"), b"hello", b"POST / hello"),
    "a body that looks like a request": (
        lambda p: _with(p, b":method", b"POST"),
        HIDDEN,
        b"POST / " + HIDDEN,
    ),
    "an agreeing Content-Length": (
        lambda p: [*_with(p, b":method", b"PUT"), (b"content-length", b"5")],
        b"hello",
        b"PUT / hello",
    ),
    "Host without an authority": (
        lambda p: [*_without(p, b":authority"), (b"host", p[2][1])],
        None,
        b"GET / ",
    ),
    "Host beside the same authority": (lambda p: [*p, (b"host", p[2][1])], None, b"GET / "),
    "TE: trailers": (lambda p: [*p, (b"te", b"trailers")], None, b"GET / "),
    "OPTIONS *": (
        lambda p: _with(_with(p, b":method", b"OPTIONS"), b":path", b"*"),
        None,
        b"OPTIONS * ",
    ),
    "an empty body": (lambda p: _with(p, b":method", b"POST"), b"", b"POST / "),
    "a value with obsolete bytes": (lambda p: [*p, (b"a", b"\xe9\xff")], None, b"GET / "),
}


#: Name -> the bytes that break the connection, and the codes of GOAWAY that fit.
BROKEN: dict[str, tuple[bytes, set[int]]] = {
    "DATA on stream 0": (frame(DATA, 0, 0, b"x"), {PROTOCOL_ERROR}),
    "HEADERS on stream 0": (frame(HEADERS, END_HEADERS | END_STREAM, 0, b"\x82"), {PROTOCOL_ERROR}),
    "HEADERS on an even stream": (frame(HEADERS, END_HEADERS | END_STREAM, 2, b"\x82"), {PROTOCOL_ERROR}),
    "DATA on an idle stream": (frame(DATA, 0, 1, b"x"), {PROTOCOL_ERROR, STREAM_CLOSED}),
    "RST_STREAM on an idle stream": (rst_stream(1), {PROTOCOL_ERROR}),
    "RST_STREAM on stream 0": (rst_stream(0), {PROTOCOL_ERROR}),
    "RST_STREAM of three bytes": (frame(RST_STREAM, 0, 1, b"abc"), {FRAME_SIZE_ERROR, PROTOCOL_ERROR}),
    "WINDOW_UPDATE on an idle stream": (window_update(1, 1), {PROTOCOL_ERROR}),
    "WINDOW_UPDATE of zero": (window_update(0, 0), {PROTOCOL_ERROR}),
    "WINDOW_UPDATE of three bytes": (frame(WINDOW_UPDATE, 0, 0, b"abc"), {FRAME_SIZE_ERROR}),
    "a window over 2^31-1": (window_update(0, 2**31 - 1), {FLOW_CONTROL_ERROR}),
    "PING of seven bytes": (frame(PING, 0, 0, b"1234567"), {FRAME_SIZE_ERROR}),
    "PING on a stream": (frame(PING, 0, 1, b"12345678"), {PROTOCOL_ERROR}),
    "SETTINGS of five bytes": (frame(SETTINGS, 0, 0, b"12345"), {FRAME_SIZE_ERROR}),
    "SETTINGS on a stream": (frame(SETTINGS, 0, 1, b""), {PROTOCOL_ERROR}),
    "SETTINGS ACK with a payload": (frame(SETTINGS, ACK, 0, b"123456"), {FRAME_SIZE_ERROR}),
    "ENABLE_PUSH of 2": (frame(SETTINGS, 0, 0, struct.pack(">HI", 2, 2)), {PROTOCOL_ERROR}),
    "INITIAL_WINDOW_SIZE of 2^31": (
        frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31)),
        {FLOW_CONTROL_ERROR},
    ),
    "MAX_FRAME_SIZE of 1": (frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 1)), {PROTOCOL_ERROR}),
    "a frame over 16 KiB": (frame(DATA, 0, 1, b"x" * 16385), {FRAME_SIZE_ERROR}),
    "PUSH_PROMISE": (frame(PUSH_PROMISE, END_HEADERS, 1, b"\x00\x00\x00\x02\x82"), {PROTOCOL_ERROR}),
    "CONTINUATION out of nowhere": (frame(CONTINUATION, END_HEADERS, 1, b"\x82"), {PROTOCOL_ERROR}),
    "another frame inside a header block": (
        frame(HEADERS, END_STREAM, 1, b"\x82") + frame(PING, 0, 0, b"12345678"),
        {PROTOCOL_ERROR},
    ),
    "an unknown frame inside a header block": (
        frame(HEADERS, END_STREAM, 1, b"\x82") + frame(0x42, 0, 1, b""),
        {PROTOCOL_ERROR},
    ),
    "CONTINUATION of another stream": (
        frame(HEADERS, END_STREAM, 1, b"\x82") + frame(CONTINUATION, END_HEADERS, 3, b"\x84"),
        {PROTOCOL_ERROR},
    ),
    "HPACK with an index that is not there": (
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xff\xff\xff\x0f"),
        {COMPRESSION_ERROR},
    ),
    "HPACK that ends too early": (
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x40\x7f"),
        {COMPRESSION_ERROR},
    ),
    "HPACK with a table over its limit": (
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x3f\xff\xff\x7f\x82"),
        {COMPRESSION_ERROR},
    ),
    "HPACK with a Huffman-coded string that ends in zeros": (
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x82\x87\x04\x83\x60\x63\x18"),
        {COMPRESSION_ERROR},
    ),
    "more padding than payload": (
        frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b"\x09\x82"),
        {PROTOCOL_ERROR},
    ),
    "an empty padded frame": (
        frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b""),
        {FRAME_SIZE_ERROR, PROTOCOL_ERROR},
    ),
    "HTTP/1.1 instead of frames": (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 700,
        {FRAME_SIZE_ERROR, PROTOCOL_ERROR},
    ),
}
