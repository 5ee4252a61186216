"""nginx: passive checks only (the open-source one has no others), reloads by SIGHUP, upgrades by SIGUSR2.

It is a daemon here, as it takes SIGUSR2 only while it is nobody's child: its processes are a group that ends
in `close`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import ClassVar

from benchmarks.faults.connections import HOST
from benchmarks.faults.peer import CONNECT_SECONDS, DRAIN_SECONDS, HEAD_SECONDS, Peer
from benchmarks.faults.stage import Stage, until, write

_CONFIG = """
worker_processes 1; worker_shutdown_timeout {drain}s;
pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections {connections}; }}
http {{
    access_log off; tcp_nodelay on; keepalive_requests 100000;
    client_body_temp_path {folder}/nginx-body; proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-f; uwsgi_temp_path {folder}/nginx-u; scgi_temp_path {folder}/nginx-s;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    upstream backends {{
        zone backends 256k;
        {servers}
        keepalive 64; keepalive_requests 100000;
    }}
    server {{
        listen 127.0.0.1:{port} ssl http2 backlog=4096;
        server_name {host};
        ssl_certificate {pair}/fullchain.pem; ssl_certificate_key {pair}/privkey.pem;
        client_max_body_size 0;
        location / {{
            proxy_pass http://backends;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_connect_timeout {connect}s;
            proxy_read_timeout {head}s;
            proxy_next_upstream error timeout http_500 http_502 http_503 http_504;
            proxy_next_upstream_tries 3;
        }}
    }}
}}
"""


class Nginx(Peer):
    ways: ClassVar[dict[str, str]] = {"restart": "SIGUSR2, SIGQUIT", "upgrade": "SIGUSR2, SIGWINCH, SIGQUIT"}

    def __init__(self, stage: Stage, backends: list[str], descriptors: int = 0) -> None:
        super().__init__(stage, backends, descriptors)
        self._groups: set[int] = set()

    def start(self, *, kept_socket: bool = False) -> None:
        self._configure()
        command = ["nginx", "-c", str(self.stage.folder / "nginx.conf")]
        self.stage.spawn("nginx", command, descriptors=self.descriptors)
        # It listens before it becomes a daemon, and only then it has a pid file.
        until("nginx accepts", lambda: bool(self._written_pid()) and self.is_alive())
        self._groups.add(os.getpgid(self._pid()))

    def add(self, backend: str) -> None:
        with self.changing:
            self.backends.append(backend)
            self._apply()

    def remove(self, backend: str, wait: float) -> bool:
        with self.changing:
            self.backends.remove(backend)
            self._apply()
        return False

    def reload(self) -> None:
        self._configure()
        self._signal(self._pid(), signal.SIGHUP)

    def restart(self) -> None:
        self._replace(gently=False)

    def upgrade(self) -> None:
        self._replace(gently=True)

    def stop(self) -> None:
        pid = self._pid()
        self._signal(pid, signal.SIGQUIT)
        until("nginx ends", lambda: not _lives(pid), DRAIN_SECONDS + 10)

    def close(self) -> None:
        if _lives(self._written_pid()):
            self._groups.add(os.getpgid(self._written_pid()))
        for group in self._groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended already

    # Private

    def _configure(self) -> None:
        servers = "\n        ".join(f"server {each} max_fails=3 fail_timeout=10s;" for each in self.backends)
        text = _CONFIG.format(
            folder=self.stage.folder,
            pair=self.stage.pair,
            servers=servers,
            port=self.port,
            host=HOST,
            drain=DRAIN_SECONDS,
            connect=CONNECT_SECONDS,
            head=HEAD_SECONDS,
            connections=8192,  # more than its descriptors: fewer would make it close what it has accepted
        )
        write(self.stage.folder / "nginx.conf", text)

    def _pid(self) -> int:
        if pid := self._written_pid():
            return pid
        raise self.fail("there is no pid file")

    def _written_pid(self) -> int:
        """The master's; 0 while there is no pid file, or nothing in it yet."""
        try:
            return int((self.stage.folder / "nginx.pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def _apply(self) -> None:
        """A new generation of workers, and until it is there: SIGHUP itself does not wait."""
        pid = self._pid()
        before = _children(pid)
        self.reload()
        until("nginx has new workers", lambda: bool(_children(pid) - before))
        time.sleep(0.2)  # the old ones are told after the new ones are made

    def _replace(self, *, gently: bool) -> None:
        """https://nginx.org/en/docs/control.html, "Upgrading Executable on the Fly"."""
        old, before = self._pid(), self._pid()
        self._signal(old, signal.SIGUSR2)
        until("a new nginx", lambda: self._is_replaced(before))
        if gently:
            self._signal(old, signal.SIGWINCH)
            time.sleep(0.5)
        self._signal(old, signal.SIGQUIT)
        # As long as the old master is there, the new one takes no SIGUSR2.
        until("the old nginx ends", lambda: not _lives(old), DRAIN_SECONDS + 10)

    def _is_replaced(self, before: int) -> bool:
        """Whether there is a pid file again, of another master, who has workers."""
        return self._written_pid() not in (0, before) and bool(_children(self._written_pid()))

    def _signal(self, pid: int, number: signal.Signals) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError as error:
            raise self.fail("it is gone") from error


def _lives(pid: int) -> bool:
    """Whether a process is there that is not just waiting to be waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _children(pid: int) -> set[int]:
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()
