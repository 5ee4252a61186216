"""An HTTPS double of a CA: it stands before Pebble, passes everything on, and does what Pebble cannot.

Each request is first shown to the `rules`, functions that may answer in Pebble's place, kill somebody, or
let it pass (None). It serves renewal information (RFC 9773), which Pebble 2.4 lacks, when `window` is set.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.e2e.certificates import Authority, server_context
from tests.e2e.pebble import Answer, Pebble, ask

PROBLEM = "application/problem+json"


@dataclass(frozen=True)
class Asked:
    """One request: `payload` is what its JWS holds."""

    method: str
    path: str
    payload: dict[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The endpoint, without what is behind it."""
        return self.path.split("/")[1]


Rule = Callable[[Asked], Answer | None]


class AcmeFront:
    """The double. `asked` is everything that came; `after` is told of each answer before it is sent."""

    def __init__(self, folder: Path, pebble: Pebble) -> None:
        authority = Authority()
        authority.issue("127.0.0.1").write(folder)
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(authority.pem)
        self.pebble = pebble
        self.asked: list[Asked] = []
        self.rules: list[Rule] = []
        self.after: list[Callable[[Asked], object]] = []
        self.window: tuple[str, str] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Requests)
        self._server.daemon_threads = True
        self._server.front = self  # type: ignore[attr-defined]
        self._server.socket = server_context(folder).wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def directory(self) -> str:
        """The address that `--acme-directory` wants."""
        return f"https://127.0.0.1:{self.port}/dir"

    def start(self) -> AcmeFront:
        """Begin to answer."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, what: str) -> int:
        """How many requests there were to an endpoint."""
        return sum(asked.what == what for asked in self.asked)

    def answer(self, asked: Asked, body: bytes, fields: dict[str, str]) -> Answer:
        """What a request gets."""
        self.asked.append(asked)
        for rule in self.rules:
            found = rule(asked)
            if found is not None:
                return found
        if asked.what == "renewal-info" and self.window is not None:
            window = {"start": self.window[0], "end": self.window[1]}
            said = {"suggestedWindow": window, "explanationURL": "https://ca.example/why"}
            return Answer(
                200, {"content-type": "application/json", "retry-after": "21600"}, json.dumps(said).encode()
            )
        found = ask(self.pebble.port, asked.method, asked.path, body, fields)
        if asked.what == "dir" and self.window is not None:
            listed = {**json.loads(found.body), "renewalInfo": f"https://127.0.0.1:{self.port}/renewal-info"}
            return Answer(200, {"content-type": "application/json"}, json.dumps(listed).encode())
        return found


def problem(status: int, kind: str, detail: str, **fields: str) -> Answer:
    """A problem document."""
    body = {"type": f"urn:ietf:params:acme:error:{kind}", "detail": detail, "status": status}
    return Answer(
        status,
        {"content-type": PROBLEM, **{name.replace("_", "-"): value for name, value in fields.items()}},
        json.dumps(body).encode(),
    )


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ssl.SSLError):
            pass  # the client was killed: that is what some tests do

    def _serve(self) -> None:
        front: AcmeFront = self.server.front  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        # The addresses that Pebble gives are made from Host: they lead back here.
        fields = {"Host": f"127.0.0.1:{front.port}"}
        if body:
            fields["Content-Type"] = self.headers["Content-Type"]
        asked = Asked(self.command, self.path, _payload(body))
        answer = front.answer(asked, body, fields)
        for told in front.after:
            told(asked)
        self.send_response(answer.status)
        for name, value in answer.fields.items():
            if name not in {"content-length", "transfer-encoding", "connection", "date", "server"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)


def _payload(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    text = json.loads(body).get("payload", "")
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    found = json.loads(decoded) if decoded else {}
    return found if isinstance(found, dict) else {}
