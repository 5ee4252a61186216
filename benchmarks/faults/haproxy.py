"""HAProxy: active checks, layer 7 observed, retries of GETs, servers changed through its runtime API.

It has one master and one worker thread. Servers are slots that the runtime API fills and empties; what it
changed is in the file too, so that a reload does not undo it.
"""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import ClassVar

from benchmarks.faults.peer import CONNECT_SECONDS, DRAIN_SECONDS, HEAD_SECONDS, HEALTH_SECONDS, Peer
from benchmarks.faults.stage import await_end, until, write
from benchmarks.machine import process_tree

_SLOTS = 8

_CONFIG = """
global
    nbthread 1
    {connections}
    stats socket {folder}/haproxy.sock mode 600 level admin expose-fd listeners
    hard-stop-after {drain}s
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    mode http
    timeout connect {connect}s
    timeout client 60s
    timeout server {head}s
    timeout queue {head}s
    timeout tunnel 1h
    timeout check {health}s
    timeout http-keep-alive 75s
    timeout http-request 15s
    option redispatch 1
    option forwardfor
    retries 3
    retry-on all-retryable-errors
    http-reuse safe
frontend public
    bind 127.0.0.1:{port} ssl crt {pem} alpn h2,http/1.1 backlog 4096
    http-request set-header X-Forwarded-Proto https
    default_backend backends
backend backends
    balance roundrobin
    http-request disable-l7-retry if !METH_GET
    option httpchk GET /health
    http-check expect status 200
    default-server check inter {health}s fall 3 rise 2 maxconn 512
    default-server observe layer7 error-limit 5 on-error mark-down
{servers}
"""


class Haproxy(Peer):
    ways: ClassVar[dict[str, str]] = {"restart": "-sf, -x", "upgrade": "master, SIGUSR2"}

    def start(self, *, kept_socket: bool = False) -> None:
        self._slots: list[str] = (self.backends + [""] * _SLOTS)[:_SLOTS]
        self._configure()
        self._process = self.stage.spawn("haproxy", self._command(), descriptors=self.descriptors)
        until("HAProxy accepts", self.is_alive)

    def add(self, backend: str) -> None:
        with self.changing:
            slot = self._slots.index("")
            self._slots[slot] = backend
            self._configure()
        host, _, port = backend.rpartition(":")
        name = f"backends/s{slot}"
        self._tell(f"set server {name} addr {host} port {port}")
        self._tell(f"set server {name} health up; set server {name} state ready; enable health {name}")

    def remove(self, backend: str, wait: float) -> bool:
        slot = self._slots.index(backend)
        name = f"backends/s{slot}"
        self._tell(f"set server {name} state drain")
        give_up = time.monotonic() + wait
        while (current := self._sessions(f"s{slot}")) and time.monotonic() < give_up:
            time.sleep(0.1)
        self._tell(f"disable health {name}; set server {name} state maint")
        with self.changing:
            self._slots[slot] = ""
            self._configure()
        return not current

    def reload(self) -> None:
        self._configure()
        self._process.send_signal(signal.SIGUSR2)

    def restart(self) -> None:
        self._configure()
        old = self._process
        more = ["-x", str(self._socket), "-sf", *(str(pid) for pid in process_tree(old.pid))]
        self._process = self.stage.spawn("haproxy", [*self._command(), *more], descriptors=self.descriptors)
        until("the new HAProxy", lambda: self._answers_as(self._process.pid))

    def upgrade(self) -> None:
        before = set(process_tree(self._process.pid))
        self.reload()
        until("a new worker of HAProxy", lambda: bool(set(process_tree(self._process.pid)) - before))

    def stop(self) -> None:
        self._process.send_signal(signal.SIGUSR1)
        await_end(self._process, DRAIN_SECONDS + 10)

    def close(self) -> None:
        """Nothing is held."""

    # Private

    @property
    def _socket(self) -> Path:
        return self.stage.folder / "haproxy.sock"

    def _command(self) -> list[str]:
        return ["haproxy", "-W", "-db", "-f", str(self.stage.folder / "haproxy.cfg")]

    def _configure(self) -> None:
        servers = [
            f"    server s{number} {address}" if address else f"    server s{number} 127.0.0.1:1 disabled"
            for number, address in enumerate(self._slots)
        ]
        text = _CONFIG.format(
            folder=self.stage.folder,
            pem=self.stage.pem,
            port=self.port,
            servers="\n".join(servers),
            drain=DRAIN_SECONDS,
            connect=CONNECT_SECONDS,
            head=HEAD_SECONDS,
            health=HEALTH_SECONDS,
            # Without it HAProxy sees how many descriptors it may have, and what that is enough for.
            connections="" if self.descriptors else "maxconn 8192",
        )
        write(self.stage.folder / "haproxy.cfg", text)

    def _tell(self, command: str) -> str:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(str(self._socket))
                sock.sendall(f"{command}\n".encode())
                answer = b""
                while data := sock.recv(65_536):
                    answer += data
        except OSError as error:
            raise self.fail(f"its socket takes no command: {error}") from error
        return answer.decode()

    def _sessions(self, server: str) -> int:
        """What is in flight at a server (`show stat`: scur)."""
        for line in self._tell("show stat").splitlines():
            fields = line.split(",")
            if fields[:2] == ["backends", server]:
                return int(fields[4])
        raise self.fail(f"it does not know {server}")

    def _answers_as(self, pid: int) -> bool:
        found = [line for line in self._tell("show info").splitlines() if line.startswith("Pid: ")]
        return bool(found) and int(found[0].partition(" ")[2]) in process_tree(pid)
