"""portero-py: backends register, are probed on their health page, and are drained when they leave.

What a build does not know yet is left out of its configuration, and shows in the figures.
"""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from benchmarks.faults.asks import HEALTH_PATH
from benchmarks.faults.connections import HOST
from benchmarks.faults.peer import CONNECT_SECONDS, DRAIN_SECONDS, HEAD_SECONDS, HEALTH_SECONDS, Peer
from benchmarks.faults.stage import Stage, await_end, until, write
from benchmarks.peers import COMPILED
from benchmarks.registrations import Api
from benchmarks.stage import free_port

#: Becomes the program in argv[2:], with the descriptor argv[1] passed as systemd does it (sd_listen_fds(3)).
_PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="https")
os.execv(sys.argv[2], sys.argv[2:])
"""

#: Ends with status 0 where there are health checks to configure.
_KNOWS_HEALTH = """
import sys
from portero_py.config.model import Config
sys.exit("health" not in Config.__slots__)
"""

_CONFIG = """
[timeouts]
connect = {connect}
upstream_head = {head}
drain = {drain}
"""

_HEALTH = """
[health]
interval = {health}
timeout = {health}
rise = 1
fall = 3
statuses = [500, 502, 503, 504]
"""


class Portero(Peer):
    ways: ClassVar[dict[str, str]] = {"restart": "systemd's socket", "upgrade": "SIGUSR2"}
    python = sys.executable
    workers = 1

    def __init__(self, stage: Stage, backends: list[str], descriptors: int = 0) -> None:
        super().__init__(stage, backends, descriptors)
        self._api = Api(free_port(), secrets.token_urlsafe(24), secrets.token_urlsafe(48))
        self._kept: socket.socket | None = None
        self._reloads = 0

    def start(self, *, kept_socket: bool = False) -> None:
        if kept_socket and self._kept is None:
            self._kept = socket.create_server(("127.0.0.1", self.port), backlog=4096)
        self._configure()
        self._process = self._spawn()
        until("portero-py serves its API", lambda: self._api.answers("/livez"))
        for backend in self.backends:
            self._register(backend)
        until("portero-py accepts", self.is_alive)

    def add(self, backend: str) -> None:
        self.backends.append(backend)
        self._register(backend)

    def remove(self, backend: str, wait: float) -> bool:
        self.backends.remove(backend)
        answer = self._api.release(HOST, _port(backend), int(wait))
        return answer.get("in_flight") == 0

    def reload(self) -> None:
        self._reloads += 1
        self._configure()
        self._process.send_signal(signal.SIGHUP)

    def restart(self) -> None:
        """As `systemctl restart` does: the next one starts when this one has ended, the socket stays."""
        self.stop()
        self._process = self._spawn()
        until("portero-py serves its API", lambda: self._api.answers("/livez"))

    def upgrade(self) -> None:
        before = _generation(self._process.pid)
        self._process.send_signal(signal.SIGUSR2)
        until("a new generation of portero-py", lambda: self._is_replaced(before), 2 * DRAIN_SECONDS)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        await_end(self._process, 2 * DRAIN_SECONDS + 10)

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()

    # Private

    def _is_replaced(self, before: set[int]) -> bool:
        """Whether the main process has other children, and none of those any more."""
        if self._process.poll() is not None:
            raise self.fail(f"it ended with status {self._process.returncode}")
        now = _generation(self._process.pid)
        return bool(now) and not now & before and self._api.answers("/readyz")

    def _configure(self) -> None:
        text = _CONFIG.format(
            connect=CONNECT_SECONDS, head=HEAD_SECONDS + self._reloads % 2, drain=DRAIN_SECONDS
        )
        if self._knows_health():
            text += _HEALTH.format(health=HEALTH_SECONDS)
        write(self.stage.folder / "portero.toml", text)

    def _knows_health(self) -> bool:
        command = [self.python, "-P", "-c", _KNOWS_HEALTH]
        return subprocess.run(command, check=False, timeout=60).returncode == 0

    def _spawn(self) -> subprocess.Popen[bytes]:
        environment = {"PORTERO_REGISTER_SECRET": self._api.secret, "PORTERO_JWT_HMAC_KEY": self._api.key}
        folder = self.stage.folder
        command = [self.python, "-P", "-m", "portero_py", "--config", str(folder / "portero.toml")]
        command += ["--register-addr", f"127.0.0.1:{self._api.port}", "--workers", str(self.workers)]
        command += ["--tls-cert-dir", str(self.stage.pair.parent), "--state-dir", str(folder / "state")]
        command += ["--access-log", "off", "--log", "warning"]
        fds: tuple[int, ...] = ()
        if self._kept is None:
            command += ["--listen-addr", f"127.0.0.1:{self.port}"]
        else:
            fds = (self._kept.fileno(),)
            command = [sys.executable, "-c", _PASS_SOCKET, str(fds[0]), *command]
        return self.stage.spawn("portero", command, environment, fds, self.descriptors)

    def _register(self, backend: str) -> None:
        self._api.register([HOST], _port(backend), {"health_path": HEALTH_PATH})


class PorteroTwoWorkers(Portero):
    workers = 2


class PorteroCompiled(Portero):
    python = str(COMPILED)


def _port(backend: str) -> int:
    return int(backend.rpartition(":")[2])


def _generation(pid: int) -> set[int]:
    """The main process's children now; empty when it is gone."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()
