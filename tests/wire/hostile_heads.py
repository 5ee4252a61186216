"""Heads as hostile peers send them: seeded, mostly almost right, so that they get far into a parser."""

from __future__ import annotations

from random import Random

#: Lines that frame a message, route it or say what becomes of its connection; and some that do nothing.
_LINES = [
    b"Content-Length: %d",
    b"Content-Length: %d\r\nContent-Length: %d",
    b"content-length: 5, 5",
    b"Content-Length: 007 ",
    b"Content-Length:\t70000\t",
    b"Content-Length: 2 2",
    b"Content-Length: 999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked ",
    b"Transfer-Encoding: gzip, chunked",
    b"transfer-encoding: identity",
    b"Connection: close",
    b"Connection: keep-alive",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c",
    b"Connection: X-Number, Date, content-length",
    b"Upgrade: websocket",
    b"Keep-Alive: timeout=5",
    b"Trailer: X-Sum",
    b"TE: trailers",
    b"Expect: 100-continue",
    b"X-Number: 7",
    b"X-Folded: a\r\n b",
    b"X-Bare: a\nContent-Length: 3",
    b"X-Bare: a\rContent-Length: 3",
    b"X-Nul: \x00",
    b"X-Space : y",
    b"X-Forwarded-For: 192.0.2.1",
    b"Date: Thu, 01 Jan 1970 00:00:00 GMT",
    b"Set-Cookie: a=b; Path=/",
    b"NoColon",
    b": nameless",
    b"X-Trailing: y \t",
    b"X-Empty:",
]
_VERSIONS = [b"1.1"] * 8 + [b"1.0", b"1.0", b"1.2", b"1.9", b"2.0", b"9.9", b"0.9", b"1.10"]
_METHODS = [b"GET", b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT", b"PRI", b"M-SEARCH", b"get"]
_NOISE = [b"\x00", b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"\xff", b"0", b"X", b"\r\n\r\n"]


def response_head(random: Random) -> bytes:
    """A head up to its first empty line. Half of them have a status below 200."""
    status = random.choice(
        [random.randint(100, 199), random.choice([200, 204, 304, random.randint(100, 999)])]
    )
    line = b"HTTP/%b %d%b" % (random.choice(_VERSIONS), status, random.choice([b" OK", b" ", b"", b" N\xf6"]))
    return _finished(random, [line, *_lines(random)])


def request_head(random: Random, host: bytes) -> bytes:
    """A head up to its first empty line, for `host` if for any."""
    target = random.choice([b"/", b"/", b"/a?b", b"*", b"http://%b/" % host, b"%b:443" % host, b"/\x7f"])
    line = b"%b %b HTTP/%b" % (random.choice(_METHODS), target, random.choice(_VERSIONS))
    lines = _lines(random)
    for _ in range(random.choice([0, 1, 1, 1, 1, 1, 1, 2])):
        lines.insert(random.choice([0, 0, len(lines)]), b"Host: %b" % host)
    return _finished(random, [line, *lines])


def _lines(random: Random) -> list[bytes]:
    lines = [random.choice(_LINES) for _ in range(random.choice([0, 1, 1, 2, 2, 3, 5]))]
    return [line.replace(b"%d", b"%d" % random.choice([0, 1, 5, 40, 200, 70_000])) for line in lines]


def _finished(random: Random, lines: list[bytes]) -> bytes:
    raw = b"\r\n".join(lines)
    place = random.randrange(len(raw))
    damage = random.randrange(12)
    if damage == 0:
        raw = raw[:place]
    elif damage == 1:
        raw = raw[:place] + raw[place + 1 :]
    elif damage == 2:
        raw = raw[:place] + random.choice(_NOISE) + raw[place:]
    return raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
