"""CPU time a request of portero-py beside nginx, HAProxy and Caddy, all in one run.

    python -m benchmarks.bench [--rows h1,h2] [--peers nginx,portero] [--rounds 5] [--seconds 3] [--json FILE]
        [--results FOLDER]

Each proxy is the same reverse proxy, pinned to one core, before the same nginx backend; that backend and the
client share the next core. CPU time is the figure to compare: it is what a request costs the proxy, whoever
else the machine is busy with. Requests/s are what came through, often limited by the client's core.

The peers take turns within a round, in an order that shifts by one every round, and the medians over the
rounds are shown: whatever disturbs the machine disturbs all of them. Before the rounds every peer's answer is
checked for status, length, protocol and cipher; one failed request afterwards, and the exit status is 1.
What the table does not show (`figures.py`: latency, services, workers, registrations, memory) follows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine, peers, results, rows
from benchmarks.figures import FIGURES
from benchmarks.peers import Peer
from benchmarks.results import Section
from benchmarks.rows import Row
from benchmarks.samples import Sample, measure
from benchmarks.stage import Bench, BenchError, free_port, make_files

WARM_SECONDS = 1.0
FIGURE_ROUNDS = 3
NEEDED = {
    "nginx": "nginx-light",
    "wrk": "wrk",
    "h2load": "nghttp2-client",
    "curl": "curl",
    "taskset": "util-linux",
}


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


def main() -> int:
    """Run what the command line asks for. 0: all well; 1: failed requests; 2: could not measure."""
    options = _options()
    plan, wanted = _plan(options)
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
        sections, missing_sections = _measure_figures(wanted, names, options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    how = f"{options.rounds} rounds of {options.seconds:g} s"
    if sections and options.rounds > FIGURE_ROUNDS:
        how += f" ({FIGURE_ROUNDS} for what is below the table)"
    how += ", medians"
    parts = [results.table(plan, names, samples)] if plan else []
    parts += [results.section_text(section) for section in sections]
    print("\n\n".join([how, *parts, *missing_sections]))
    if options.results:
        beside_nginx = results.ratios(plan, names, samples)
        results.save(options.results, about, how, beside_nginx, [*parts, *missing_sections])
    if options.json:
        result = {
            "machine": about,
            "samples": [asdict(sample) for sample in samples],
            "sections": [asdict(section) for section in sections],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if missing_sections or any(sample.failed for sample in samples) else 0


# Private


def _plan(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows of the table, and the keys of the figures beside it."""
    if options.rows:
        plan = [row for row in rows.ROWS if row.key in options.rows]
        return plan, [key for key in FIGURES if key in options.rows]
    return [row for row in rows.ROWS if row.quick or not options.quick], [] if options.quick else [*FIGURES]


def _measure_all(plan: list[Row], names: list[str], options: argparse.Namespace) -> list[Sample]:
    if not plan:
        return []
    with _stage() as bench, peers.running(names, bench) as running:
        return run_rounds(plan, running, bench, options.rounds, options.seconds, _say)


def _measure_figures(
    keys: list[str], names: list[str], options: argparse.Namespace
) -> tuple[list[Section], list[str]]:
    """The figures; one that cannot be measured does not cost the others, but a line that says so."""
    sections, missing = [], []
    for key in keys:
        _say(key)
        try:
            with _stage() as bench:
                sections.append(
                    FIGURES[key](names, bench, min(options.rounds, FIGURE_ROUNDS), options.seconds)
                )
        except BenchError as error:
            print(f"bench: {key}: {error}", file=sys.stderr)
            missing.append(f"`{key}` could not be measured.")
    return sections, missing


@contextlib.contextmanager
def _stage() -> Iterator[Bench]:
    """A scratch folder with its files; what fails on it is told with the last lines of the logs."""
    with tempfile.TemporaryDirectory(prefix="portero-bench-") as scratch:
        folder = Path(scratch)
        make_files(folder)
        proxy_core, other_core = machine.cores()
        try:
            yield Bench(folder, proxy_core, other_core, free_port())
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
    parser.add_argument(
        "--rows", type=keys((*(row.key for row in rows.ROWS), *FIGURES)), help="keys, with commas"
    )
    parser.add_argument("--peers", type=keys(peers.PEERS), help="names, with commas")
    parser.add_argument("--rounds", type=int, help="default 5 (--quick: 2)")
    parser.add_argument("--seconds", type=float, help="a measurement, whole seconds; default 3 (--quick: 2)")
    parser.add_argument("--quick", action="store_true", help="the main rows, in under two minutes")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--results", type=Path, help="write RESULTS.md and results.svg to this folder")
    options = parser.parse_args()
    options.peers = options.peers or [name for name in peers.PEERS if _is_asked_for(name, options)]
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (2.0 if options.quick else 3.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
