"""The table of malformed and ambiguous HTTP/1.1 requests.

`{host}` in a request stands for the service's name. Wherever an attacker would hide a second request, its
path is /smuggled: those bytes must reach no backend outside a body.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What the smuggled request looks like.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: {host}\r\n\r\n"


@dataclass(frozen=True)
class Refused:
    """A request that is answered with one of `statuses`, after which the connection is closed."""

    name: str
    raw: bytes
    statuses: tuple[int, ...] = (400,)


@dataclass(frozen=True)
class Cut:
    """A request that goes wrong in its body: its head may have gone out, a complete one never does."""

    name: str
    raw: bytes
    statuses: tuple[int, ...] = (400,)


def get_lines(line: bytes = b"GET / HTTP/1.1", *lines: bytes, host: bytes = b"Host: {host}\r\n") -> bytes:
    """A request with these lines."""
    return line + b"\r\n" + host + b"".join(each + b"\r\n" for each in lines) + b"\r\n"


def post_lines(*lines: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return get_lines(b"POST / HTTP/" + version, *lines) + body


def chunked(body: bytes) -> bytes:
    return post_lines(b"Transfer-Encoding: chunked", body=body)


_LENGTHS = {
    "twice, different": (b"Content-Length: 5", b"Content-Length: 6"),
    "twice, the same": (b"Content-Length: 5", b"Content-Length: 5"),
    "as a list": (b"Content-Length: 5, 5",),
    "with a plus sign": (b"Content-Length: +5",),
    "negative": (b"Content-Length: -5",),
    "hexadecimal": (b"Content-Length: 0x5",),
    "with white space inside": (b"Content-Length: 5 0",),
    "with an underscore": (b"Content-Length: 5_0",),
    "empty": (b"Content-Length:",),
    "of two to the 64th": (b"Content-Length: 18446744073709551616",),
    "of two to the 64th and five": (b"Content-Length: 18446744073709551621",),
    "with a fraction": (b"Content-Length: 5.0",),
    "with an exponent": (b"Content-Length: 5e0",),
    "in Arabic digits": ("Content-Length: ٥".encode(),),
    "behind a vertical tab": (b"Content-Length: \x0b5",),
    "with a space before the colon": (b"Content-Length : 5",),
    "in quotes": (b'Content-Length: "5"',),
    "with a semicolon": (b"Content-Length: 5;",),
    "before a vertical tab": (b"Content-Length: 5\x0b",),
    "of nineteen digits": (b"Content-Length: 0000000000000000005",),
    "as a list of different ones": (b"Content-Length: 5, 6",),
    "twice, one with a zero before it": (b"Content-Length: 5", b"Content-Length: 05"),
    "and Transfer-Encoding": (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "after Transfer-Encoding": (b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    "zero, and Transfer-Encoding": (b"Content-Length: 0", b"Transfer-Encoding: chunked"),
}

_CODINGS = {
    "twice": (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "chunked and identity": (b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
    "chunked, chunked": (b"Transfer-Encoding: chunked, chunked",),
    "chunked, identity": (b"Transfer-Encoding: chunked, identity",),
    "identity, chunked": (b"Transfer-Encoding: identity, chunked",),
    "gzip, chunked": (b"Transfer-Encoding: gzip, chunked",),
    "identity": (b"Transfer-Encoding: identity",),
    "xchunked": (b"Transfer-Encoding: xchunked",),
    "x-chunked": (b"Transfer-Encoding: x-chunked",),
    "chunkedx": (b"Transfer-Encoding: chunkedx",),
    "chunked with a parameter": (b"Transfer-Encoding: chunked;q=1",),
    "chunked in quotes": (b'Transfer-Encoding: "chunked"',),
    "chunked behind a vertical tab": (b"Transfer-Encoding: \x0bchunked",),
    "chunked with a comma behind it": (b"Transfer-Encoding: chunked,",),
    "chunked with a comma before it": (b"Transfer-Encoding: ,chunked",),
    "chunked, the name with a space behind it": (b"Transfer-Encoding : chunked",),
    "chunked, the name with a tab behind it": (b"Transfer-Encoding\t: chunked",),
    "chunked, the name with a space before it": (b" Transfer-Encoding: chunked",),
    "chunked on a folded line": (b"Transfer-Encoding:", b" chunked"),
    "chunked before a vertical tab": (b"Transfer-Encoding: chunked\x0b",),
    "chunked chunked": (b"Transfer-Encoding: chunked chunked",),
    "chunked with a NUL behind it": (b"Transfer-Encoding: chunked\x00",),
    "chunked with a DEL behind it": (b"Transfer-Encoding: chunked\x7f",),
    "empty": (b"Transfer-Encoding:",),
    "chunked behind a bare CR": (b"X: y\rTransfer-Encoding: chunked",),
    "chunked behind a bare LF": (b"X: y\nTransfer-Encoding: chunked",),
}

_HEADS = {
    "a bare LF ends every line": b"GET / HTTP/1.1\nHost: {host}\n\n",
    "a bare LF ends the request line": b"GET / HTTP/1.1\nHost: {host}\r\n\r\n",
    "a bare LF ends a field line": b"GET / HTTP/1.1\r\nHost: {host}\r\nA: b\nC: d\r\n\r\n",
    "a bare LF ends the head": b"GET / HTTP/1.1\r\nHost: {host}\r\nA: b\r\n\n",
    "a bare CR ends a field line": get_lines(b"GET / HTTP/1.1", b"A: b\rC: d"),
    "a bare CR ends the request line": b"GET / HTTP/1.1\rHost: {host}\r\n\r\n",
    "CR CR LF ends a line": b"GET / HTTP/1.1\r\r\nHost: {host}\r\n\r\n",
    "a NUL in a value": get_lines(b"GET / HTTP/1.1", b"A: b\x00c"),
    "a NUL in a name": get_lines(b"GET / HTTP/1.1", b"A\x00: b"),
    "a control character in a value": get_lines(b"GET / HTTP/1.1", b"A: b\x01c"),
    "a DEL in a value": get_lines(b"GET / HTTP/1.1", b"A: b\x7fc"),
    "a folded line": get_lines(b"GET / HTTP/1.1", b"A: b", b" c"),
    "a line folded with a tab": get_lines(b"GET / HTTP/1.1", b"A: b", b"\tc"),
    "a space inside a name": get_lines(b"GET / HTTP/1.1", b"A B: c"),
    "a space behind a name": get_lines(b"GET / HTTP/1.1", b"A : c"),
    "a tab behind a name": get_lines(b"GET / HTTP/1.1", b"A\t: c"),
    "an empty name": get_lines(b"GET / HTTP/1.1", b": c"),
    "a line without a colon": get_lines(b"GET / HTTP/1.1", b"whatever"),
    "a control character in a name": get_lines(b"GET / HTTP/1.1", b"A\x01B: c"),
    "a non-ASCII name": get_lines(b"GET / HTTP/1.1", b"\xc3\xa9: c"),
    "brackets in a name": get_lines(b"GET / HTTP/1.1", b"A(B): c"),
    "white space before the first field": b"GET / HTTP/1.1\r\n Host: {host}\r\n\r\n",
    "white space on a line of its own": b"GET / HTTP/1.1\r\n \r\nHost: {host}\r\n\r\n",
    "white space on the last line": b"GET / HTTP/1.1\r\nHost: {host}\r\n \r\n\r\n",
}

_HOSTS = {
    "missing": b"",
    "twice, different": b"Host: {host}\r\nHost: other.e2e.test\r\n",
    "twice, the same": b"Host: {host}\r\nHost: {host}\r\n",
    "empty": b"Host:\r\n",
    "a list": b"Host: {host}, other.e2e.test\r\n",
    "with user information": b"Host: user@{host}\r\n",
    "with a path": b"Host: {host}/x\r\n",
    "with a port that is no number": b"Host: {host}:port\r\n",
    "with a negative port": b"Host: {host}:-1\r\n",
    "with two ports": b"Host: {host}:80:81\r\n",
    "with white space inside": b"Host: {host} other.e2e.test\r\n",
    "with a space before the colon": b"Host : {host}\r\n",
    "with a question mark": b"Host: {host}?\r\n",
    "with a hash": b"Host: {host}#\r\n",
    "with a percent sign": b"Host: {host}%00\r\n",
    "with a backslash": b"Host: {host}\\\r\n",
    "with a non-ASCII letter": b"Host: \xc3\xa9.{host}\r\n",
    "with an open bracket": b"Host: [::1\r\n",
    "a URL": b"Host: http://{host}\r\n",
    "on a folded line": b"Host:\r\n {host}\r\n",
}

_LINES = {
    "two spaces behind the method": b"GET  / HTTP/1.1",
    "two spaces before the version": b"GET /  HTTP/1.1",
    "a tab behind the method": b"GET\t/ HTTP/1.1",
    "a space before the method": b" GET / HTTP/1.1",
    "a space behind the version": b"GET / HTTP/1.1 ",
    "a tab behind the version": b"GET / HTTP/1.1\t",
    "no version": b"GET /",
    "no path": b"GET HTTP/1.1",
    "nothing but a method": b"GET",
    "a space in the path": b"GET /a b HTTP/1.1",
    "a control character in the path": b"GET /\x01 HTTP/1.1",
    "a NUL in the path": b"GET /\x00 HTTP/1.1",
    "a DEL in the path": b"GET /\x7f HTTP/1.1",
    "a non-ASCII path": b"GET /\xc3\xa9 HTTP/1.1",
    "a fragment": b"GET /a#b HTTP/1.1",
    "a path without its slash": b"GET a/b HTTP/1.1",
    "an asterisk for GET": b"GET * HTTP/1.1",
    "an authority for GET": b"GET {host}:80 HTTP/1.1",
    "a control character in the method": b"G\x01T / HTTP/1.1",
    "a bracket in the method": b"G(T / HTTP/1.1",
    "a colon in the method": b"GET: / HTTP/1.1",
    "a form feed for a space": b"GET\x0c/ HTTP/1.1",
    "a vertical tab for a space": b"GET /\x0bHTTP/1.1",
}

_VERSIONS = {
    "HTTP/0.9": b"HTTP/0.9",
    "HTTP/2": b"HTTP/2",
    "HTTP/9": b"HTTP/9",
    "HTTP/10.0": b"HTTP/10.0",
    "HTTP/1.10": b"HTTP/1.10",
    "HTTP/01.1": b"HTTP/01.1",
    "HTTP/1.": b"HTTP/1.",
    "http/1.1 in lower case": b"http/1.1",
    "HTP/1.1": b"HTP/1.1",
    "ICE/1.0": b"ICE/1.0",
    "RTSP/1.0": b"RTSP/1.0",
    "HTTP/+1.1": b"HTTP/+1.1",
}

REFUSED = [
    *(
        Refused(f"Content-Length {name}", post_lines(*lines, body=b"0\r\n\r\n" + SMUGGLED))
        for name, lines in _LENGTHS.items()
    ),
    *(
        Refused(
            f"Transfer-Encoding {name}", post_lines(*lines, body=b"0\r\n\r\n" + SMUGGLED), statuses=(400, 501)
        )
        for name, lines in _CODINGS.items()
    ),
    Refused(
        "Transfer-Encoding in HTTP/1.0",
        post_lines(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED, version=b"1.0"),
    ),
    *(Refused(f"head with {name}", raw + SMUGGLED) for name, raw in _HEADS.items()),
    *(Refused(f"Host {name}", get_lines(host=line) + SMUGGLED) for name, line in _HOSTS.items()),
    Refused("Host twice in HTTP/1.0", get_lines(b"GET / HTTP/1.0", b"Host: other.e2e.test") + SMUGGLED),
    *(Refused(f"request line with {name}", get_lines(line) + SMUGGLED) for name, line in _LINES.items()),
    *(
        Refused(f"version {name}", get_lines(b"GET / " + version) + SMUGGLED)
        for name, version in _VERSIONS.items()
    ),
    *(
        Refused(f"version {version.decode()}", get_lines(b"GET / " + version) + SMUGGLED, statuses=(505,))
        for version in (b"HTTP/2.0", b"HTTP/2.1", b"HTTP/3.0", b"HTTP/9.9")
    ),
    Refused("almost the preface of HTTP/2", get_lines(b"PRI * HTTP/2.0") + SMUGGLED, statuses=(505,)),
    Refused("CONNECT", get_lines(b"CONNECT {host}:443 HTTP/1.1") + SMUGGLED, statuses=(400, 405, 501)),
    Refused("CONNECT with a path", get_lines(b"CONNECT / HTTP/1.1") + SMUGGLED, statuses=(400, 405, 501)),
    Refused("absolute-form with another Host", get_lines(b"GET http://other.e2e.test/ HTTP/1.1") + SMUGGLED),
    Refused("absolute-form with another port", get_lines(b"GET http://{host}:8080/ HTTP/1.1") + SMUGGLED),
    Refused("absolute-form with user information", get_lines(b"GET http://user@{host}/ HTTP/1.1") + SMUGGLED),
    Refused("absolute-form without an authority", get_lines(b"GET http:///x HTTP/1.1") + SMUGGLED),
    Refused("absolute-form of ftp", get_lines(b"GET ftp://{host}/ HTTP/1.1") + SMUGGLED),
    Refused("absolute-form without Host", get_lines(b"GET http://{host}/ HTTP/1.1", host=b"") + SMUGGLED),
    Refused("request line over the limit", get_lines(b"GET /" + b"a" * 8200 + b" HTTP/1.1"), (414,)),
    Refused("request line without an end", b"GET /" + b"a" * 40_000, (414,)),
    Refused("one field over the limit", get_lines(b"GET / HTTP/1.1", b"A: " + b"b" * 33_000), (431,)),
    Refused(
        "many fields over the limit of bytes",
        get_lines(b"GET / HTTP/1.1", *(b"A%d: " % i + b"b" * 600 for i in range(60))),
        (431,),
    ),
    Refused("101 fields", get_lines(b"GET / HTTP/1.1", *(b"A%d: b" % i for i in range(100))), (431,)),
    Refused(
        "head without an end",
        b"GET / HTTP/1.1\r\nHost: {host}\r\n" + b"A: " + b"b" * 40_000 + b"\r\n",
        (431,),
    ),
    Refused("a TLS hello", bytes.fromhex("16030100050100000100") + b"\r\n\r\n"),
    Refused("garbage", bytes(range(128, 256)) + b"\r\n\r\n"),
    Refused("NULs", b"\x00" * 64 + b"\r\n\r\n"),
    Refused("a bare response", b"HTTP/1.1 200 OK\r\nHost: {host}\r\n\r\n"),
    Refused("a bare LF before the request", b"\n" + get_lines()),
]

_CHUNKS = {
    "no hexadecimal size": b"g\r\nhello\r\n0\r\n\r\n",
    "a minus sign": b"-5\r\nhello\r\n0\r\n\r\n",
    "a plus sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x before the size": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a size over 64 bits": b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "a size of 16 F": b"FFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n",
    "a hundred zeros before the size": b"0" * 100 + b"5\r\nhello\r\n0\r\n\r\n",
    "a space before the size": b" 5\r\nhello\r\n0\r\n\r\n",
    "a space behind the size": b"5 \r\nhello\r\n0\r\n\r\n",
    "a tab behind the size": b"5\t\r\nhello\r\n0\r\n\r\n",
    "an underscore in the size": b"0_5\r\nhello\r\n0\r\n\r\n",
    "an empty size": b"\r\nhello\r\n0\r\n\r\n",
    "a size line that is only an extension": b";a\r\nhello\r\n0\r\n\r\n",
    "no CRLF behind the data": b"5\r\nhello0\r\n\r\n",
    "two other bytes for the CRLF behind the data": b"5\r\nhelloXX0\r\n\r\n",
    "two bare LFs for the CRLF behind the data": b"5\r\nhello\n\n0\r\n\r\n",
    "more data than its size": b"5\r\nhelloo\r\n0\r\n\r\n",
    "a bare LF behind the size": b"5\nhello\r\n0\r\n\r\n",
    "a bare CR behind the size": b"5\rhello\r\n0\r\n\r\n",
    "a bare LF behind the data": b"5\r\nhello\n0\r\n\r\n",
    "a bare CR behind the data": b"5\r\nhello\r0\r\n\r\n",
    "an extension that ends with a bare LF": b"5;a=b\nhello\r\n0\r\n\r\n",
    "an extension with a bare CR": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "an extension with a NUL": b"5;a=\x00\r\nhello\r\n0\r\n\r\n",
    "an extension of 20 kB": b"5;a=" + b"b" * 20_000 + b"\r\nhello\r\n0\r\n\r\n",
    "an extension without a name": b"5;\r\nhello\r\n0\r\n\r\n",
    "two semicolons": b"5;;\r\nhello\r\n0\r\n\r\n",
    "an extension whose name is no token": b"5;abc:=1\r\nhello\r\n0\r\n\r\n",
    "an extension with a value only": b"5; =x\r\nhello\r\n0\r\n\r\n",
    "an extension without its value": b"5;a=\r\nhello\r\n0\r\n\r\n",
    "an extension with a quote that does not end": b'5;a="b\r\nhello\r\n0\r\n\r\n',
    "an extension that goes on behind its quote": b'5;a="b"c\r\nhello\r\n0\r\n\r\n',
    "a malformed extension at the last chunk": b"5\r\nhello\r\n0;\r\n\r\n",
    "a last chunk that ends with a bare LF": b"5\r\nhello\r\n0\n\r\n",
    "a body that ends with a bare LF": b"5\r\nhello\r\n0\r\n\n",
    "a trailer without a colon": b"5\r\nhello\r\n0\r\nwhatever\r\n\r\n",
    "a trailer with a space in its name": b"5\r\nhello\r\n0\r\nA B: c\r\n\r\n",
    "a trailer with an empty name": b"5\r\nhello\r\n0\r\n: c\r\n\r\n",
    "a trailer with a NUL": b"5\r\nhello\r\n0\r\nA: \x00\r\n\r\n",
    "a folded trailer": b"5\r\nhello\r\n0\r\nA: b\r\n c\r\n\r\n",
    "a trailer with a bare LF": b"5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n",
    "trailers of 40 kB": b"5\r\nhello\r\n0\r\n" + b"A: " + b"b" * 40_000 + b"\r\n\r\n",
}

CUT = [
    Cut(f"a chunked body with {name}", chunked(body + SMUGGLED), statuses=(400, 413, 431))
    for name, body in _CHUNKS.items()
]
