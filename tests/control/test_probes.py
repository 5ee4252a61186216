"""Probes make leases ready and down: real backends on loopback, real leases, workers that remember tables."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from portero_py.config.model import Health, Proxy
from portero_py.control import probes as module
from portero_py.control.leases import Leases
from portero_py.control.probe_connection import Asker
from portero_py.control.probes import SLICE, Probes
from portero_py.core.health import Evidence
from portero_py.core.model import Backend, LeaseRequest, LeaseState
from portero_py.core.policies import ServiceHealth, ServicePolicy
from portero_py.core.probing import Probe, Result
from portero_py.core.registry import Registry
from portero_py.core.routes import NO_ROUTES
from portero_py.feed.feed import Feed
from portero_py.proxy.upstream.tls import UpstreamTls
from tests.control.workers import Worker
from tests.waiting import until

STARTING, READY, DOWN, DRAINING = LeaseState

#: Fast, and never too fast for a busy machine.
QUICK = Health(interval=0.1, timeout=20)


class Site:
    """A backend whose answer a test chooses: a status, or None for none at all."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.asked: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.most_open = 0
        self.let_go = asyncio.Event()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.let_go.set()
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            self.asked.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0])
            if self.status is None:
                waits = [asyncio.create_task(self.let_go.wait()), asyncio.create_task(reader.read())]
                _, others = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in others:
                    task.cancel()
                await asyncio.wait(waits)
            writer.write(b"HTTP/1.1 %d Odd\r\nContent-Length: 0\r\n\r\n" % (self.status or 200))
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it wanted a connection only, or has waited for long enough
        finally:
            self.open -= 1
            writer.close()


class Desk:
    """Leases, a worker, and probes of them."""

    def __init__(self, health: Health = QUICK, asker: Asker | None = None, most: int = 256) -> None:
        self.worker = Worker()
        self.feed = Feed()
        self.feed.subscribe(self.worker)
        self.counted: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.sites: list[Site] = []
        self.leases = Leases(Registry(), self.feed, clock=time.monotonic, count_fault=self._fault)
        self.probes = Probes(
            self.leases,
            health,
            asker or Asker(lambda: UpstreamTls(Proxy()), "http"),
            clock=time.monotonic,
            count=lambda result: self.counted.update([result]),
            count_fault=self._fault,
            most=most,
        )
        self.feed.on_evidence = self.probes.suspect
        self._running: asyncio.Task[None] | None = None

    def _fault(self, where: str) -> None:
        self.faults.update([where])

    async def start(self) -> None:
        await self.leases.start()
        self.run()

    def run(self) -> None:
        self._running = asyncio.create_task(self.probes.run())

    async def stop(self) -> None:
        assert self._running is not None
        self._running.cancel()
        await asyncio.wait([self._running])
        assert self._running.cancelled()

    async def site(self) -> Site:
        one = Site()
        self.sites.append(one)
        await one.start()
        return one

    async def grant(self, port: int, path: str = "/up", *, service: str = "app.example") -> None:
        await self.leases.grant(LeaseRequest(service, Backend("127.0.0.1", port), 600, health_path=path))

    def found(self, port: int, error: str = "reset", *, hangs: bool = False) -> None:
        self.feed.found(Evidence("app.example", "127.0.0.1", port, hangs, error))

    def state(self, port: int) -> LeaseState:
        """As the worker has it."""
        [found] = [
            lease.state
            for lease in self.worker.table.services["app.example"].leases
            if lease.backend.port == port
        ]
        return found


@contextlib.asynccontextmanager
async def desk_with(
    health: Health = QUICK, asker: Asker | None = None, most: int = 256
) -> AsyncIterator[Desk]:
    one = Desk(health, asker, most)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()
        await one.leases.close()
        for site in one.sites:
            await site.stop()
        await until(lambda: not any(site.open for site in one.sites))


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desk_with() as one:
        yield one
        assert not one.faults


async def test_one_that_starts_is_ready_with_its_first_good_answer(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    site = await desk.site()
    site.status = 503
    await desk.grant(site.port)
    await until(lambda: desk.counted["bad_status"] >= 2)
    assert desk.state(site.port) is STARTING
    assert desk.probes.error_at("app.example", "127.0.0.1", site.port) == "probe: status 503 at /up"
    site.status = 200
    await until(lambda: desk.state(site.port) is READY)
    assert f"ready: app.example at http://127.0.0.1:{site.port}: a probe succeeded" in caplog.text
    assert set(site.asked) == {b"GET /up HTTP/1.1"}


async def test_one_that_fails_is_down_and_ready_again_when_it_does_not(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    site = await desk.site()
    await desk.grant(site.port)
    await until(lambda: desk.state(site.port) is READY)
    await site.stop()
    await until(lambda: desk.state(site.port) is DOWN)
    assert "3 probes failed, probe: connection refused" in caplog.text
    await site.start()
    await until(lambda: desk.state(site.port) is READY)
    assert len([record for record in caplog.records if record.name == "portero_py.control.leases"]) == 4


async def test_a_service_is_probed_on_the_terms_of_its_policy_as_soon_as_it_has_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []
    ask = Asker.ask

    async def noted(asker: Asker, probe: Probe, timeout: float) -> tuple[Result, str]:
        asked.append((probe.lease.health_path, timeout))
        return await ask(asker, probe, timeout)

    monkeypatch.setattr(Asker, "ask", noted)
    plain, named = await desk.site(), await desk.site()
    plain.status = 500
    await desk.start()
    await desk.grant(plain.port, "")
    await desk.grant(named.port, "/up")
    await until(lambda: desk.state(named.port) is READY)
    assert desk.state(plain.port) is READY
    policy = ServicePolicy(health_path="/own", health=ServiceHealth(interval=0.05, timeout=19, fall=1))
    desk.leases._registry.configure({"app.example": policy}, NO_ROUTES, time.monotonic())
    await desk.leases._publish()
    asked.clear()
    desk.probes.look()
    await until(lambda: desk.state(plain.port) is DOWN)
    assert {("/own", 19), ("/up", 19)} >= set(asked)
    assert ("/own", 19) in asked
    plain.status = 200
    await until(lambda: desk.state(plain.port) is READY)


async def test_one_without_a_health_path_is_asked_only_when_a_worker_says_that_it_fails(desk: Desk) -> None:
    site, other = await desk.site(), await desk.site()
    await desk.grant(site.port, "")
    await desk.grant(other.port)
    await until(lambda: len(other.asked) >= 3)
    assert (site.connections, desk.state(site.port)) == (0, READY)
    desk.found(site.port)
    await until(lambda: site.connections >= 2)
    assert (site.asked, desk.state(site.port)) == ([], READY)  # a connection proves that it is there
    await site.stop()
    desk.found(site.port)
    await until(lambda: desk.state(site.port) is DOWN)
    await site.start()
    await until(lambda: desk.state(site.port) is READY)
    connections = site.connections
    asked = len(other.asked)
    await until(lambda: len(other.asked) >= asked + 5)
    assert site.connections == connections


async def test_a_stopped_process_is_down_until_it_answers_something() -> None:
    program = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.BaseHTTPRequestHandler); "
    program += "print(s.server_port, flush=True); s.serve_forever()"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        async with desk_with(replace(QUICK, timeout=0.2)) as desk:
            await desk.grant(port, "")
            os.kill(process.pid, signal.SIGSTOP)
            desk.found(port, "no answer within 1 s", hangs=True)
            await until(lambda: desk.state(port) is DOWN)
            assert desk.counted["timeout"] == 1  # one was enough
            await until(lambda: desk.counted["timeout"] >= 4)
            assert desk.state(port) is DOWN  # though the kernel takes connections for it
            os.kill(process.pid, signal.SIGCONT)
            await until(lambda: desk.state(port) is READY)  # 501 to OPTIONS is an answer
    finally:
        process.kill()
        await process.communicate()


async def test_one_that_drains_is_left_alone_until_it_is_ready_again(desk: Desk) -> None:
    site, other = await desk.site(), await desk.site()
    await desk.grant(site.port)
    await desk.grant(other.port)
    await until(lambda: desk.state(site.port) is READY)
    await desk.leases.set_state("app.example", "127.0.0.1", site.port, DRAINING)
    await until(lambda: site.open == 0)
    asked, beside = len(site.asked), len(other.asked)
    await until(lambda: len(other.asked) >= beside + 5)
    assert len(site.asked) == asked
    await desk.leases.set_state("app.example", "127.0.0.1", site.port, READY)
    await until(lambda: len(site.asked) > asked)


@pytest.mark.parametrize("how", ["ends", "moves", "drains", "comes back"])
async def test_the_answer_to_an_old_probe_changes_nothing(desk: Desk, how: str) -> None:
    site, elsewhere = await desk.site(), await desk.site()
    elsewhere.status = 404
    site.status = None
    one = LeaseRequest("app.example", Backend("127.0.0.1", site.port), 600, "one", health_path="/up")
    await desk.leases.grant(one)
    await until(lambda: site.open == 1)
    if how == "ends":
        await desk.leases.release("app.example", "one")
    elif how == "moves":
        await desk.leases.grant(replace(one, backend=Backend("127.0.0.1", elsewhere.port)))
    elif how == "drains":
        await desk.leases.set_state("app.example", "127.0.0.1", site.port, DRAINING)
    else:
        await desk.leases.grant(replace(one, instance_id="two", health_path="/other"))
        await until(lambda: site.open == 2)
        site.status = 404
    tables = desk.worker.tables
    site.let_go.set()
    await until(lambda: desk.counted["ok" if how != "comes back" else "bad_status"] >= 1)
    states = {lease.state for lease in desk.worker.table.services["app.example"].leases}
    assert states == {"ends": set(), "moves": {STARTING}, "drains": {DRAINING}, "comes back": {STARTING}}[how]
    assert desk.worker.tables == tables


async def test_a_backend_that_hangs_keeps_no_other_waiting(desk: Desk) -> None:
    hanging, well = await desk.site(), await desk.site()
    hanging.status = None
    await desk.grant(hanging.port)
    await desk.grant(well.port)
    await until(lambda: len(well.asked) >= 10)
    assert (len(hanging.asked), desk.state(hanging.port), desk.state(well.port)) == (1, STARTING, READY)


async def test_many_are_all_probed_and_never_more_than_so_many_at_a_time() -> None:
    async with desk_with(replace(QUICK, interval=1), most=20) as desk:
        site = await desk.site()
        requests = [
            LeaseRequest(f"{n}.example", Backend("127.0.0.1", site.port), None, health_path="/up")
            for n in range(300)
        ]
        await desk.leases.replace("static", requests)
        await until(
            lambda: all(
                lease.state is READY
                for service in desk.worker.table.services.values()
                for lease in service.leases
            )
        )
        assert site.most_open <= 20
        assert desk.worker.tables < 200  # verdicts share tables
        assert not desk.faults


async def test_what_was_there_before_the_start_is_probed_too() -> None:
    former = Registry()
    async with desk_with() as desk:
        site = await desk.site()
        backend = Backend("127.0.0.1", site.port)
        former.register(LeaseRequest("app.example", backend, 600, health_path="/up"), time.monotonic())
        desk.leases.restore(former.table.services.values(), former.table.version)
        desk.probes.look()
        await desk.leases.grant(LeaseRequest("app.example", Backend("127.0.0.1", 9), 600))
        await until(lambda: desk.state(site.port) is READY)


async def test_new_times_hold_at_once() -> None:
    async with desk_with(Health(interval=3600, timeout=20, fall=3)) as desk:
        site = await desk.site()
        await desk.grant(site.port)
        await until(lambda: desk.state(site.port) is READY)
        site.status = 500
        desk.probes.reconfigure(Health(interval=0.1, timeout=20, fall=1))
        await until(lambda: desk.state(site.port) is DOWN)
        assert desk.counted["bad_status"] == 1


async def test_evidence_of_what_nobody_has_is_dropped(desk: Desk) -> None:
    desk.found(9)
    assert desk.probes.error_at("app.example", "127.0.0.1", 9) == ""


async def test_when_it_ends_its_probes_end_and_it_can_begin_again() -> None:
    async with desk_with() as desk:
        site = await desk.site()
        site.status = None
        await desk.grant(site.port)
        await until(lambda: site.open == 1)
        await desk.stop()
        await until(lambda: site.open == 0)
        site.status = 200
        desk.run()
        await until(lambda: desk.state(site.port) is READY)


class Broken(Asker):
    """Fails as only a bug does, for as long as it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda: UpstreamTls(Proxy()), "http")
        self.is_broken = True

    async def ask(self, probe: Probe, seconds: float) -> tuple[Result, str]:
        if self.is_broken:
            raise RuntimeError("a bug")
        return await super().ask(probe, seconds)


async def test_a_fault_of_portero_in_one_probe_is_counted_and_says_nothing_about_the_backend(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asker = Broken()
    async with desk_with(asker=asker) as desk:
        site = await desk.site()
        await desk.grant(site.port)
        await until(lambda: desk.faults["probes"] >= 5)
        assert desk.state(site.port) is STARTING
        assert desk.counted["no_verdict"] >= 5
        assert "a probe failed" in caplog.text
        asker.is_broken = False
        await until(lambda: desk.state(site.port) is READY)


async def test_a_verdict_that_cannot_be_carried_out_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk_with() as desk:
        site = await desk.site()
        judge = desk.leases.judge

        async def fail(verdicts: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(desk.leases, "judge", fail)
        await desk.grant(site.port)
        await until(lambda: desk.faults["probes"] >= 2)
        monkeypatch.setattr(desk.leases, "judge", judge)
        await until(lambda: desk.state(site.port) is READY)


async def test_others_on_the_loop_have_a_turn_between_a_few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process these others are the traffic."""
    begun: list[int] = []
    turns: list[int] = []

    class Counting(Asker):
        async def ask(self, probe: Probe, seconds: float) -> tuple[Result, str]:
            begun.append(1)
            return Result.OK, ""

    monkeypatch.setattr(module, "TICK", 0.5)
    async with desk_with(asker=Counting(lambda: UpstreamTls(Proxy()), "http")) as desk:

        async def take_turns() -> None:
            while True:
                turns.append(len(begun))
                await asyncio.sleep(0)

        others = asyncio.create_task(take_turns())
        requests = [
            LeaseRequest(f"{n}.example", Backend("127.0.0.1", 9), None, health_path="/up") for n in range(200)
        ]
        await desk.leases.replace("static", requests)
        await until(lambda: len(begun) >= 200)
        others.cancel()
        await asyncio.wait([others])
    steps = [later - earlier for earlier, later in itertools.pairwise(turns)]
    assert 1 <= max(steps) <= SLICE
