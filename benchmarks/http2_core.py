"""µs of CPU that the HTTP/2 core takes for one small request and its response, without sockets and TLS.

    python benchmarks/http2_core.py

A batch is what one read brings: 16 requests of 16 streams; the responses go out as one write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from portero_py.wire.http2.frames import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    frame_header,
    settings_frame,
    window_frame,
)
from portero_py.wire.http2.heads import HeadLimits
from portero_py.wire.http2.hpack import HeaderEncoder, HeaderList
from portero_py.wire.http2.server import ServerConnection
from portero_py.wire.http2.server_stream import ServerStream
from portero_py.wire.message import RequestHead, ResponseHead

STREAMS = 16
BATCHES = 1000
ROUNDS = 7


class Answering(ServerStream):
    """Answers every request at once."""

    body = b"hello, world\n"
    fields: Callable[[], list[tuple[bytes, bytes]]]

    def on_head(self, head: RequestHead) -> None:
        self.send_response(ResponseHead(200, b"OK", type(self).fields(), len(self.body)), self.body)


def batches(path: Callable[[int], bytes]) -> Iterator[bytes]:
    encoder = HeaderEncoder()
    yield PREFACE + settings_frame(()) + window_frame(0, 2**30)
    for batch in range(BATCHES):
        frames = []
        for place in range(STREAMS):
            number = batch * STREAMS + place
            request: HeaderList = [
                (b":method", b"GET", False),
                (b":scheme", b"https", False),
                (b":authority", b"app.example.com", False),
                (b":path", path(number), False),
                (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/128.0", False),
                (b"accept", b"text/html,application/xhtml+xml,*/*;q=0.8", False),
                (b"accept-encoding", b"gzip, deflate, br, zstd", False),
            ]
            block = encoder.encode(request)
            frames += [
                frame_header(len(block), HEADERS, END_HEADERS | END_STREAM, 2 * number + 1),
                block,
            ]
        yield b"".join(frames)


def measure(name: str, path: Callable[[int], bytes], fields: Callable[[], list[tuple[bytes, bytes]]]) -> None:
    Answering.fields = staticmethod(fields)
    reads = list(batches(path))
    best = float("inf")
    for _ in range(ROUNDS):
        connection = ServerConnection(lambda: None, Answering, HeadLimits(8192, 32768, 100), 128)
        started = time.process_time()
        for read in reads:
            connection.receive(read, 1.0)
            connection.output.take()
        best = min(best, time.process_time() - started)
        assert connection.last_stream == 2 * STREAMS * BATCHES - 1
        assert not connection.finished
    print(f"{name:50} {best / STREAMS / BATCHES * 1e6:5.2f} µs a request")


FIELDS = [
    (b"Content-Type", b"text/plain"),
    (b"Content-Length", b"13"),
    (b"Date", b"Fri, 20 Nov 2026 19:00:00 GMT"),
    (b"Server", b"backend"),
]


def main() -> None:
    numbers = iter(range(10**9))
    measure("the same request, the same response", lambda _: b"/small", lambda: FIELDS)
    measure("the same request, equal responses", lambda _: b"/small", lambda: [(n, v) for n, v in FIELDS])
    measure("200 paths, the same response", lambda number: b"/items/%d" % (number % 200), lambda: FIELDS)
    measure(
        "every path and response its own",
        lambda number: b"/items/%d" % number,
        lambda: [*FIELDS, (b"ETag", b'"%d"' % next(numbers))],
    )


if __name__ == "__main__":
    main()
