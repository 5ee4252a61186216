"""The real proxy in a process of its own, on free loopback ports, with its logs kept and judged."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt

from tests.e2e.backends import RecordingBackend
from tests.e2e.http1_client import Http1Client
from tests.e2e.waiting import PATIENCE, eventually

SECRET = "the-register-secret-of-the-suite"
KEY = "the-hmac-key-of-the-suite-which-is-long-enough"

#: Words that a log never holds unless portero-py has a fault.
FAULTS = (
    "Traceback",
    "Task was destroyed",
    "never retrieved",
    "never awaited",
    "Exception in callback",
    "Fatal error",
    "Unhandled",
    "AssertionError",
    "ResourceWarning",
    SECRET,
    KEY,
)
_FAULT = re.compile("|".join(re.escape(fault) for fault in FAULTS))

#: How the proxy is started: by this interpreter, or by that of another environment (`make test-compiled`).
#: With -P the package comes from there, and not from the sources in the working directory.
PROXY: Final = (os.environ.get("PORTERO_TEST_PYTHON") or sys.executable, "-P", "-m", "portero_py")


@dataclass(frozen=True)
class ApiAnswer:
    """An answer of the registration API."""

    status: int
    fields: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


class ProxyProcess:
    """portero-py with a plain or a TLS listener on 127.0.0.1 and [::1], and the registration API.

    `toml` is the text of its configuration file. With `by_flags` False the others say where it
    listens: set `port` and `register_port` then. Call `start`, and `stop` at the end: it asserts exit
    status 0 and a clean log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        certificates: Path | None = None,
        toml: str = "",
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        by_flags: bool = True,
    ) -> None:
        self.folder = folder
        self.port, self.register_port = free_port(), free_port()
        self.tls = certificates is not None
        at = [
            *("--listen-addr", f"127.0.0.1:{self.port}", "--listen-addr", f"[::1]:{self.port}"),
            *("--register-addr", f"127.0.0.1:{self.register_port}"),
            *(("--tls-cert-dir", str(certificates)) if certificates else ("--no-tls",)),
        ]
        self._flags = [*(at if by_flags else ()), *flags]
        folder.mkdir(parents=True, exist_ok=True)
        if toml:
            (folder / "portero.toml").write_text(toml)
            self._flags += ["--config", str(folder / "portero.toml")]
        self._environment = clean_environment(
            {"PORTERO_REGISTER_SECRET": SECRET, "PORTERO_JWT_HMAC_KEY": KEY, **(environment or {})}
        )
        self._logs = (folder / "stdout.log", folder / "stderr.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._known_faults = 0

    # Life cycle

    def start(self, prefix: Sequence[str] = (), *, pass_fds: Sequence[int] = ()) -> ProxyProcess:
        """Start, and wait until it says that it is ready."""
        command = [*prefix, *PROXY, *self._flags]
        with self._logs[0].open("wb") as out, self._logs[1].open("wb") as err:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self._environment,
                pass_fds=pass_fds,
            )
        try:
            eventually(self._is_ready, "the proxy is ready")
        except AssertionError:
            self.kill()
            raise AssertionError(f"the proxy did not become ready:\n{self.log()}") from None
        return self

    def stop(self) -> None:
        """SIGTERM; assert exit status 0 and a log without faults."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        status = self.wait()
        self.assert_no_fault()
        assert status == 0, f"exit status {status}:\n{self.log()[-4000:]}"

    def wait(self, seconds: float = 2 * PATIENCE) -> int:
        """The exit status, when it has ended by itself."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not end within {seconds} s:\n{self.log()[-4000:]}") from None

    def kill(self) -> None:
        """SIGKILL, as the last way out."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def crash(self) -> None:
        """SIGKILL to all of its processes, as when the machine loses power."""
        found = [self.pid]
        for pid in found:
            with contextlib.suppress(OSError):  # it has ended
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                os.kill(pid, signal.SIGSTOP)
                found += [int(child) for child in children]
        for pid in reversed(found):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.kill()
        # What a process held (locks, ports) is free when it has ended, not when the signal is sent.
        eventually(lambda: not any(_is_alive(pid) for pid in found), "all of its processes have ended")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def generation(self) -> int:
        """The process id of what the main process has started: the one that serves, or its supervisor."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    @property
    def is_running(self) -> bool:
        """Whether it still runs."""
        return self._process is not None and self._process.poll() is None

    def check(self, config: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`--check` with the flags of this proxy, and another configuration file if there is one."""
        flags = list(self._flags)
        if config is not None:
            flags[flags.index("--config") + 1] = str(config)
        return subprocess.run(
            [*PROXY, *flags, "--check"],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * PATIENCE,
        )

    # Clients

    def connect(self, host: str = "127.0.0.1") -> Http1Client:
        """A raw connection to the listener, without TLS."""
        return Http1Client((host, self.port))

    # The registration API

    def register(self, service: str, host: str, port: int, **fields: object) -> dict[str, Any]:
        """Register a backend with a real token; the lease's answer."""
        answer = self.call("POST", "/register", registration(service, host, port, **fields))
        assert answer.status == 200, (answer.status, answer.body)
        found: dict[str, Any] = answer.json
        return found

    def serve(self, service: str, backend: RecordingBackend) -> None:
        """Register a backend without anything special."""
        self.register(service, backend.host, backend.port)

    def deregister(self, service: str, **fields: object) -> None:
        """Release a lease."""
        answer = self.call("DELETE", "/register", {"service_name": service, **fields})
        assert answer.status in (200, 202, 204), (answer.status, answer.body)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> ApiAnswer:
        """One request to the registration API, with secret and token."""
        service = str(body.get("service_name", "")) if body else ""
        connection = http.client.HTTPConnection("127.0.0.1", self.register_port, timeout=PATIENCE)
        try:
            connection.request(
                method,
                path,
                json.dumps(body) if body is not None else None,
                {
                    "Content-Type": "application/json",
                    "X-Register-Secret": SECRET,
                    "Authorization": f"Bearer {token(service)}",
                    **(fields or {}),
                },
            )
            response = connection.getresponse()
            return ApiAnswer(
                response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of a metric that carry `labels`."""
        total = 0.0
        for line in self.call("GET", "/metrics").body.decode().splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match is not None and match[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if all(found.get(key) == value for key, value in labels.items()):
                    total += float(match[3])
        return total

    def wait_until_idle(self) -> None:
        """Wait until no exchange is in flight."""
        eventually(lambda: self.metric("portero_requests_in_flight") == 0, "no exchange in flight")

    # What it wrote, what it uses

    def log(self) -> str:
        """Everything written to stdout, then everything written to stderr."""
        return b"".join(path.read_bytes() for path in self._logs).decode("utf-8", "replace")

    def operator_log(self) -> str:
        """Everything written to stderr."""
        return self._logs[1].read_text("utf-8", "replace")

    def access_log(self, **wanted: object) -> list[dict[str, Any]]:
        """The JSON lines of the access log whose fields have the `wanted` values."""
        lines = self.log().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [entry for entry in entries if all(entry.get(key) == value for key, value in wanted.items())]

    def assert_no_fault(self) -> None:
        """Fail when the log shows a fault that no earlier call has reported."""
        log = self.log()
        found = [match.start() for match in _FAULT.finditer(log)]
        new, self._known_faults = found[self._known_faults :], len(found)
        assert not new, f"faults in the log:\n{log[max(0, new[0] - 1500) : new[0] + 4500]}"

    def memory(self) -> int:
        """Resident bytes now."""
        fields = Path(f"/proc/{self.generation}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGESIZE")

    def open_files(self) -> int:
        """How many descriptors it holds."""
        return len(os.listdir(f"/proc/{self.generation}/fd"))  # noqa: PTH208 - a count, not paths

    # Private

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the proxy ended with {self._process.returncode}")
        try:
            return self.call("GET", "/readyz").status == 200
        except OSError:
            return False


def registration(service: str, host: str, port: int, **fields: object) -> dict[str, object]:
    """The body of a POST /register."""
    return {
        "service_name": service,
        "host": host,
        "port": port,
        "ttl_seconds": 600,
        "use_tls": False,
        **fields,
    }


def _is_alive(pid: int) -> bool:
    """Whether a thread of a process still holds what it had: a zombie does not."""
    try:
        states = [
            each.read_text().rpartition(")")[2].split()[0]
            for each in Path(f"/proc/{pid}/task").glob("*/stat")
        ]
    except OSError:
        return True  # one has just ended: look again
    return any(state not in ("Z", "X") for state in states)


def token(service: str, seconds: int = 300, key: str = KEY) -> str:
    """A token for one service, as an agent signs it."""
    now = int(time.time())
    return jwt.encode({"service_name": service, "iat": now, "exp": now + seconds}, key, "HS256")


def clean_environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would configure a proxy, and with `added`."""
    bare = {"LISTEN_ADDR", "REGISTER_ADDR", "TLS_CERT_DIR", "REGISTER_SECRET", "JWT_HMAC_KEY"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in bare and not name.startswith(("PORTERO_", "LISTEN_", "NOTIFY_", "WATCHDOG_"))
    }
    return {**kept, "PYTHONUNBUFFERED": "1", **added}


def free_port() -> int:
    """A port that nobody listens on, outside the range that outgoing connections take theirs from."""
    source = random.SystemRandom()
    while True:
        port = source.randrange(20_000, 32_000)
        try:
            with socket.create_server(("::1", port), family=socket.AF_INET6):
                pass
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
