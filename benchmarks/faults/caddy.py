"""Caddy: active and passive checks, tries again for a while; a change is a new configuration by its API.

A change ends the WebSockets of the configuration before it: there is no other way in this version (2.7 has
`stream_close_delay`). It takes no socket over from anybody; but it sets SO_REUSEPORT, so a second process can
serve the port while the first one ends.

Requests are buffered: a body that was not, it closes when connecting fails, and the next backend, which is
well, gets the blame when it cannot be sent there (864 of 4,801 lost with one black hole of two, not 1).
"""

from __future__ import annotations

import http.client
import signal
import subprocess
from typing import ClassVar

from benchmarks.faults.connections import HOST
from benchmarks.faults.peer import CONNECT_SECONDS, DRAIN_SECONDS, HEAD_SECONDS, HEALTH_SECONDS, Peer
from benchmarks.faults.stage import await_end, until
from benchmarks.stage import free_port

_CONFIG = """
{{
    admin 127.0.0.1:{admin}
    auto_https off
    grace_period {drain}s
    servers {{
        protocols h1 h2
    }}
    log {{
        level ERROR
    }}
}}
https://{host}:{port} {{
    bind 127.0.0.1
    tls {pair}/fullchain.pem {pair}/privkey.pem
    reverse_proxy {backends} {{
        buffer_requests
        max_buffer_size 1MB
        lb_policy round_robin
        lb_try_duration 10s
        lb_try_interval 100ms
        health_uri /health
        health_interval {health}s
        health_timeout {health}s
        health_status 200
        fail_duration 10s
        max_fails 3
        unhealthy_status 500 502 503 504
        transport http {{
            dial_timeout {connect}s
            response_header_timeout {head}s
            keepalive_idle_conns_per_host 64
        }}
    }}
}}
"""


class Caddy(Peer):
    ways: ClassVar[dict[str, str]] = {"restart": "a second process (SO_REUSEPORT)", "upgrade": "caddy reload"}

    def start(self, *, kept_socket: bool = False) -> None:
        self._process, self._admin = self._spawn()
        until("Caddy accepts", self.is_alive)

    def add(self, backend: str) -> None:
        with self.changing:
            self.backends.append(backend)
            self.reload()

    def remove(self, backend: str, wait: float) -> bool:
        with self.changing:
            self.backends.remove(backend)
            self.reload()
        return False

    def reload(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._admin, timeout=DRAIN_SECONDS + 10)
        headers = {"Content-Type": "text/caddyfile", "Cache-Control": "must-revalidate"}
        try:
            connection.request("POST", "/load", self._configuration(self._admin).encode(), headers)
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise self.fail(f"it does not load its configuration: {answer.decode(errors='replace')}")
        except (OSError, http.client.HTTPException) as error:
            raise self.fail(f"its admin API does not answer: {error!r}") from error
        finally:
            connection.close()

    def restart(self) -> None:
        old, before = self._process, self._admin
        self._process, self._admin = self._spawn()
        assert before != self._admin
        until("the second Caddy", lambda: self._is_up(self._admin))
        old.send_signal(signal.SIGTERM)

    def upgrade(self) -> None:
        self.reload()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        await_end(self._process, DRAIN_SECONDS + 10)

    def close(self) -> None:
        """Nothing is held."""

    # Private

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        admin = free_port()
        path = self.stage.folder / f"Caddyfile-{admin}"
        path.write_text(self._configuration(admin))
        folder = str(self.stage.folder)
        environment = {"XDG_DATA_HOME": folder, "XDG_CONFIG_HOME": folder, "HOME": folder}
        command = ["caddy", "run", "--config", str(path), "--adapter", "caddyfile"]
        return self.stage.spawn("caddy", command, environment, descriptors=self.descriptors), admin

    def _configuration(self, admin: int) -> str:
        return _CONFIG.format(
            admin=admin,
            drain=DRAIN_SECONDS,
            host=HOST,
            port=self.port,
            pair=self.stage.pair,
            backends=" ".join(self.backends),
            health=HEALTH_SECONDS,
            connect=CONNECT_SECONDS,
            head=HEAD_SECONDS,
        )

    def _is_up(self, admin: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=5)
        try:
            connection.request("GET", "/config/")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
