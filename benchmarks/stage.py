"""The stage of a benchmark: scratch folder, certificate, backend, and processes pinned to their cores."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import program

HOST = "localhost"
#: The same backend behind a service with a policy: sticky cookie, changed headers, a rate limit that lets
#: everything pass. nginx has no sticky cookie, Caddy no rate limit: they do the rest.
POLICED = "policed.example"
SMALL = b"hello, world\n"
BODIES = {"/small": len(SMALL), "/100k": 100 * 1024, "/10m": 10 * 1024 * 1024, "/post": len(SMALL)}
START_SECONDS = 15.0


NGINX_TOP = """
daemon off; master_process off; pid {folder}/{name}.pid; error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
    access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000; keepalive_timeout 120;
    client_body_temp_path {folder}/{name}-body; proxy_temp_path {folder}/{name}-proxy;
    fastcgi_temp_path {folder}/{name}-f; uwsgi_temp_path {folder}/{name}-u; scgi_temp_path {folder}/{name}-s;
"""


class BenchError(Exception):
    """A peer that does not start or does not answer as it should."""


@dataclass(frozen=True)
class Bench:
    """A scratch folder with the certificate and the backend's files, and the cores to pin to."""

    folder: Path
    proxy_core: int
    other_core: int
    backend_port: int


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_files(folder: Path) -> None:
    """The certificate in each peer's favourite layout, and the backend's bodies."""
    certificate = folder / "certs" / HOST
    certificate.mkdir(parents=True)
    openssl = ["openssl", "req", "-x509", "-nodes", "-days", "30"]
    openssl += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subjects = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST},IP:127.0.0.1"]
    out = ["-keyout", str(certificate / "privkey.pem"), "-out", str(certificate / "fullchain.pem")]
    subprocess.run([*openssl, *subjects, *out], check=True, capture_output=True, timeout=30)
    pair = (certificate / "fullchain.pem").read_bytes() + (certificate / "privkey.pem").read_bytes()
    (folder / "pair.pem").write_bytes(pair)
    (folder / "files").mkdir()
    for path in ("/100k", "/10m"):
        (folder / "files" / path[1:]).write_bytes(os.urandom(BODIES[path]))


def start_backend(bench: Bench) -> subprocess.Popen[bytes]:
    """nginx with a fixed reply and two files, on the core that the client uses too."""
    config = (
        NGINX_TOP.format(folder=bench.folder, name="backend")
        + f"""
    server {{
        listen 127.0.0.1:{bench.backend_port} backlog=4096;
        client_max_body_size 0;
        default_type application/octet-stream;
        location / {{ root {bench.folder}/files; }}
        location = /small {{ return 200 "{SMALL.decode().strip()}\\n"; }}
        location = /post {{ return 200 "{SMALL.decode().strip()}\\n"; }}
    }} }}
    """
    )
    process = spawn(
        bench, "backend", ["nginx", "-c", write(bench, "backend.conf", config)], core=bench.other_core
    )
    await_port(process, bench.backend_port, "the backend")
    return process


def write(bench: Bench, name: str, text: str) -> str:
    path = bench.folder / name
    path.write_text(text)
    return str(path)


def spawn(
    bench: Bench,
    name: str,
    command: list[str],
    environment: dict[str, str] | None = None,
    core: int | None = None,
) -> subprocess.Popen[bytes]:
    path = program(command[0])
    if path is None:
        raise BenchError(f"{command[0]} is not installed")
    pinned = ["taskset", "-c", str(bench.proxy_core if core is None else core), path, *command[1:]]
    log = (bench.folder / f"{name}.log").open("wb")
    with log:  # its own process group, so that `stop` reaches everything that it starts
        return subprocess.Popen(
            pinned,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )


def await_port(process: subprocess.Popen[bytes], port: int, who: str) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise BenchError(f"{who} ended at start with status {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise BenchError(f"{who} does not accept on port {port} after {START_SECONDS:.0f} s")


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End these processes and everything that they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
