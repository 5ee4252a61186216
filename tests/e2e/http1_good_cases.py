"""The table of odd but good HTTP/1.1 requests: `{host}` stands for the service's name."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.e2e.http1_cases import SMUGGLED, chunked, get_lines, post_lines


@dataclass(frozen=True)
class Passed:
    """A request that is fine: the backend receives exactly this, and the connection lives on if `keeps`."""

    name: str
    raw: bytes
    method: bytes = b"GET"
    path: bytes = b"/"
    body: bytes = b""
    present: tuple[tuple[bytes, bytes], ...] = ()
    absent: tuple[bytes, ...] = ()
    keeps: bool = True
    also: tuple[bytes, ...] = field(default=())  # paths of the requests pipelined behind it


_HELLO = b"5\r\nhello\r\n0\r\n\r\n"

PASSED = [
    Passed("an ordinary GET", get_lines()),
    Passed("an ordinary POST", post_lines(b"Content-Length: 5", body=b"hello"), b"POST", body=b"hello"),
    Passed("a POST without a body", post_lines(b"Content-Length: 0"), b"POST"),
    Passed("a POST without a length", post_lines(), b"POST"),
    Passed(
        "white space before Content-Length",
        post_lines(b"Content-Length: \t 5", body=b"hello"),
        b"POST",
        body=b"hello",
        present=((b"content-length", b"5"),),
    ),
    *(
        Passed(
            f"{name} behind Content-Length",  # RFC 9110, 5.5: no part of the value, and it does not go on
            post_lines(b"Content-Length: 5" + space, body=b"hello"),
            b"POST",
            body=b"hello",
            present=((b"content-length", b"5"),),
        )
        for name, space in {"a space": b" ", "a tab": b"\t", "white space": b" \t "}.items()
    ),
    Passed(
        "zeros before Content-Length",
        post_lines(b"Content-Length: 0005", body=b"hello"),
        b"POST",
        body=b"hello",
        present=((b"content-length", b"5"),),
    ),
    Passed(
        "nothing but zeros in Content-Length",
        post_lines(b"Content-Length: 000"),
        b"POST",
        present=((b"content-length", b"0"),),
    ),
    Passed(
        "a body that looks like a request",
        post_lines(
            b"Content-Length: %d" % len(SMUGGLED.replace(b"{host}", b"h")),
            body=SMUGGLED.replace(b"{host}", b"h"),
        ),
        b"POST",
        body=SMUGGLED.replace(b"{host}", b"h"),
    ),
    Passed("a GET with a body", get_lines(b"GET / HTTP/1.1", b"Content-Length: 5") + b"hello", body=b"hello"),
    Passed("a chunked body", chunked(_HELLO), b"POST", body=b"hello"),
    Passed(
        "Transfer-Encoding in capitals",
        post_lines(b"TRANSFER-ENCODING: CHUNKED", body=_HELLO),
        b"POST",
        body=b"hello",
    ),
    Passed(
        "Transfer-Encoding with a tab",
        post_lines(b"Transfer-Encoding:\tchunked", body=_HELLO),
        b"POST",
        body=b"hello",
    ),
    *(
        Passed(
            f"{name} behind Transfer-Encoding",
            post_lines(b"Transfer-Encoding: chunked" + space, body=_HELLO),
            b"POST",
            body=b"hello",
            present=((b"transfer-encoding", b"chunked"),),
        )
        for name, space in {"a space": b" ", "a tab": b"\t"}.items()
    ),
    Passed(
        "many chunks", chunked(b"1\r\nh\r\n2\r\nel\r\n00002\r\nlo\r\n000\r\n\r\n"), b"POST", body=b"hello"
    ),
    Passed("a chunk size in capitals", chunked(b"A\r\nhellohello\r\n0\r\n\r\n"), b"POST", body=b"hellohello"),
    Passed(
        "chunk extensions",
        chunked(b'5;a=b;c="d";e\r\nhello\r\n0;f\r\n\r\n'),
        b"POST",
        body=b"hello",
    ),
    Passed(
        "chunk extensions with white space that RFC 9112, 7.1.1 allows",
        chunked(b'5 ;\ta = "b;\\"c" ; d\r\nhello\r\n0 ; e\r\n\r\n'),
        b"POST",
        body=b"hello",
    ),
    Passed(
        "chunks that look like chunks",
        chunked(b"5\r\n0\r\n\r\n\r\n0\r\n\r\n"),
        b"POST",
        body=b"0\r\n\r\n",
    ),
    Passed(
        "trailers that are never merged",
        chunked(b"5\r\nhello\r\n0\r\nX-Checksum: 1\r\n\r\n"),
        b"POST",
        body=b"hello",
        absent=(b"x-checksum",),
    ),
    Passed(
        "trailers that would frame, route or authenticate",
        chunked(
            b"5\r\nhello\r\n0\r\nContent-Length: 50\r\nHost: other.e2e.test\r\nTransfer-Encoding: gzip\r\n"
            b"Authorization: x\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: close\r\n\r\n"
        ),
        b"POST",
        body=b"hello",
        absent=(b"content-length", b"authorization", b"connection"),
    ),
    Passed("the name of the host in capitals", get_lines(host=b"HOST: {HOST}\r\n")),
    Passed(
        "a port behind the host",
        get_lines(host=b"Host: {host}:8443\r\n"),
        present=((b"host", b"{host}:8443"),),
    ),
    Passed("a dot behind the host", get_lines(host=b"Host: {host}.\r\n"), present=((b"host", b"{host}."),)),
    Passed(
        "white space around the host",
        get_lines(host=b"Host: \t{host}\t\r\n"),
        present=((b"host", b"{host}"),),
    ),
    Passed(
        "Host behind other fields",
        b"GET / HTTP/1.1\r\nA: b\r\nHost: {host}\r\n\r\n",
        present=((b"a", b"b"), (b"host", b"{host}")),
    ),
    Passed("absolute-form", get_lines(b"GET http://{host}/a?b HTTP/1.1"), path=b"/a?b"),
    Passed("absolute-form without a path", get_lines(b"GET http://{host} HTTP/1.1")),
    Passed("absolute-form with a query only", get_lines(b"GET http://{host}?a HTTP/1.1"), path=b"/?a"),
    Passed("absolute-form in capitals", get_lines(b"GET HTTP://{HOST}/ HTTP/1.1")),
    Passed("absolute-form of OPTIONS *", get_lines(b"OPTIONS http://{host} HTTP/1.1"), b"OPTIONS", b"*"),
    Passed("OPTIONS *", get_lines(b"OPTIONS * HTTP/1.1"), b"OPTIONS", b"*"),
    Passed("OPTIONS with a path", get_lines(b"OPTIONS /x HTTP/1.1"), b"OPTIONS", b"/x"),
    Passed(
        "a path that looks like a URL",
        get_lines(b"GET //other.e2e.test/x HTTP/1.1"),
        path=b"//other.e2e.test/x",
    ),
    Passed(
        "a URL in the path",
        get_lines(b"GET /http://other.e2e.test/ HTTP/1.1"),
        path=b"/http://other.e2e.test/",
    ),
    Passed("a path with dots", get_lines(b"GET /a/../../b HTTP/1.1"), path=b"/a/../../b"),
    Passed(
        "a path with encoded line ends",
        get_lines(b"GET /%0d%0aX:%20y HTTP/1.1"),
        path=b"/%0d%0aX:%20y",
    ),
    Passed("the other known methods", get_lines(b"PATCH /x HTTP/1.1"), b"PATCH", b"/x"),
    Passed("a method in lower case, which is another one", get_lines(b"get / HTTP/1.1"), b"get"),
    Passed("a method that nobody knows", get_lines(b"M-SEARCH! / HTTP/1.1"), b"M-SEARCH!"),
    Passed("empty lines before the request", b"\r\n" + get_lines()),
    Passed(
        "obsolete but allowed bytes in a value",
        get_lines(b"GET / HTTP/1.1", b"A: \xe9\xff \t b"),
        present=((b"a", b"\xe9\xff \t b"),),
    ),
    Passed("an empty value", get_lines(b"GET / HTTP/1.1", b"A:"), present=((b"a", b""),)),
    Passed(
        "the same field twice",
        get_lines(b"GET / HTTP/1.1", b"A: 1", b"B: 2", b"A: 3"),
        present=((b"a", b"1"), (b"b", b"2"), (b"a", b"3")),
    ),
    Passed("every character of a token in a name", get_lines(b"GET / HTTP/1.1", b"!#$%&'*+.^`|~0Az-: b")),
    Passed("99 fields", get_lines(b"GET / HTTP/1.1", *(b"A%d: b" % i for i in range(98)))),
    Passed("a long path", get_lines(b"GET /" + b"a" * 8000 + b" HTTP/1.1"), path=b"/" + b"a" * 8000),
    Passed(
        "Content_Length with an underscore",
        post_lines(b"Content_Length: 40"),
        b"POST",
        absent=(b"content_length", b"content-length"),
    ),
    Passed(
        "Transfer_Encoding with an underscore",
        post_lines(b"Transfer_Encoding: chunked", b"Content-Length: 5", body=b"hello"),
        b"POST",
        body=b"hello",
        absent=(b"transfer_encoding", b"transfer-encoding"),
    ),
    Passed(
        "Connection names a field",
        get_lines(b"GET / HTTP/1.1", b"Connection: X-Foo", b"X-Foo: 1", b"X-Bar: 2"),
        present=((b"x-bar", b"2"),),
        absent=(b"x-foo", b"connection"),
    ),
    Passed(
        "Connection: close, and a field",
        get_lines(b"GET / HTTP/1.1", b"Connection: close, X-Foo", b"X-Foo: 1"),
        absent=(b"x-foo",),
        keeps=False,
    ),
    Passed(
        "Connection names Host",
        get_lines(b"GET / HTTP/1.1", b"Connection: Host"),
        present=((b"host", b"{host}"),),
    ),
    Passed(
        "Connection names Content-Length",
        post_lines(b"Connection: Content-Length", b"Content-Length: 5", body=b"hello"),
        b"POST",
        body=b"hello",
    ),
    Passed(
        "Connection names Transfer-Encoding",
        post_lines(b"Connection: Transfer-Encoding", b"Transfer-Encoding: chunked", body=_HELLO),
        b"POST",
        body=b"hello",
    ),
    Passed(
        "Connection names X-Forwarded-For",
        get_lines(b"GET / HTTP/1.1", b"Connection: X-Forwarded-For, X-Request-ID"),
        present=((b"x-forwarded-for", b"127.0.0.1"),),
    ),
    Passed(
        "hop-by-hop fields",
        get_lines(
            b"GET / HTTP/1.1",
            b"Keep-Alive: timeout=5",
            b"Proxy-Connection: keep-alive",
            b"Proxy-Authorization: x",
            b"TE: gzip",
            b"Connection: keep-alive",
        ),
        absent=(b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te"),
    ),
    Passed(
        "an upgrade to h2c",
        get_lines(
            b"GET / HTTP/1.1",
            b"Connection: Upgrade, HTTP2-Settings",
            b"Upgrade: h2c",
            b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        ),
        absent=(b"upgrade", b"http2-settings"),
    ),
    Passed(
        "Upgrade without Connection",
        get_lines(b"GET / HTTP/1.1", b"Upgrade: websocket"),
        absent=(b"upgrade",),
    ),
    Passed(
        "an upgrade with a body",
        post_lines(b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: 5", body=b"hello"),
        b"POST",
        body=b"hello",
        absent=(b"upgrade",),
    ),
    Passed(
        "an unknown expectation",
        get_lines(b"GET / HTTP/1.1", b"Expect: the-unexpected"),
        present=((b"expect", b"the-unexpected"),),
    ),
    Passed(
        "100-continue without a body",
        get_lines(b"GET / HTTP/1.1", b"Expect: 100-continue"),
        absent=(b"expect",),
    ),
    *(  # RFC 9110, 2.5
        Passed(f"HTTP/1.{minor}", get_lines(b"GET / HTTP/1.%d" % minor), present=((b"host", b"{host}"),))
        for minor in (2, 9)
    ),
    Passed("HTTP/1.0", get_lines(b"GET / HTTP/1.0"), keeps=False),
    Passed("HTTP/1.0 with keep-alive", get_lines(b"GET / HTTP/1.0", b"Connection: keep-alive")),
    Passed(
        "a request behind an empty chunked body",
        chunked(b"0\r\n\r\n") + get_lines(b"GET /next HTTP/1.1"),
        b"POST",
        also=(b"/next",),
    ),
    Passed(
        "a request behind a body",
        post_lines(b"Content-Length: 5", body=b"hello") + get_lines(b"GET /next HTTP/1.1"),
        b"POST",
        body=b"hello",
        also=(b"/next",),
    ),
    Passed(
        "a request behind a body and an empty line",
        post_lines(b"Content-Length: 5", body=b"hello\r\n") + get_lines(b"GET /next HTTP/1.1"),
        b"POST",
        body=b"hello",
        also=(b"/next",),
    ),
    Passed(
        "a request behind a body without a length",
        post_lines() + get_lines(b"GET /next HTTP/1.1"),
        b"POST",
        also=(b"/next",),
    ),
]
