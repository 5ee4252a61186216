"""The proxies under test, and the backend behind them: the same job for each, on one core.

Each peer gets one plain and one TLS listener on 127.0.0.1, TLS 1.3 with the same P-256 certificate, HTTP/1.1
and HTTP/2 by ALPN, keep-alive to the backend, the usual forwarded headers, no access log, one worker. Where a
default would cost a peer something that the others do not do (nginx: temporary files for large bodies;
Caddy: 32 idle connections a host), it is lifted.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine
from benchmarks.registrations import Api
from benchmarks.stage import (
    HOST,
    NGINX_TOP,
    POLICED,
    Bench,
    await_port,
    free_port,
    spawn,
    start_backend,
    stop,
    write,
)

#: Whose portero-py is the compiled build (`make compiled`).
COMPILED = Path(".venv-compiled/bin/python").absolute()

#: Not one of PEERS, who have one worker each: it is measured on its own.
TWO_WORKERS = "portero, 2 workers"


@dataclass
class Peer:
    """A running proxy: where it listens, the processes whose CPU time is counted, and portero-py's
    registration APIs (the one of the plain listener first).
    """

    name: str
    plain_port: int
    tls_port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    apis: list[Api] = field(default_factory=list)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def keep_tls_only(self) -> None:
        """End the process of the plain listener, where that is one of its own (portero-py's, the first)."""
        stop(self.processes[:-1])
        del self.processes[:-1]

    def url(self, path: str, tls: bool) -> str:
        return f"{'https' if tls else 'http'}://{HOST}:{self.tls_port if tls else self.plain_port}{path}"


def is_installed(name: str) -> bool:
    """Whether the peer called `name` can be started here."""
    if name == "portero-compiled":
        return COMPILED.exists()
    return name in ("portero", TWO_WORKERS) or machine.program(name) is not None


def start_peer(name: str, bench: Bench) -> Peer:
    """Start the proxy called `name` and wait until both of its listeners accept."""
    peer = Peer(name, plain_port=free_port(), tls_port=free_port())
    try:
        _STARTERS[name](peer, bench)
        for port in (peer.plain_port, peer.tls_port):
            await_port(peer.processes[-1], port, name)
    except BaseException:
        stop(peer.processes)
        raise
    return peer


@contextlib.contextmanager
def running(names: list[str], bench: Bench) -> Iterator[list[Peer]]:
    """The backend and these peers, all gone when the block is left, however it is left."""
    processes = [start_backend(bench)]
    try:
        peers = []
        for name in names:
            peer = start_peer(name, bench)
            processes += peer.processes
            peers.append(peer)
        yield peers
    finally:
        stop(processes)


# The peers, one by one


def _start_nginx(peer: Peer, bench: Bench) -> None:
    pair = bench.folder / "certs" / HOST
    config = (
        NGINX_TOP.format(folder=bench.folder, name="nginx")
        + f"""
    upstream backend {{
        server 127.0.0.1:{bench.backend_port};
        keepalive 512; keepalive_requests 1000000000; keepalive_timeout 120;
    }}
    server {{
        listen 127.0.0.1:{peer.plain_port} backlog=4096;
        listen 127.0.0.1:{peer.tls_port} ssl http2 backlog=4096;
        server_name {HOST};
        ssl_certificate {pair}/fullchain.pem; ssl_certificate_key {pair}/privkey.pem;
        ssl_protocols TLSv1.3;
        client_max_body_size 0;
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_max_temp_file_size 0;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Request-ID $request_id;
        }}
    }}
    limit_req_zone $binary_remote_addr zone=clients:1m rate=1000000r/s;
    server {{
        listen 127.0.0.1:{peer.plain_port};
        server_name {POLICED};
        location / {{
            limit_req zone=clients burst=1000000 nodelay;
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Request-ID $request_id;
            proxy_set_header X-Env prod;
            add_header Strict-Transport-Security max-age=31536000;
        }}
    }} }}
    """
    )
    peer.processes.append(spawn(bench, "nginx", ["nginx", "-c", write(bench, "nginx.conf", config)]))


def _start_haproxy(peer: Peer, bench: Bench) -> None:
    config = f"""
global
    nbthread 1
    maxconn 8192
    ssl-default-bind-options ssl-min-ver TLSv1.3
defaults
    mode http
    timeout connect 3s
    timeout client 60s
    timeout server 60s
    timeout http-keep-alive 75s
    option forwardfor
    http-reuse always
frontend public
    bind 127.0.0.1:{peer.plain_port} backlog 4096
    bind 127.0.0.1:{peer.tls_port} ssl crt {bench.folder}/pair.pem alpn h2,http/1.1 backlog 4096
    http-request set-header X-Forwarded-Proto https if {{ ssl_fc }}
    http-request set-header X-Forwarded-Proto http if !{{ ssl_fc }}
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Request-ID %[uuid]
    use_backend policed if {{ hdr(host) -i {POLICED} }}
    default_backend backend
backend policed
    stick-table type ip size 100k expire 30s store http_req_rate(1s)
    http-request track-sc0 src
    http-request deny deny_status 429 if {{ sc_http_req_rate(0) gt 100000000 }}
    http-request set-header X-Env prod
    http-response set-header Strict-Transport-Security max-age=31536000
    cookie portero insert indirect nocache httponly
    server one 127.0.0.1:{bench.backend_port} pool-max-conn -1 cookie one
backend backend
    server one 127.0.0.1:{bench.backend_port} pool-max-conn -1
"""
    path = write(bench, "haproxy.cfg", config)
    peer.processes.append(spawn(bench, "haproxy", ["haproxy", "-db", "-f", path]))


def _start_caddy(peer: Peer, bench: Bench) -> None:
    pair = bench.folder / "certs" / HOST
    config = f"""
{{
    admin off
    auto_https off
    log {{
        level WARN
    }}
}}
(relay) {{
    bind 127.0.0.1
    reverse_proxy 127.0.0.1:{bench.backend_port} {{
        transport http {{
            keepalive_idle_conns_per_host 512
        }}
    }}
}}
http://{HOST}:{peer.plain_port} {{
    import relay
}}
http://{POLICED}:{peer.plain_port} {{
    header Strict-Transport-Security max-age=31536000
    bind 127.0.0.1
    reverse_proxy 127.0.0.1:{bench.backend_port} {{
        lb_policy cookie portero
        header_up X-Env prod
        transport http {{
            keepalive_idle_conns_per_host 512
        }}
    }}
}}
https://{HOST}:{peer.tls_port} {{
    tls {pair}/fullchain.pem {pair}/privkey.pem {{
        protocols tls1.3
    }}
    import relay
}}
"""
    path = write(bench, "Caddyfile", config)
    environment = {
        "GOMAXPROCS": "1",
        "XDG_DATA_HOME": str(bench.folder),
        "XDG_CONFIG_HOME": str(bench.folder),
    }
    command = ["caddy", "run", "--config", path, "--adapter", "caddyfile"]
    peer.processes.append(spawn(bench, "caddy", command, environment))


def _start_portero(peer: Peer, bench: Bench) -> None:
    _start_portero_of(sys.executable, peer, bench)


def _start_compiled(peer: Peer, bench: Bench) -> None:
    """The compiled build, from the environment that `make compiled` makes."""
    _start_portero_of(str(COMPILED), peer, bench)


def _start_two_workers(peer: Peer, bench: Bench) -> None:
    _start_portero_of(sys.executable, peer, bench, ["--workers", "2"])


def _start_portero_of(python: str, peer: Peer, bench: Bench, more: Sequence[str] = ()) -> None:
    """Two processes, one a listener: portero-py serves either TLS or, with --no-tls, plain HTTP.

    -P: the package of that interpreter's environment, not the sources in the working directory.
    """
    secret, key = secrets.token_urlsafe(24), secrets.token_urlsafe(48)
    environment = {
        "PORTERO_REGISTER_SECRET": secret,
        "PORTERO_JWT_HMAC_KEY": key,
        "PORTERO_ACCESS_LOG": "off",
        "PORTERO_LOG": "warning",
    }
    policed = [] if more else ["--config", write(bench, "portero.toml", _POLICY)]
    flags = {peer.plain_port: ["--no-tls"], peer.tls_port: ["--tls-cert-dir", str(bench.folder / "certs")]}
    for port, tls in flags.items():
        api = Api(free_port(), secret, key)
        addresses = ["--listen-addr", f"127.0.0.1:{port}", "--register-addr", f"127.0.0.1:{api.port}"]
        command = [python, "-P", "-m", "portero_py", *addresses, *tls, *policed, *more]
        process = spawn(bench, f"{peer.name}-{port}", command, environment)
        peer.processes.append(process)
        await_port(process, api.port, "portero-py's registration API")
        api.register([HOST, POLICED], bench.backend_port)
        peer.apis.append(api)


_POLICY = f"""
[[service]]
name = "{POLICED}"
sticky = {{ cookie = "portero" }}
rate_limit = {{ requests = 100_000_000, seconds = 1 }}
request_headers = {{ set = {{ "X-Env" = "prod" }} }}
response_headers = {{ set = {{ "Strict-Transport-Security" = "max-age=31536000" }} }}
"""

_STARTERS = {
    "nginx": _start_nginx,
    "haproxy": _start_haproxy,
    "caddy": _start_caddy,
    "portero": _start_portero,
    "portero-compiled": _start_compiled,
    TWO_WORKERS: _start_two_workers,
}
PEERS = tuple(name for name in _STARTERS if name != TWO_WORKERS)
