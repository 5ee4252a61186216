"""One measurement: a peer is loaded once, and the CPU time that it used is divided by the requests."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import machine, rows
from benchmarks.peers import Peer
from benchmarks.rows import Row
from benchmarks.stage import Bench, BenchError


@dataclass(frozen=True)
class Sample:
    """One measurement of one peer at one row."""

    row: str
    peer: str
    round: int
    cpu_us: float
    requests_per_second: float
    failed: int
    core_share: float  # how much of its core the proxy used, 0 to 1


def measure(row: Row, peer: Peer, number: int, seconds: float, bench: Bench) -> Sample:
    """Load the peer once and divide the CPU time that it used by the requests that came through."""
    before = machine.cpu_seconds(peer.pids)
    tally = rows.run(row, peer, seconds, bench.folder, bench.other_core)
    used = machine.cpu_seconds(peer.pids) - before
    if not tally.requests:
        raise BenchError(f"{peer.name}, {row.title}: no request came through")
    return Sample(
        row=row.key,
        peer=peer.name,
        round=number,
        cpu_us=used / tally.requests * 1e6,
        requests_per_second=tally.requests / tally.seconds,
        failed=tally.failed,
        core_share=used / tally.seconds,
    )
