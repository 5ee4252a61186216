"""A proxy with two workers, a fleet that comes and goes, and everything that can happen to them at once.

    PORTERO_CHAOS_SEED=7 PORTERO_CHAOS_SECONDS=600 make test-slow

The story: warm up, come to rest, be measured; then load, and faults from a seeded deck, for ten minutes,
while services are deployed, drained and paused; then peace, and the same rest, with as much memory as in the
second minute. `PORTERO_CHAOS_WITHOUT=hang-worker,upgrade` leaves faults out (the names are in `chaos_faults`;
also `deploys` and `drains`). The seed decides what is done and in which order; when, the machine has its say
too. Without one it is always the same: whoever looks for more tries others.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
from pathlib import Path

import pytest

from tests.e2e.certificates import Authority, client_context
from tests.e2e.proxy_process import ProxyProcess
from tests.slow.chaos_backends import HEALTH_PATH, Agents, Backend, RegistrationClient
from tests.slow.chaos_deploys import Deploys, Drains
from tests.slow.chaos_faults import (
    GOOD_TOML,
    BackendChurn,
    CertificateChurn,
    LeaseChurn,
    ProcessFaults,
    ProxyEnded,
)
from tests.slow.chaos_journal import Breakage, Journal, now
from tests.slow.chaos_judge import Verdict
from tests.slow.chaos_ledger import LAG, Certificates, Leases
from tests.slow.chaos_load import Load, Services
from tests.slow.chaos_processes import Processes
from tests.slow.chaos_watch import (
    CertificateWatch,
    LeaseWatch,
    MemoryWatch,
    every_worker_serves,
    rest,
    same_rest,
)

SEED = int(os.environ.get("PORTERO_CHAOS_SEED") or 7)
SECONDS = float(os.environ.get("PORTERO_CHAOS_SECONDS") or 600)
WITHOUT = frozenset(filter(None, os.environ.get("PORTERO_CHAOS_WITHOUT", "").split(",")))

WORKERS = 2
#: What each process of the proxy may open: far above what the load needs, far below what the floods want.
NOFILE = 300

STEADY = ("steady-0.chaos.test", "steady-1.chaos.test")
SHAKY = ("shaky-0.chaos.test", "shaky-1.chaos.test")  # of the second one's backends the health is asked
ROLLING = ("rolling-0.chaos.test", "rolling-1.chaos.test")
FLEETING = ("fleeting-0.chaos.test", "fleeting-1.chaos.test")


class Run:
    """One run, put together. What is random in it has a source of its own, made from the seed."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal()
        self.leases = Leases()
        self.promises = Certificates(self.journal)
        self.authority = Authority()
        self.certificates = CertificateChurn(
            self.journal,
            self.promises,
            self.authority,
            folder / "certs",
            random.Random(f"{SEED} certificates"),
            without=WITHOUT,
        )
        self.certificates.begin()
        (folder / "state").mkdir()
        self.proxy = ProxyProcess(
            folder / "proxy",
            certificates=folder / "certs",
            toml=GOOD_TOML,
            flags=("--workers", str(WORKERS), "--state-dir", str(folder / "state")),
        )
        self.api = RegistrationClient(self.proxy.register_port)
        self.agents = Agents(self.journal, self.leases, self.api)
        self.backends: list[Backend] = []
        self.keeping: list[asyncio.Task[None]] = []
        self.members: list[tuple[str, Backend]] = []  # of the shaky services, those that die
        self.steady: list[tuple[str, Backend]] = []  # of the steady services
        self.extras: list[Backend] = []  # they serve what is registered for a short while
        self.churn = LeaseChurn(self.journal, self.agents, self.extras, random.Random(f"{SEED} leases"))
        self.load = Load(
            self.journal,
            self.leases,
            self.proxy.port,
            client_context(self.authority.pem, "http/1.1"),
            client_context(self.authority.pem, "h2"),
            Services(STEADY, SHAKY, ROLLING, lambda: [*FLEETING, *self.churn.services()]),
            str(SEED),
        )
        self.deploys = Deploys(
            self.journal, self.agents, ROLLING, self._backend, random.Random(f"{SEED} deploys")
        )

    async def open(self) -> None:
        """Start the proxy and the fleet."""
        self.proxy.start(("prlimit", f"--nofile={NOFILE}:{NOFILE}"))
        self.processes = Processes(self.proxy.pid, self.proxy.port)
        for service in STEADY + SHAKY:
            for number in range(2):
                backend = await self._add(
                    service, f"{service.split('.')[0]}-good-{number}", ttl=60, renew_after=15
                )
                if service in STEADY:
                    self.steady.append((service, backend))
        for service in SHAKY:
            for number in range(2):
                backend = await self._add(
                    service, f"{service.split('.')[0]}-bad-{number}", ttl=20, renew_after=1
                )
                self.members.append((service, backend))
        for service in FLEETING:
            await self._add(service, f"{service.split('.')[0]}-only", ttl=4, renew_after=1.3)
        await self.deploys.begin()
        for number in range(3):
            self.extras.append(await self._backend(f"extra-{number}"))

    async def quiet(self) -> None:
        """No client, and no connection to any backend."""
        await self.load.stop()
        for backend in self.backends:
            backend.hang_up()

    async def close(self) -> None:
        """End the fleet."""
        await self.load.stop()
        await self.deploys.close()
        for task in self.keeping:
            task.cancel()
        await asyncio.gather(*self.keeping, return_exceptions=True)
        for backend in self.backends:
            await backend.die()

    # Private

    async def _backend(self, instance: str) -> Backend:
        backend = Backend(instance, self.journal)
        await backend.live()
        self.backends.append(backend)
        return backend

    async def _add(self, service: str, instance: str, *, ttl: int, renew_after: float) -> Backend:
        backend = await self._backend(instance)
        health_path = HEALTH_PATH if service == SHAKY[1] else ""
        assert await self.agents.register(service, instance, backend.port, ttl, health_path)
        keep = self.agents.keep(service, backend, ttl, renew_after, health_path)
        self.keeping.append(asyncio.create_task(keep, name=f"agent of {instance}"))
        return backend


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
async def test_no_lease_and_no_exchange_is_lost_in_chaos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.get_running_loop().set_debug(False)  # the load is ours, and there is one core for it
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with capsys.disabled():
        print(f"\nchaos: PORTERO_CHAOS_SEED={SEED} PORTERO_CHAOS_SECONDS={SECONDS:g}", flush=True)
    run = Run(tmp_path)
    try:
        await run.open()
        await _live_through(run)
    except* ProxyEnded as ended:
        run.journal.broke(Breakage("process", "proxy", now(), now(), str(ended.exceptions[0])))
    finally:
        await run.close()
        run.proxy.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    verdict = Verdict(run.journal)
    with capsys.disabled():
        print(verdict.summary(f"chaos: seed {SEED}, {SECONDS:g} s, {run.leases.granted} leases granted"))
    if verdict.unexplained:
        count = len(verdict.unexplained)
        pytest.fail(
            f"seed {SEED}: {count} breakages that nothing explains\n{verdict.story()}"
            f"\n\nthe proxy's errors:\n{_errors(run.proxy)}",
            pytrace=False,
        )


async def _live_through(run: Run) -> None:
    journal = run.journal
    memory = MemoryWatch(journal, run.processes)
    leases = LeaseWatch(journal, run.leases, run.api)
    handshakes = CertificateWatch(
        journal, run.promises, run.proxy.port, run.authority.pem, random.Random(f"{SEED} handshakes")
    )
    faults = ProcessFaults(
        journal,
        run.proxy,
        run.processes,
        run.api,
        random.Random(f"{SEED} processes"),
        nofile=NOFILE,
        without=WITHOUT,
    )
    # Warm up, and rest. Who has taken another's place holds a socket of its: that is to be measured.
    run.load.start()
    await asyncio.sleep(min(4.0, SECONDS / 4))
    if "upgrade" not in WITHOUT:
        await faults.upgrade()
    await run.quiet()
    before = await rest(run.processes, run.api)
    journal.note("at rest")

    # Chaos.
    run.load.start()
    until = now() + SECONDS
    backends = BackendChurn(
        journal, run.agents, run.members, random.Random(f"{SEED} backends"), without=WITHOUT
    )
    drains = Drains(journal, run.api, run.steady, STEADY, random.Random(f"{SEED} drains"))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(faults.run(until))
        tasks.create_task(run.certificates.run(until))
        tasks.create_task(run.churn.run(until))
        tasks.create_task(run.churn.burst(until))
        tasks.create_task(backends.run(until))
        tasks.create_task(leases.run(until))
        tasks.create_task(handshakes.run(until))
        tasks.create_task(memory.run(until))
        if "deploys" not in WITHOUT:
            tasks.create_task(run.deploys.run(until))
        if "drains" not in WITHOUT:
            tasks.create_task(drains.run(until))

    # Peace: everything good once more, and time to notice it.
    journal.note("peace")
    run.certificates.end()
    await asyncio.sleep(LAG)
    await run.load.stop()
    await leases.look()
    for name in run.promises.names:
        for _ in range(8):
            await handshakes.look(name)
    await every_worker_serves(journal, run.leases, run.proxy.port, run.load.tls, WORKERS)
    await run.churn.end()
    await leases.look()
    await run.quiet()
    await same_rest(before, run.processes, run.api, journal)
    try:
        run.proxy.stop()
    except AssertionError as error:
        journal.broke(Breakage("end", "proxy", now(), now(), str(error)[:6000]))


def _errors(proxy: ProxyProcess) -> str:
    """The last of the lines that an operator should have seen; of bad certificates there are too many."""
    words = (" ERROR ", " CRITICAL ", "Error: ", "Traceback")
    lines = [line for line in proxy.operator_log().splitlines() if any(word in line for word in words)]
    return "\n".join([line for line in lines if " certificates: certificate " not in line][-40:])
