"""What the files of examples/migrating need to run on loopback: backends that say who they are, certificates,
and ours or the original before them.

A file is started as it is, but for addresses and paths: each of them is replaced by one of the test's, and
must be there as often as the test knows of.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.e2e.backends import Peer, RecordingBackend, Script
from tests.e2e.certificates import Authority, client_context
from tests.e2e.http1_client import Http1Client
from tests.e2e.messages import Response
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually

EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "migrating"

#: Who may come in where a password is asked for.
ANNA: Final = ("Authorization", f"Basic {base64.b64encode(b'anna:open sesame').decode()}")
EVE: Final = ("Authorization", f"Basic {base64.b64encode(b'anna:open says me').decode()}")

#: Two clients.
HERE: Final = "127.0.0.1"
ELSEWHERE: Final = "127.0.0.2"

#: Addresses that an example must not be left with.
_FOREIGN: Final = re.compile(r"\b(?:10\.0|192\.168)\.[0-9.]+:[0-9]+|\b0\.0\.0\.0:[0-9]+")

Fields = Sequence[tuple[str, str]]


def example(name: str, replaced: Mapping[str, str]) -> str:
    """The text of a file, with everything replaced that ties it to a machine."""
    text = (EXAMPLES / name).read_text()
    for old, new in replaced.items():
        assert old in text, f"{name} has no {old}"
        text = text.replace(old, new)
    return text


def foreign(text: str) -> list[str]:
    """What would reach beyond this machine's loopback, comments aside."""
    return [found for line in text.splitlines() for found in _FOREIGN.findall(line.partition("#")[0])]


class Answering:
    """A backend's script: 200 and who it is, with what it got, as JSON; 503 while it is not well."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_well = True
        self.hold: threading.Event | None = None  # an answer waits for it

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if self.hold is not None:
                self.hold.wait(60)
            fields = {name.decode(): value.decode() for name, value in request.fields}
            said = {"backend": self.name, "target": request.path.decode(), "fields": fields}
            body = json.dumps(said).encode()
            peer.send(
                b"HTTP/1.1 %s\r\nContent-Length: %d\r\nServer: a secret\r\nX-Powered-By: elephants\r\n\r\n%b"
                % (b"200 OK" if self.is_well else b"503 Not Well", len(body), body)
            )


def asked_for_a_pass(peer: Peer) -> None:
    """The script of a server that is asked about each request: whoever has the pass is Anna."""
    while True:
        request = peer.read_request()
        if request.values(b"x-pass") == [b"good"]:
            peer.send(b"HTTP/1.1 204 No Content\r\nX-User: anna\r\n\r\n")
        else:
            peer.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")


class Stage:
    """Backends by name, and certificates for `names` where it has any; `close` at the end."""

    def __init__(
        self, folder: Path, authority: Authority, *names: str, has_certificates: bool = True
    ) -> None:
        self.folder = folder
        self.certificates = folder / "certificates"
        self.tls = client_context(authority.pem, "http/1.1")
        self.scripts: dict[str, Answering] = {}
        self.backends: dict[str, RecordingBackend] = {}
        self.pair = authority.issue(*names)
        self.certificates.mkdir(parents=True)
        for name in names if has_certificates else ():
            self.pair.write(self.certificates / name.replace("*", "_wildcard"))

    def backend(self, name: str, tls: ssl.SSLContext | None = None) -> str:
        """Start one; its address."""
        script = self.scripts[name] = Answering(name)
        return self.peer(name, script, tls)

    def peer(self, name: str, script: Script, tls: ssl.SSLContext | None = None) -> str:
        """Start something that plays another script; its address."""
        backend = self.backends[name] = RecordingBackend(script, tls=tls)
        return f"127.0.0.1:{backend.port}"

    def close(self) -> None:
        """End them all, and raise what they found wrong."""
        for script in self.scripts.values():
            if script.hold is not None:
                script.hold.set()
        for backend in self.backends.values():
            backend.close()


@dataclass(frozen=True)
class Front:
    """Who answers the clients: `port` speaks TLS, `plain_port` sends them there."""

    port: int
    plain_port: int
    tls: ssl.SSLContext

    def ask(
        self,
        host: str,
        target: str = "/",
        *,
        method: str = "GET",
        fields: Fields = (),
        source: str = HERE,
        sni: str = "",
    ) -> Response:
        """One request without a body over a TLS connection of its own, from the address `source`."""
        with Http1Client((HERE, self.port), tls=self.tls, sni=sni or host, source=source) as client:
            return client.ask(_request(method, host, target, fields), method.encode())

    def ask_plainly(self, host: str, target: str = "/") -> Response:
        """One request at port 80."""
        with Http1Client((HERE, self.plain_port)) as client:
            return client.ask(_request("GET", host, target, ()))

    def location(self, response: Response) -> str:
        """Where it sends the client, as if it listened at port 443."""
        return response.value(b"location").decode().replace(f":{self.port}/", "/")

    def served_before_refusal(self, host: str, target: str, status: int = 429) -> int:
        """How many requests get through before one is refused."""
        for served in range(400):
            answer = self.ask(host, target)
            if answer.status == status:
                return served
            assert answer.status == 200, answer
        raise AssertionError("400 requests got through")


def said(response: Response) -> dict[str, Any]:
    """What the backend said of itself and of the request."""
    assert response.status == 200, (response.status, response.body)
    found: dict[str, Any] = json.loads(response.body)
    return found


@contextlib.contextmanager
def portero(stage: Stage, toml: str, *flags: str) -> Iterator[tuple[Front, ProxyProcess]]:
    """portero-py with a file of the examples. Its ACME finds nobody unless `flags` say where to look."""
    assert not foreign(toml), foreign(toml)
    plain_port = free_port()
    nowhere = ("--acme-directory", f"https://127.0.0.1:{free_port()}/dir")
    proxy = ProxyProcess(
        stage.folder / "portero",
        certificates=stage.certificates,
        toml=toml,
        flags=(
            *("--http-addr", f"127.0.0.1:{plain_port}"),
            *("--state-dir", str(stage.folder / "state")),
            *(() if nowhere[0] in flags else nowhere),
            *flags,
        ),
    ).start()
    try:
        yield Front(proxy.port, plain_port, stage.tls), proxy
        proxy.stop()
    finally:
        if proxy.is_running:
            proxy.kill()


@contextlib.contextmanager
def original(
    stage: Stage, name: str, text: str, ports: tuple[int, int], command: Sequence[str], check: Sequence[str]
) -> Iterator[Front]:
    """Another proxy with its own file `name`, which `command` runs and `check` has examined before."""
    assert not foreign(text), foreign(text)
    (stage.folder / name).write_text(text)
    examined = subprocess.run(check, capture_output=True, timeout=60, check=False)
    assert examined.returncode == 0, examined.stderr.decode()
    log = stage.folder / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    front = Front(*ports, stage.tls)
    try:
        eventually(lambda: _listens(ports[0]) and _listens(ports[1]), f"{command[0]} listens")
        yield front
    finally:
        process.terminate()
        process.wait(60)


# Private


def _request(method: str, host: str, target: str, fields: Fields) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", ""]).encode()


def _listens(port: int) -> bool:
    try:
        Http1Client((HERE, port)).close()
    except ConnectionRefusedError:
        return False
    return True
