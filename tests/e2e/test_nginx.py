"""nginx as a backend, plain, over TLS and pinned."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.certificates import Authority
from tests.e2e.conftest import Curl, Need
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually

_NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 7;
    server {{
        listen 127.0.0.1:{port};
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {folder}/fullchain.pem;
        ssl_certificate_key {folder}/privkey.pem;
        root {folder}/www;
        location /hello {{ return 200 "hello from $host $request_method $http_x_forwarded_proto"; }}
        location /empty {{ return 204; }}
        location /moved {{ return 301 /hello; }}
    }}
}}
"""


@pytest.fixture
def nginx(need: Need, authority: Authority, tmp_path: Path) -> Iterator[tuple[int, int, str]]:
    """nginx with a plain and a TLS port, and the fingerprint of its certificate."""
    program = need("nginx")
    folder = tmp_path / "nginx"
    pair = authority.issue("nginx.test")
    pair.write(folder)
    (folder / "www").mkdir()
    (folder / "www" / "big").write_bytes(bytes(range(256)) * 20_000)
    tmp_path.chmod(0o755)
    port, tls_port = free_port(), free_port()
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, port=port, tls_port=tls_port))
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    command += ["-g", "user root;"] if _is_root() else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: _listens(tls_port), "nginx listens")
        yield port, tls_port, pair.fingerprint
    finally:
        process.terminate()
        process.wait(20)


def _is_root() -> bool:
    return Path("/proc/self").stat().st_uid == 0


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)):
            return True
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize("over", ["plain", "tls", "pinned"])
@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
def test_nginx_serves_through_the_proxy(
    over: str, flag: str, nginx: tuple[int, int, str], curl: Curl, tls_proxy: ProxyProcess, service: str
) -> None:
    port, tls_port, fingerprint = nginx
    fields: dict[str, object] = {"use_tls": over != "plain"}
    if over == "pinned":
        fields["tls_fingerprint"] = fingerprint
    tls_proxy.register(service, "127.0.0.1", port if over == "plain" else tls_port, **fields)
    for _ in range(20):  # nginx closes every connection after seven requests
        assert curl("/hello", flag).stdout.startswith(f"hello from {service} GET https\n200".encode())
    assert curl("/empty", flag).stdout.startswith(b"\n204")
    assert b"\n301" in curl("/moved", flag).stdout
    big = curl("/big", flag).stdout.rsplit(b"\n", 1)[0]
    assert big == bytes(range(256)) * 20_000
    assert b"\n206" in curl("/big", flag, "-r", "0-99").stdout
    assert b"\n404" in curl("/nothing", flag).stdout
