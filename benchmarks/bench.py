"""CPU time a request of portero-py beside nginx, HAProxy and Caddy, all in one run.

    python -m benchmarks.bench [--rows h1,h2] [--peers nginx,portero] [--rounds 5] [--seconds 3] [--json FILE]

Each proxy is the same reverse proxy, pinned to one core, before the same nginx backend; that backend and the
client share the next core. CPU time is the figure to compare: it is what a request costs the proxy, whoever
else the machine is busy with. Requests/s are what came through, often limited by the client's core.

The peers take turns within a round, in an order that shifts by one every round, and the medians over the
rounds are shown: whatever disturbs the machine disturbs all of them. Before the rounds every peer's answer is
checked for status, length, protocol and cipher; one failed request afterwards, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks import machine, peers, rows
from benchmarks.peers import Peer
from benchmarks.rows import Row
from benchmarks.stage import Bench, BenchError, free_port, make_files

WARM_SECONDS = 1.0
NEEDED = {
    "nginx": "nginx-light",
    "wrk": "wrk",
    "h2load": "nghttp2-client",
    "curl": "curl",
    "taskset": "util-linux",
}


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


def run_rounds(
    plan: list[Row],
    running: list[Peer],
    bench: Bench,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> list[Sample]:
    """Check every peer at every row, warm it up, then measure them in turns."""
    for row in plan:
        for peer in running:
            rows.verify(row, peer, bench.folder, bench.other_core)
            rows.run(row, peer, WARM_SECONDS, bench.folder, bench.other_core)
    samples = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for row in plan:
            for turn in range(len(running)):
                peer = running[(turn + number) % len(running)]
                samples.append(measure(row, peer, number, seconds, bench))
    return samples


def table(plan: list[Row], names: list[str], samples: list[Sample]) -> str:
    """The medians as a Markdown table: CPU µs a request, requests/s, and the ratios to nginx and to Caddy."""
    lines = [
        "| row | peer | CPU µs/request | min .. max | requests/s | core | x nginx | x Caddy | failed |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in plan:
        found = {name: [s for s in samples if (s.row, s.peer) == (row.key, name)] for name in names}
        cost = {name: median(s.cpu_us for s in found[name]) for name in names}
        for name in names:
            mine = found[name]
            spread = f"{min(s.cpu_us for s in mine):.1f} .. {max(s.cpu_us for s in mine):.1f}"
            rate = median(s.requests_per_second for s in mine)
            share = median(s.core_share for s in mine)
            ratios = " | ".join(
                f"{cost[name] / cost[to]:.2f}" if to in cost else "" for to in ("nginx", "caddy")
            )
            failed = sum(s.failed for s in mine)
            head = f"| {row.title} | {name} | {cost[name]:.1f} | {spread} | {rate:.0f} | {share:.0%}"
            lines.append(f"{head} | {ratios} | {failed} |")
    return "\n".join(lines)


def main() -> int:
    """Run what the command line asks for. 0: all well; 1: failed requests; 2: could not measure."""
    options = _options()
    plan = [
        row
        for row in rows.ROWS
        if (row.key in options.rows if options.rows else row.quick or not options.quick)
    ]
    missing = {name: package for name, package in NEEDED.items() if machine.program(name) is None}
    if missing:
        print(
            f"bench: {', '.join(missing)} not found: apt-get install {' '.join(missing.values())}",
            file=sys.stderr,
        )
        return 2
    names = [name for name in options.peers if peers.is_installed(name)]
    for name in set(options.peers) - set(names):
        print(f"bench: left out {name}: not installed", file=sys.stderr)
    # SIGTERM must run the `finally` that ends the proxies, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = machine.describe()
    try:
        samples = _measure_all(plan, names, options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(f"{options.rounds} rounds of {options.seconds:g} s, medians\n\n{table(plan, names, samples)}")
    if options.json:
        result = {"machine": about, "samples": [asdict(sample) for sample in samples]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(sample.failed for sample in samples) else 0


# Private


def _measure_all(plan: list[Row], names: list[str], options: argparse.Namespace) -> list[Sample]:
    with tempfile.TemporaryDirectory(prefix="portero-bench-") as scratch:
        folder = Path(scratch)
        make_files(folder)
        proxy_core, other_core = machine.cores()
        bench = Bench(folder, proxy_core, other_core, free_port())
        try:
            with peers.running(names, bench) as running:
                return run_rounds(plan, running, bench, options.rounds, options.seconds, _say)
        except BenchError as error:
            raise BenchError(f"{error}\n{_last_words(folder)}") from error


def _is_asked_for(name: str, options: argparse.Namespace) -> bool:
    """Without --peers: all, but a compiled build only where there is one and time for it."""
    return name != "portero-compiled" or (peers.is_installed(name) and not options.quick)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _last_words(folder: Path) -> str:
    lines = []
    for log in sorted(folder.glob("*.log")):
        lines += [f"  {log.stem}: {line}" for line in log.read_text(errors="replace").splitlines()[-5:]]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    def keys(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            asked = text.split(",")
            if unknown := [key for key in asked if key not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
            return asked

        return parse

    parser = argparse.ArgumentParser(
        prog="bench", description="CPU time a request beside nginx, HAProxy and Caddy."
    )
    parser.add_argument("--rows", type=keys(tuple(row.key for row in rows.ROWS)), help="keys, with commas")
    parser.add_argument("--peers", type=keys(peers.PEERS), help="names, with commas")
    parser.add_argument("--rounds", type=int, help="default 5 (--quick: 2)")
    parser.add_argument("--seconds", type=float, help="a measurement, whole seconds; default 3 (--quick: 2)")
    parser.add_argument("--quick", action="store_true", help="the main rows, in under two minutes")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    options = parser.parse_args()
    options.peers = options.peers or [name for name in peers.PEERS if _is_asked_for(name, options)]
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (2.0 if options.quick else 3.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
