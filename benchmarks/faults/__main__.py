"""Faults, counted: portero-py beside HAProxy, nginx and Caddy under the same load and the same failures.

    python -m benchmarks.faults --scenarios frozen,500 --peers portero,haproxy

Each peer has the machine to itself for each scenario. Figures are figures: nothing is asserted here, and the
exit status says only whether they could be had.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from benchmarks.faults import report, scenarios
from benchmarks.faults.caddy import Caddy
from benchmarks.faults.haproxy import Haproxy
from benchmarks.faults.nginx import Nginx
from benchmarks.faults.peer import Peer
from benchmarks.faults.portero import Portero, PorteroCompiled, PorteroTwoWorkers
from benchmarks.faults.report import Row
from benchmarks.faults.runs import USUAL_TIMES, Effort, measure
from benchmarks.peers import TWO_WORKERS, is_installed
from benchmarks.stage import BenchError

PEERS: dict[str, type[Peer]] = {
    "portero": Portero,
    "portero-compiled": PorteroCompiled,
    TWO_WORKERS: PorteroTwoWorkers,
    "haproxy": Haproxy,
    "nginx": Nginx,
    "caddy": Caddy,
}

#: What is compared when nobody says otherwise.
USUAL = ("portero", "haproxy", "nginx", "caddy")

#: What a `--quick` run does of everything: to see that all of it works.
QUICK_SECONDS = 5.0
QUICK_TIMES = 2

#: What `machine.describe` tells too, and nobody uses here.
_UNUSED = ("wrk", "h2load")


def main() -> int:
    """Run what the command line asks for. 0: all well; 2: something could not be measured."""
    options = _options()
    names = [name for name in options.peers if is_installed(name)]
    for name in set(options.peers) - set(names):
        _say(f"faults: left out {name}: not installed")
    # SIGTERM must run the `finally` that ends the proxies, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = machine.describe()
    titles = {each.key: each.title for each in scenarios.SCENARIOS}
    rows, missing = [], 0
    for scenario in scenarios.SCENARIOS:
        if scenario.key not in options.scenarios:
            continue
        for name in names:
            try:
                row = measure(scenario, name, PEERS[name], _effort(options), about["commit"])
            except BenchError as error:
                _say(f"faults: {scenario.key}, {name}: {error}")
                missing += 1
                continue
            rows.append(row)
            _say(_told(row))
            if options.results:  # at once: a long run may be interrupted
                _publish(options.results, options.page, about, rows, titles)
    print(report.details(rows, titles))
    return 2 if missing else 0


# Private


def _effort(options: argparse.Namespace) -> Effort:
    return Effort(options.seed, options.rate, options.seconds, QUICK_TIMES if options.quick else USUAL_TIMES)


def _told(row: Row) -> str:
    tally = row.tally
    lost = ", ".join(f"{count} {way}" for way, count in tally.ways().items()) or "nothing lost"
    lines = [f"{row.scenario}, {row.peer}: {tally.total_answered} of {tally.total_sent}: {lost}"]
    lines[0] += f"; p99 {tally.p99:.3f} s, slowest {max(tally.slowest.values(), default=0):.2f} s"
    lines += [f"    {text}" for text in [*report.remarks(row), *tally.examples]]
    return "\n".join(lines)


def _publish(
    results: Path, page: Path, about: dict[str, str], rows: list[Row], titles: dict[str, str]
) -> None:
    rows = report.merged(report.read(results), rows, list(titles), list(PEERS))
    report.keep(results, about, rows)
    commits = sorted({row.commit for row in rows})
    shown = {**about, "commit": " and ".join(commits)}
    machine_line = ", ".join(f"{key} {value}" for key, value in shown.items() if key not in _UNUSED)
    text = [report.summary(rows, titles), report.details(rows, titles), f"Measured with: {machine_line}."]
    page.write_text(report.into(page.read_text(), "\n\n".join(text)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    def keys(known: list[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            asked = text.split(",")
            if unknown := [key for key in asked if key not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
            return asked

        return parse

    known = [each.key for each in scenarios.SCENARIOS]
    parser = argparse.ArgumentParser(prog="faults", description="Faults under load, beside the peers.")
    parser.add_argument("--scenarios", type=keys(known), default=known, help="keys, with commas")
    parser.add_argument("--peers", type=keys(list(PEERS)), default=list(USUAL), help="names, with commas")
    parser.add_argument("--seconds", type=float, help="how long a fault lasts")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second; default 200")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--quick", action="store_true", help="everything, but briefly")
    parser.add_argument("--results", type=Path, help="keep the rows in this file, beside those that it has")
    parser.add_argument("--page", type=Path, default=Path("docs/reliability.md"), help="where the tables go")
    options = parser.parse_args()
    if options.quick and options.seconds is None:
        options.seconds = QUICK_SECONDS
    return options


if __name__ == "__main__":
    sys.exit(main())
