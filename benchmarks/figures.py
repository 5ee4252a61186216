"""What the table of peers does not show: latency, the size of the table, workers, registrations, memory.

Each figure starts the proxies that it needs afresh, so that none inherits the memory or the services of
another, and comes to one Section. Peers and porteros take turns within a round here, too.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

from benchmarks import idle_memory, machine, peers, rows
from benchmarks.peers import TWO_WORKERS, Peer
from benchmarks.results import Section
from benchmarks.rows import Row
from benchmarks.samples import Sample, measure
from benchmarks.stage import Bench, BenchError

SIZES = (1, 1000, 10_000)
RENEWED = 100
IDLE_CONNECTIONS = 1000
IDLE_CLIENTS = 2000
LATENCY_CONNECTIONS = 16

T = TypeVar("T")

_SMALL = next(row for row in rows.ROWS if row.key == "h1")
_STREAMS = next(row for row in rows.ROWS if row.key == "h2")


def latency(names: Sequence[str], bench: Bench, rounds: int, seconds: float) -> Section:
    """p50 and p99 of every peer at half of the requests/s that it took at full load just before."""
    found: dict[tuple[Row, str], list[tuple[float, float, float]]] = {}
    with peers.running(list(names), bench) as running:
        for number in range(rounds):
            for row in (_SMALL, _STREAMS):
                for peer in _turns(running, number):
                    full = rows.run(row, peer, seconds, bench.folder, bench.other_core)
                    rate = full.requests / full.seconds / 2
                    times = rows.response_times(
                        row, peer, rate, LATENCY_CONNECTIONS, seconds, bench.folder, bench.other_core
                    )
                    cuts = quantiles(times, n=100)
                    found.setdefault((row, peer.name), []).append(
                        (len(times) / max(1, round(seconds)), cuts[49], cuts[98])
                    )
    lines = []
    for (row, name), measured in found.items():
        rate, half, most = (median(values) for values in zip(*measured, strict=True))
        lines.append((row.title, name, f"{rate:.0f}", f"{half:.0f}", f"{most:.0f}"))
    note = (
        f"h2load over {LATENCY_CONNECTIONS} connections, held to half of the requests/s that came through"
        " this peer at full load just before; from the request to the end of its response, in µs. A peer that"
        " takes more requests is also asked more."
    )
    columns = ("row", "peer", "requests/s", "p50 µs", "p99 µs")
    return Section("Latency at half load", note, columns, tuple(lines))


def services(names: Sequence[str], bench: Bench, rounds: int, seconds: float) -> Section:
    """The cost of a request when 1, 1,000 and 10,000 services are registered."""
    del names
    samples: dict[tuple[int, str], list[Sample]] = {}
    with peers.running(["portero"] * len(SIZES), bench) as running:
        plan = list(zip(SIZES, running, strict=True))
        for size, peer in plan:
            numbers = range(1, size + 1)
            peer.apis[0].register(map(rows.service_name, numbers), bench.backend_port)
            rows.run(_in_turns(size), peer, 1, bench.folder, bench.other_core)
        for number in range(rounds):
            for size, peer in _turns(plan, number):
                for way, row in (("one", _SMALL), ("turns", _in_turns(size))):
                    samples.setdefault((size, way), []).append(measure(row, peer, number, seconds, bench))
    _none_failed([sample for found in samples.values() for sample in found])
    cost = {case: median(sample.cpu_us for sample in found) for case, found in samples.items()}
    lines = []
    for size in SIZES:
        line = [f"{size:,}"]
        for way in ("one", "turns"):
            line += [f"{cost[size, way]:.1f}", f"{cost[size, way] / cost[1, way]:.2f}"]
        lines.append(tuple(line))
    note = (
        f"portero alone, {_SMALL.title}, CPU µs a request and the ratio to one service. Every service has one"
        " backend and came through the API. Asked for is one of them, or all in turns, which also tells what"
        " the caches of the processor and of request heads are worth."
    )
    columns = ("services", "one asked for", "x one service", "all in turns", "x one service")
    return Section("Services in the table", note, columns, tuple(lines))


def workers(names: Sequence[str], bench: Bench, rounds: int, seconds: float) -> Section:
    """One and two workers, free to use every core that the client need not have."""
    del names
    samples: dict[str, list[Sample]] = {"portero": [], TWO_WORKERS: []}
    others: dict[str, list[float]] = {name: [] for name in samples}
    cores = _cores_of_workers(bench)
    with peers.running(list(samples), bench) as running:
        for peer in running:
            _set_cores(peer, cores)
            rows.run(_SMALL, peer, 1, bench.folder, bench.other_core)
        for number in range(rounds):
            for peer in _turns(running, number):
                before = _cpu_of_others(running)
                sample = measure(_SMALL, peer, number, seconds, bench)
                samples[peer.name].append(sample)
                spent = _cpu_of_others(running) - before
                others[peer.name].append(spent / (sample.requests_per_second * seconds) * 1e6)
    _none_failed([sample for found in samples.values() for sample in found])
    lines = []
    for name, count in (("portero", "1"), (TWO_WORKERS, "2")):
        cost = median(sample.cpu_us for sample in samples[name])
        rate = median(sample.requests_per_second for sample in samples[name])
        busy = median(sample.core_share for sample in samples[name])
        client = f"{median(others[name]):.1f}"
        lines.append((count, f"{cost:.1f}", f"{1e6 / cost:.0f}", f"{rate:.0f}", f"{busy:.2f}", client))
    note = (
        f"portero alone, {_SMALL.title}, on {len(cores)} cores; client and backend stay on one"
        f"{', which is one of these' if bench.other_core in cores else ''}. Where cores are shared, requests"
        " per CPU second is the figure to compare: requests/s also has the client's and the backend's CPU"
        " time in it, which the last column shows."
    )
    columns = (
        "workers",
        "CPU µs/request",
        "requests per CPU second",
        "requests/s",
        "cores used",
        "client and backend, CPU µs/request",
    )
    return Section("Workers", note, columns, tuple(lines))


def registrations(names: Sequence[str], bench: Bench, rounds: int, seconds: float) -> Section:
    """How many POSTs a second the API takes while the same process is under full load."""
    del names
    found: dict[str, list[tuple[float, float]]] = {"new services": [], "renewals": []}
    failed = 0
    with (
        peers.running(["portero"], bench) as (peer,),
        ThreadPoolExecutor(2, initializer=lambda: os.sched_setaffinity(0, {bench.other_core})) as pool,
    ):
        for number in range(rounds):
            for what, measured in found.items():
                first = RENEWED + 1 + number * 1_000_000
                numbers = iter(range(first, first + 1_000_000)) if what == "new services" else _cycle(RENEWED)
                load = pool.submit(rows.run, _SMALL, peer, seconds + 1, bench.folder, bench.other_core)
                time.sleep(0.5)  # wrk is at full load by then, and still is when the POSTs end
                started = time.monotonic()
                asked = _until(started + seconds, numbers)
                done = pool.submit(peer.apis[0].register, asked, bench.backend_port).result()
                took = time.monotonic() - started
                tally = load.result()
                failed += tally.failed
                measured.append((done / took, tally.requests / tally.seconds))
    if failed:
        raise BenchError(f"{failed} requests failed while backends registered")
    lines = []
    for what, measured in found.items():
        posts, rate = (median(values) for values in zip(*measured, strict=True))
        lines.append((what, f"{posts:.0f}", f"{rate:.0f}"))
    note = (
        f"portero alone, one worker, {_SMALL.title} at full load; meanwhile POSTs one after the other over"
        f" one connection. Renewals are of {RENEWED} services."
    )
    columns = ("", "registrations/s", "requests/s meanwhile")
    return Section("Registrations under load", note, columns, tuple(lines))


def idle(names: Sequence[str], bench: Bench, rounds: int, seconds: float) -> Section:
    """What the proxies grow by for an idle connection."""
    del rounds, seconds
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lines = []
    with peers.running(list(names), bench) as running:
        for tls in (False, True):
            for peer in running:
                cost = idle_memory.measure(peer, tls, IDLE_CONNECTIONS)
                lines.append((peer.name, "TLS" if tls else "plain", f"{cost.each:,}"))
    note = f"{IDLE_CONNECTIONS} keep-alive connections that have asked once, without the kernel's memory."
    return Section("Memory of idle connections", note, ("peer", "", "bytes each"), tuple(lines))


def memory(names: Sequence[str], bench: Bench, rounds: int, seconds: float) -> Section:
    """What each proxy holds at rest and with idle TLS clients, and what its start costs."""
    del rounds, seconds
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lines = []
    for name in (*names, *([TWO_WORKERS] if "portero" in names else [])):
        with peers.running([name], bench) as (peer,):
            peer.keep_tls_only()
            start = machine.cpu_seconds(peer.pids)
            time.sleep(idle_memory.SETTLE_SECONDS)
            at_rest = idle_memory.held(peer.pids, "Pss")
            clients = []
            try:
                context = idle_memory.client_context()
                clients += [idle_memory.connect(peer, context) for _ in range(IDLE_CLIENTS)]
                time.sleep(idle_memory.SETTLE_SECONDS)
                with_clients = idle_memory.held(peer.pids, "Pss")
                idle_memory.still_open(clients)
            finally:
                for client in clients:
                    client.close()
        held = (f"{size / (1 << 20):.1f}" for size in (at_rest, with_clients))
        lines.append((name, *held, f"{start:.2f}"))
    note = (
        f"MiB (PSS: what processes share counts once) of all processes of each proxy with one certificate and"
        f" one backend, after its start and with {IDLE_CLIENTS:,} TLS connections that have asked once;"
        " without the kernel's memory. Each alone on the machine, but for the nginx that is the backend. And"
        " the CPU time from its start until it serves: a restart waits for it."
    )
    columns = ("peer", "at rest", f"{IDLE_CLIENTS:,} idle clients", "CPU s to serve")
    return Section("Memory at rest", note, columns, tuple(lines))


FIGURES: dict[str, Callable[[Sequence[str], Bench, int, float], Section]] = {
    "latency": latency,
    "services": services,
    "workers": workers,
    "registrations": registrations,
    "idle": idle,
    "memory": memory,
}


# Private


def _turns(all_of_them: Sequence[T], number: int) -> list[T]:
    shift = number % len(all_of_them)
    return [*all_of_them[shift:], *all_of_them[:shift]]


def _in_turns(size: int) -> Row:
    return Row(f"services-{size}", f"{size} services in turns", _SMALL.path, services=size)


def _none_failed(samples: Sequence[Sample]) -> None:
    if failed := sum(sample.failed for sample in samples):
        raise BenchError(f"{failed} requests failed")


def _cores_of_workers(bench: Bench) -> set[int]:
    allowed = os.sched_getaffinity(0)
    return allowed - {bench.other_core} if len(allowed) > 2 else allowed


def _set_cores(peer: Peer, cores: set[int]) -> None:
    for root in peer.pids:
        for pid in machine.process_tree(root):
            with contextlib.suppress(OSError):  # a thread that has ended in the meantime
                for task in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(task.name), cores)


def _cpu_of_others(running: Sequence[Peer]) -> float:
    """CPU seconds of everything that the benchmark started and is not under test: client, backend, itself."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = machine.cpu_seconds([os.getpid()]) - sum(machine.cpu_seconds(peer.pids) for peer in running)
    return living + ended.ru_utime + ended.ru_stime


def _cycle(size: int) -> Iterator[int]:
    while True:
        yield from range(1, size + 1)


def _until(end: float, numbers: Iterator[int]) -> Iterator[str]:
    for number in numbers:
        if time.monotonic() >= end:
            return
        yield rows.service_name(number)
