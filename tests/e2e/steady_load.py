"""Clients of every kind that ask all the time and write down each request that got no right answer.

They do what the protocols say and nothing more: after `Connection: close` or GOAWAY the next request goes on
another connection, and a WebSocket that was closed with 1001 is opened again. No request is sent a second
time: what is lost is counted.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import websockets.sync.client
from websockets.exceptions import ConnectionClosed

from tests.e2e.backends import Peer, ok
from tests.e2e.certificates import Authority, client_context, threaded_client_context
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Answer, Http2Client, fields_of
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import ProxyProcess, registration
from tests.e2e.waiting import PATIENCE, eventually

#: Pieces of a slow download, and the seconds between them.
PIECES, PAUSE = 12, 0.1
#: A body that is uploaded in pieces.
UPLOAD = b"u" * 60_000


def answers(peer: Peer) -> None:
    """What the backend says: slowly, where it is asked for /slow, and else how long the body was."""
    while True:
        request = peer.read_request()
        if request.path == b"/slow":
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % PIECES)
            for _ in range(PIECES):
                time.sleep(PAUSE)
                peer.send(b"s")
        else:
            peer.send(ok(b"%d" % len(request.body), request))


class SteadyLoad:
    """Threads of each kind of client against `proxy`, a TLS one, until the end of the `with`.

    `chat` is the service whose WebSockets echo.
    """

    def __init__(
        self,
        proxy: ProxyProcess,
        service: str,
        authority: Authority,
        chat: str,
        *,
        registers: bool = True,
    ) -> None:
        self.answered: Counter[str] = Counter()
        self.lost: list[str] = []
        self.registered: list[str] = []
        self._proxy, self._service, self._chat = proxy, service, chat
        self._tls = client_context(authority.pem, "http/1.1")
        self._http2_tls = client_context(authority.pem, "h2")
        self._chat_tls = threaded_client_context(authority.pem, "http/1.1")
        self._address = ("127.0.0.1", proxy.port)
        self._done = threading.Event()
        kinds: list[Callable[[], None]] = [
            self._fresh,
            self._kept,
            self._kept,
            self._uploads,
            self._downloads,
            self._downloads,
            self._http2,
            self._http2,
            self._chats,
            self._chats,
        ]
        self._kinds = {"fresh", "kept", "upload", "download", "h2", "chat"}
        if registers:
            kinds.append(self._registers)
            self._kinds.add("register")
        self._threads = [threading.Thread(target=self._until_done, args=(kind,)) for kind in kinds]

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    @property
    def sent(self) -> int:
        """How many requests have got an answer, or none."""
        return self.answered.total() + len(self.lost)

    def goes_on(self) -> None:
        """Wait until every kind of client has been answered again."""
        before = self.answered.copy()
        eventually(
            lambda: all(self.answered[kind] > before[kind] for kind in self._kinds), "everybody is served"
        )

    # Private

    def _until_done(self, kind: Callable[[], None]) -> None:
        while not self._done.is_set():
            try:
                kind()
            except (Closed, Truncated, OSError, ConnectionClosed, TimeoutError) as error:
                self.lost.append(f"{time.time():.3f} {kind.__name__} {error!r}")
            except AssertionError as error:
                self.lost.append(f"{time.time():.3f} {kind.__name__} {error}")

    def _connect(self) -> Http1Client:
        return Http1Client(self._address, tls=self._tls, sni=self._service)

    def _fresh(self) -> None:
        with self._connect() as client:
            response = client.ask(get(self._service, "/", "Connection: close"))
            assert (response.status, response.body) == (200, b"0"), response
        self.answered["fresh"] += 1

    def _kept(self) -> None:
        self._keep(get(self._service), "0", "kept", 0.01)

    def _uploads(self) -> None:
        self._keep(post(self._service, UPLOAD), str(len(UPLOAD)), "upload", 0.02)

    def _downloads(self) -> None:
        self._keep(get(self._service, "/slow"), "s" * PIECES, "download", 0.0)

    def _keep(self, request: bytes, body: str, kind: str, pause: float) -> None:
        with self._connect() as client:
            while not self._done.is_set():
                half = len(request) // 2
                client.send(request[:half])
                client.send(request[half:])
                response = client.read_response()
                assert (response.status, response.body.decode()) == (200, body), response
                self.answered[kind] += 1
                if b"close" in response.values(b"connection"):
                    return
                time.sleep(pause)

    def _http2(self) -> None:
        with Http2Client(self._address, self._http2_tls, self._service) as client:
            while not self._done.is_set() and client.goaway is None:
                stream = client.request(fields_of(self._service))
                answer = client.answers.setdefault(stream, Answer())
                while not answer.ended and answer.reset is None and not client.closed:
                    client.read()
                if not answer.ended and client.goaway is not None and stream > client.last_stream:
                    return  # said to be unprocessed: it may be sent again
                assert answer.ended, ("h2", answer.reset, client.goaway, client.last_stream, stream)
                assert (answer.status, bytes(answer.body)) == (200, b"0")
                self.answered["h2"] += 1
                time.sleep(0.01)

    def _chats(self) -> None:
        raw = socket.create_connection(self._address, timeout=PATIENCE)
        with websockets.sync.client.connect(
            f"wss://{self._chat}:{self._proxy.port}/",
            sock=raw,
            ssl=self._chat_tls,
            open_timeout=PATIENCE,
            close_timeout=5,
        ) as client:
            while not self._done.is_set():
                try:
                    client.send("hello")
                    said = client.recv(timeout=PATIENCE)
                except ConnectionClosed as error:
                    if error.rcvd is None or error.rcvd.code != 1001:
                        raise
                    return
                assert said == "hello"
                self.answered["chat"] += 1
                time.sleep(0.02)

    def _registers(self) -> None:
        name = f"r{len(self.registered)}.{self._service}"
        answer = self._proxy.call("POST", "/register", registration(name, "127.0.0.1", 9))
        assert answer.status == 200, answer
        self.registered.append(name)
        self.answered["register"] += 1
        time.sleep(0.05)
