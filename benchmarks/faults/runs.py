"""One run: a proxy and its backends on a stage of their own, loaded while a scenario happens to them."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from random import Random

from benchmarks.faults.peer import Peer
from benchmarks.faults.report import Row
from benchmarks.faults.scenarios import CALM, Run, Scenario
from benchmarks.faults.stage import stage
from benchmarks.stage import BenchError

#: How often a scenario does what it does repeatedly.
USUAL_TIMES = 10

#: Seconds in which every proxy's health checks have looked at every backend.
_SETTLED = 2.0


@dataclass(frozen=True)
class Effort:
    """How long and how hard: `seconds` of a fault, or None for what the scenario itself says."""

    seed: str = "1"
    rate: float = 200.0
    seconds: float | None = None
    times: int = USUAL_TIMES


def measure(scenario: Scenario, name: str, kind: type[Peer], effort: Effort, commit: str) -> Row:
    """One scenario with one proxy. BenchError: it could not even be begun, or not be counted."""
    seed = f"{effort.seed}-{scenario.key}"
    with stage() as made:
        backends = [made.start_backend() for _ in range(2)]
        peer = kind(made, [backend.address for backend in backends], scenario.descriptors)
        try:
            peer.start(kept_socket=scenario.kept_socket)
            time.sleep(_SETTLED)
            more = ["--clients", str(scenario.clients)] if scenario.clients else ["--rate", str(effort.rate)]
            load = made.start_load(peer.port, "--seed", seed, *more)
            seconds = scenario.seconds if effort.seconds is None else effort.seconds
            run = Run(made, peer, backends, seconds, Random(seed), effort.times)
            try:
                scenario.act(run)
            except BenchError as error:
                # The load goes on: what such a proxy costs is part of the figures.
                run.notes.append(str(error).splitlines()[0])
                print(f"{scenario.key}, {name}: {error}\n{made.last_words()}", file=sys.stderr, flush=True)
                time.sleep(CALM)
            if not peer.is_alive():
                run.notes.append("nobody accepts any more")
            for backend in run.backends:
                backend.send(signal.SIGCONT)
            return Row(scenario.key, name, commit, load.finish(), made.repeated(), run.notes)
        finally:
            peer.close()
