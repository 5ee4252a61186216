"""What an idle connection costs in memory: portero-py beside nginx, plain and over TLS 1.3.

    python -m benchmarks.idle_memory [--connections 10000] [--peers nginx,portero]

Each connection is opened, asks once, and stays: an idle keep-alive connection. Measured is how much the
proxy's processes grow by (Rss in /proc/PID/smaps_rollup). A few hundred connections come before the first
look, so that what is loaded or allocated once does not count. Kernel memory of sockets is not in it; it is
the same for every proxy.
"""

from __future__ import annotations

import argparse
import resource
import socket
import ssl
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine, peers
from benchmarks.peers import Peer
from benchmarks.stage import HOST, Bench, BenchError, free_port, make_files

#: nginx gets 8192 connections in all, those to the backend included.
MOST_OF_NGINX = 5000
WARM = 300
SETTLE_SECONDS = 3.0
_REQUEST = f"GET /small HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


@dataclass(frozen=True)
class Cost:
    """Bytes for one connection."""

    peer: str
    tls: bool
    connections: int
    each: int


def held(pids: list[int], what: str) -> int:
    """Bytes of these process trees: "Rss", or "Pss", which counts what several processes share once."""
    total = 0
    for root in pids:
        for pid in machine.process_tree(root):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(f"{what}:"):
                    total += int(line.split()[1]) * 1024
    return total


def client_context() -> ssl.SSLContext:
    """A client that takes any certificate, and asks over HTTP/1.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


def still_open(clients: list[socket.socket]) -> None:
    """Raises BenchError for a proxy that closed what was idle: it would look better than it is."""
    for client in clients:
        client.settimeout(0.0)
        try:
            if not client.recv(1):
                raise BenchError("connections were closed during the measurement")
        except (BlockingIOError, ssl.SSLWantReadError):
            continue


def connect(peer: Peer, context: ssl.SSLContext | None) -> socket.socket:
    """One connection that has asked once."""
    port = peer.plain_port if context is None else peer.tls_port
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    if context is not None:
        client = context.wrap_socket(client, server_hostname=HOST)
    client.sendall(_REQUEST)
    answer = client.recv(65536)
    if not answer.startswith(b"HTTP/1.1 200"):
        raise BenchError(f"the answer was {answer[:40]!r}")
    return client


def measure(peer: Peer, tls: bool, connections: int) -> Cost:
    """Open so many connections, and divide what the proxy grew by."""
    context = client_context() if tls else None
    clients: list[socket.socket] = []
    try:
        clients += [connect(peer, context) for _ in range(WARM)]
        time.sleep(SETTLE_SECONDS)
        before = held(peer.pids, "Rss")
        clients += [connect(peer, context) for _ in range(connections)]
        time.sleep(SETTLE_SECONDS)
        grown = held(peer.pids, "Rss") - before
        still_open(clients)
    finally:
        for client in clients:
            client.close()
    return Cost(peer.name, tls, connections, grown // connections)


def main() -> int:
    """Measure, and print the table; the exit status."""
    parser = argparse.ArgumentParser(description="Memory of idle connections.")
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--peers", default="nginx,portero")
    chosen = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("| peer | | idle connections | bytes each |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="portero-bench-") as folder:
        proxy_core, other_core = machine.cores()
        bench = Bench(Path(folder), proxy_core, other_core, free_port())
        make_files(bench.folder)
        try:
            with peers.running(chosen.peers.split(","), bench) as running:
                for tls in (False, True):
                    for peer in running:
                        most = MOST_OF_NGINX if peer.name == "nginx" else chosen.connections
                        cost = measure(peer, tls, min(chosen.connections, most))
                        word = "TLS" if tls else "plain"
                        print(f"| {cost.peer} | {word} | {cost.connections} | {cost.each} |", flush=True)
        except BenchError as error:
            print(f"idle_memory: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
