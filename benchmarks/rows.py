"""The rows of the benchmark: what a client does, with which program, and how its answer is read.

wrk speaks HTTP/1.1 (its Lua summary gives exact counts), h2load HTTP/2. wrk resumes its TLS sessions, so that
row is called resumed; full handshakes come from h2load, which opens 75 new connections every 50 ms (1,500/s
is below what any peer can take, so CPU time and not saturation is seen). Bytes are counted as well as
requests: with 10 MiB bodies a request that is half done when the clock stops has cost half its CPU time.
Every client is held to TLS 1.3 with AES-128-GCM and X25519 through its OpenSSL configuration, so that no
peer is charged for a stronger cipher than another's.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import program
from benchmarks.peers import Peer
from benchmarks.stage import BODIES, POLICED, BenchError


@dataclass(frozen=True)
class Row:
    """One kind of load. `streams` is for HTTP/2 only; `close` makes a new connection for every request,
    `fresh` a new one that resumes no TLS session. `host` is asked for, if it is not the stage's; `services`,
    if not 0, are asked for in turns.
    """

    key: str
    title: str
    path: str
    tls: bool = False
    h2: bool = False
    connections: int = 64
    streams: int = 1
    post_bytes: int = 0
    close: bool = False
    fresh: bool = False
    host: str = ""
    services: int = 0
    quick: bool = False


ROWS = (
    Row("h1", "h1 plain keep-alive, small", "/small", quick=True),
    Row("h1-policy", "the same, cookie, headers, rate limit", "/small", host=POLICED, quick=True),
    Row("h1-tls", "h1 TLS keep-alive, small", "/small", tls=True, quick=True),
    Row(
        "h2", "h2 16 x 16 streams, small", "/small", tls=True, h2=True, connections=16, streams=16, quick=True
    ),
    Row("h2-one", "h2 1 x 100 streams, small", "/small", tls=True, h2=True, connections=1, streams=100),
    Row("post", "h1 plain POST 10 KiB", "/post", post_bytes=10 * 1024),
    Row("post-tls", "h1 TLS POST 10 KiB", "/post", tls=True, post_bytes=10 * 1024),
    Row("100k", "100 KiB plain", "/100k", connections=16),
    Row("100k-tls", "100 KiB TLS", "/100k", tls=True, connections=16, quick=True),
    Row("100k-h2", "100 KiB h2", "/100k", tls=True, h2=True, connections=4, streams=4),
    Row("10m", "10 MiB plain", "/10m", connections=4),
    Row("10m-tls", "10 MiB TLS", "/10m", tls=True, connections=4, quick=True),
    Row("10m-h2", "10 MiB h2", "/10m", tls=True, h2=True, connections=2, streams=2),
    Row("connect", "connection per request, plain", "/small", close=True),
    Row("connect-tls", "new TLS connections, full handshake", "/small", tls=True, fresh=True),
    Row("resume-tls", "new TLS connections, resumed", "/small", tls=True, close=True),
)


@dataclass(frozen=True)
class Tally:
    """What one run of a client came to. `requests` is a fraction where bodies were cut off at the end."""

    requests: float
    failed: int
    seconds: float


FRESH_PER_SECOND = 1500

_OPENSSL_CONF = """
openssl_conf = settings
[settings]
ssl_conf = ssl
[ssl]
system_default = client
[client]
MinProtocol = TLSv1.3
Ciphersuites = TLS_AES_128_GCM_SHA256
Groups = X25519
"""

_WRK_LUA = """
if {post} > 0 then
  wrk.method = "POST"
  wrk.body = string.rep("x", {post})
end
if {close} then
  wrk.headers["Connection"] = "close"
end
if "{host}" ~= "" then
  wrk.headers["Host"] = "{host}"
end
if {services} > 0 then
  local asked, turn = {{}}, 0
  function init(args)
    for number = 1, {services} do
      asked[number] = wrk.format(nil, nil, {{["Host"] = "s" .. number .. ".example"}})
    end
  end
  function request()
    turn = turn % {services} + 1
    return asked[turn]
  end
end
function done(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format("TALLY %d %d %d %d\\n", summary.requests, failed, summary.bytes, summary.duration))
end
"""


def service_name(number: int) -> str:
    """The service that a row with `services` asks for as its `number`, from 1."""
    return f"s{number}.example"


def response_times(
    row: Row, peer: Peer, rate: float, connections: int, seconds: float, folder: Path, core: int
) -> list[float]:
    """Ask `rate` times a second, and give every response's time in µs. BenchError: one of them failed."""
    log = folder / "response-times.tsv"
    port = peer.tls_port if row.tls else peer.plain_port
    command = ["h2load", "-t", "1", f"--connect-to=127.0.0.1:{port}", f"--log-file={log}"]
    command += ["-c", str(connections), "-D", str(max(1, round(seconds)))]
    command += [f"--rps={rate / connections:.3f}", *(["-m", str(row.streams)] if row.h2 else ["--h1"])]
    log.unlink(missing_ok=True)
    _run_client([*command, peer.url(row.path, row.tls)], seconds, folder, core)
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    if len(lines) < 100 or any(status != "200" for _, status, *_ in lines):
        raise BenchError(f"{peer.name}, {row.title}: {len(lines)} responses, not all of them 200")
    return [float(line[2]) for line in lines]


def run(row: Row, peer: Peer, seconds: float, folder: Path, core: int) -> Tally:
    """Load `peer` with `row` for about `seconds`, from `core`. BenchError: the client itself failed."""
    by_h2load = row.h2 or row.fresh
    command = _h2load(row, peer, seconds) if by_h2load else _wrk(row, peer, seconds, folder)
    text = _run_client(command, seconds, folder, core)
    return _read_h2load(text, row) if by_h2load else _read_wrk(text, row)


def verify(row: Row, peer: Peer, folder: Path, core: int) -> None:
    """Check one answer of `row` for status, length, protocol and cipher; BenchError says what was wrong."""
    curl = [
        "curl",
        "-sS",
        "--max-time",
        "20",
        "-o",
        "/dev/null",
        "--http2" if row.h2 else "--http1.1",
        "--ipv4",
    ]
    curl += ["--cacert", str(folder / "certs" / "localhost" / "fullchain.pem")]
    curl += ["-w", "%{http_code} %{size_download} %{http_version}"]
    if row.host:
        curl += ["-H", f"Host: {row.host}"]
    if row.post_bytes:
        curl += ["--data-binary", "x" * row.post_bytes]
    got = _run_client([*curl, peer.url(row.path, row.tls)], 20, folder, core).strip()
    expected = f"200 {BODIES[row.path]} {'2' if row.h2 else '1.1'}"
    if got != expected:
        raise BenchError(f"{peer.name}, {row.title}: expected '{expected}', got '{got}'")
    if row.tls:
        _verify_tls(row, peer, folder, core)


# Private


def _verify_tls(row: Row, peer: Peer, folder: Path, core: int) -> None:
    offer = "h2" if row.h2 else "http/1.1"
    connect = ["-connect", f"127.0.0.1:{peer.tls_port}", "-servername", "localhost", "-alpn", offer]
    text = _run_client(["openssl", "s_client", "-brief", *connect], 10, folder, core)
    for wanted in ("TLSv1.3", "TLS_AES_128_GCM_SHA256", "ecdsa_secp256r1_sha256|ECDSA"):
        if not re.search(wanted, text):
            raise BenchError(f"{peer.name}: its handshake shows no {wanted}:\n{text}")


def _wrk(row: Row, peer: Peer, seconds: float, folder: Path) -> list[str]:
    script = folder / f"{row.key}.lua"
    close = "true" if row.close else "false"
    script.write_text(_WRK_LUA.format(post=row.post_bytes, close=close, services=row.services, host=row.host))
    # wrk takes whole seconds only.
    load = ["-t", "1", "-c", str(row.connections), "-d", f"{max(1, round(seconds))}s", "--timeout", "20s"]
    return ["wrk", *load, "-s", str(script), peer.url(row.path, row.tls)]


def _h2load(row: Row, peer: Peer, seconds: float) -> list[str]:
    command = ["h2load", "-t", "1", f"--connect-to=127.0.0.1:{peer.tls_port}"]
    if row.fresh:
        total = str(round(seconds * FRESH_PER_SECOND))
        period = 0.05
        pace = ["--rate-period", f"{period * 1000:.0f}ms", "-r", str(round(FRESH_PER_SECOND * period))]
        command += ["--h1", "-c", total, "-n", total, *pace]
    else:
        command += ["-c", str(row.connections), "-m", str(row.streams), "-D", str(max(1, round(seconds)))]
    return [*command, peer.url(row.path, row.tls)]


def _run_client(command: list[str], seconds: float, folder: Path, core: int) -> str:
    settings = folder / "client.cnf"
    if not settings.exists():
        settings.write_text(_OPENSSL_CONF)
    path = program(command[0])
    if path is None:
        raise BenchError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            ["taskset", "-c", str(core), path, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # s_client also prints a server's HTTP/2 frames
            timeout=seconds + 40,
            check=False,
            env={**os.environ, "OPENSSL_CONF": str(settings)},
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(command)}: did not end") from error
    if done.returncode:
        raise BenchError(
            f"{' '.join(command)}: status {done.returncode}: {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout + done.stderr


def _read_wrk(text: str, row: Row) -> Tally:
    tally = re.search(r"^TALLY (\d+) (\d+) (\d+) (\d+)$", text, re.MULTILINE)
    if tally is None:
        raise BenchError(f"wrk gave no tally:\n{text}")
    requests, failed, size, microseconds = map(int, tally.groups())
    return Tally(_fraction(requests, size, row), failed, microseconds / 1e6)


def _read_h2load(text: str, row: Row) -> Tally:
    took = re.search(r"^finished in ([\d.]+)(m?s)", text, re.MULTILINE)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", text)
    codes = re.search(r"(\d+) 2xx", text)
    traffic = re.search(r"\((\d+)\) data", text)
    if not (took and counts and codes and traffic):
        raise BenchError(f"h2load's output was not understood:\n{text}")
    good, failed, errored, late = map(int, counts.groups())
    seconds = float(took[1]) / (1000 if took[2] == "ms" else 1)
    return Tally(_fraction(good, int(traffic[1]), row), failed + errored + late, seconds)


def _fraction(requests: int, size: int, row: Row) -> float:
    body = BODIES[row.path]
    return requests if body < 100_000 else size / body
