"""What hostile backends answer: heads that are none, and bodies that break."""

from __future__ import annotations

OK = b"HTTP/1.1 200 OK\r\n"


#: Answers without a usable head.
BAD_HEADS = {
    "garbage": b"\x00\x01\x02garbage\r\n\r\n",
    "a line of text": b"hello there\r\n\r\n",
    "a TLS alert": bytes.fromhex("15030100020228"),
    "HTTP/2 frames": bytes.fromhex("000000040000000000"),
    "an HTTP/0.9 answer": b"<html>hello</html>\r\n\r\n",
    "a status line with HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "a status line with HTTP/1.10": b"HTTP/1.10 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "a status line with ICY": b"ICY 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "a status of two digits": b"HTTP/1.1 99 No\r\nContent-Length: 2\r\n\r\nok",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
    "a status of 000": b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nok",
    "a status in letters": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\nok",
    "no status": b"HTTP/1.1\r\nContent-Length: 2\r\n\r\nok",
    "two spaces before the status": b"HTTP/1.1  200 OK\r\nContent-Length: 2\r\n\r\nok",
    "a NUL in the reason": b"HTTP/1.1 200 O\x00K\r\nContent-Length: 2\r\n\r\nok",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "a bare CR in a value": OK + b"A: b\rC: d\r\nContent-Length: 2\r\n\r\nok",
    "a bare LF in a value": OK + b"A: b\nC: d\r\nContent-Length: 2\r\n\r\nok",
    "a NUL in a value": OK + b"A: b\x00\r\nContent-Length: 2\r\n\r\nok",
    "a folded line": OK + b"A: b\r\n c\r\nContent-Length: 2\r\n\r\nok",
    "a space in a name": OK + b"A B: c\r\nContent-Length: 2\r\n\r\nok",
    "a space behind a name": OK + b"Content-Length : 2\r\n\r\nok",
    "an empty name": OK + b": c\r\nContent-Length: 2\r\n\r\nok",
    "a line without a colon": OK + b"whatever\r\nContent-Length: 2\r\n\r\nok",
    "white space before the first field": OK + b" Content-Length: 2\r\n\r\nok",
    "Content-Length twice, different": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "a list of different Content-Lengths": OK + b"Content-Length: 2, 3\r\n\r\nok",
    "a Content-Length with white space inside": OK + b"Content-Length: 2 2\r\n\r\nok",
    "a Content-Length before a vertical tab": OK + b"Content-Length: 2\x0b\r\n\r\nok",
    "Content-Length with a sign": OK + b"Content-Length: +2\r\n\r\nok",
    "a negative Content-Length": OK + b"Content-Length: -1\r\n\r\n",
    "an empty Content-Length": OK + b"Content-Length:\r\n\r\nok",
    "a hexadecimal Content-Length": OK + b"Content-Length: 0x2\r\n\r\nok",
    "a Content-Length over 64 bits": OK + b"Content-Length: 18446744073709551618\r\n\r\nok",
    "Content-Length and Transfer-Encoding": OK
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "Transfer-Encoding twice": OK
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "an unknown Transfer-Encoding": OK + b"Transfer-Encoding: xchunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked, identity": OK + b"Transfer-Encoding: chunked, identity\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "Transfer-Encoding in HTTP/1.0": b"HTTP/1.0 200 OK\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a chunked coding before a vertical tab": OK
    + b"Transfer-Encoding: chunked\x0b\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a switch to nothing": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\nraw bytes",
    "a switch that nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nraw bytes",
    "a header bomb": OK + b"A: " + b"b" * 200_000 + b"\r\nContent-Length: 2\r\n\r\nok",
    "a head without an end": OK + b"A: b\r\n" * 50_000,
    "ten thousand fields": OK
    + b"".join(b"A%d: b\r\n" % i for i in range(10_000))
    + b"Content-Length: 2\r\n\r\nok",
    "ten thousand informational responses": b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000,
    "nothing": b"",
    "half a status line": b"HTTP/1.1 20",
    "half a head": OK + b"Content-Le",
}


#: Answers whose head is good and whose body is not.
BAD_BODIES = {
    "a body that is too short": OK + b"Content-Length: 10\r\n\r\nhello",
    "no body though one was promised": OK + b"Content-Length: 10\r\n\r\n",
    "no chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n",
    "half a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\na\r\nhello",
    "no last chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "no end of the trailers": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    "a chunk size that is no number": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nxyz\r\n\r\n",
    "a chunk size over 64 bits": OK
    + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nFFFFFFFFFFFFFFFFF\r\n",
    "a chunk extension without a name": OK + b"Transfer-Encoding: chunked\r\n\r\n5;\r\nhello\r\n0\r\n\r\n",
    "a chunk extension that is none": OK + b"Transfer-Encoding: chunked\r\n\r\n5;a:=1\r\nhello\r\n0\r\n\r\n",
    "a negative chunk size": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n-1\r\n",
    "no CRLF behind a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello0\r\n\r\n",
    "chunks with bare line feeds": OK + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\n",
    "an endless chunk extension": OK + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"a" * 100_000,
    "a bad trailer": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA B: c\r\n\r\n",
    "endless trailers": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n" + b"A: b\r\n" * 50_000,
}


#: Odd but good answers, whose length is 2 and whose body is b"ok".
GOOD_ANSWERS = {
    "Content-Length twice, the same": OK + b"Content-Length: 2\r\nA: b\r\nContent-Length: 2\r\n\r\nok",
    "a list of equal Content-Lengths": OK + b"Content-Length: 2, 2\r\n\r\nok",
    "a space behind Content-Length": OK + b"Content-Length: 2 \r\n\r\nok",
    "a tab behind Content-Length": OK + b"content-length:\t2\t\r\n\r\nok",
    "zeros before Content-Length": OK + b"Content-Length: 002\r\n\r\nok",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "a status of 600": b"HTTP/1.1 600 Own\r\nContent-Length: 2\r\n\r\nok",
    "a status of 999": b"HTTP/1.1 999 Request denied\r\nContent-Length: 2\r\n\r\nok",
}
