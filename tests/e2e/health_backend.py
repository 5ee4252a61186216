"""Backends with a health path, as threads and as processes that can be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any, Final

from tests.e2e.backends import Peer, ok
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually

#: Times of probes that are fast, and a time-out that a busy machine does not meet.
QUICK: Final = "[timeouts]\ndrain = 2\nshutdown = 2\n[health]\ninterval = 0.2\ntimeout = 20\n"
#: The same for those whose probes are to time out.
IMPATIENT: Final = "[timeouts]\ndrain = 2\nshutdown = 2\n[health]\ninterval = 0.2\ntimeout = 0.5\n"

_SERVER: Final = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Patient:
    """A script whose health path answers `status`; everything else is answered with `serves` and its name."""

    def __init__(self, name: str = "served") -> None:
        self.status = 200
        self.serves = 200
        self.probes = 0
        self.served = 0
        self._name = name.encode()
        self._lock = threading.Lock()

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.path == b"/up":
                peer.send(b"HTTP/1.1 %d Odd\r\nContent-Length: 0\r\n\r\n" % self.status)
                with self._lock:
                    self.probes += 1
            else:
                with self._lock:
                    self.served += 1
                peer.send(ok(self._name, request).replace(b"200", b"%d" % self.serves, 1))


class BackendProcess:
    """A backend in a process of its own, which can be stopped and goes on later."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        """It takes connections from now on, and does not answer."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """It answers again."""
        os.kill(self._process.pid, signal.SIGCONT)

    def __enter__(self) -> BackendProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)


def backends_of(proxy: ProxyProcess, service: str) -> list[dict[str, Any]]:
    """What GET /backends says of a service."""
    found: list[dict[str, Any]]
    [found] = [
        each["backends"]
        for each in proxy.call("GET", "/backends").json["services"]
        if each["service_name"] == service
    ]
    return found


def backend_of(proxy: ProxyProcess, service: str, port: int) -> dict[str, Any]:
    """What GET /backends says of one backend."""
    [found] = [each for each in backends_of(proxy, service) if each["port"] == port]
    return found


def until_state(proxy: ProxyProcess, service: str, port: int, state: str) -> dict[str, Any]:
    """Wait until a backend is in that state; what GET /backends says of it then."""

    def look() -> dict[str, Any] | None:
        found = backend_of(proxy, service, port)
        return found if found["state"] == state else None

    found = eventually(look, f"{service}:{port} is {state}")
    assert found is not None
    return found
