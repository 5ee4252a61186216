"""The contract of a provider, proved by the fixed backends of the configuration, in a real control plane."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from portero_py.config.model import Address, Config, FixedBackend, FixedService, Proxy, Registration, Tls
from portero_py.control.api.state import State
from portero_py.control.leases import Leases
from portero_py.control.providers import static
from portero_py.control.providers.provider import Provider
from portero_py.control.providers.static import StaticBackends
from portero_py.core.certificates import Certificate
from portero_py.core.model import Backend, LeaseRequest, LeaseState
from portero_py.core.policies import DEFAULTS, ServicePolicy
from portero_py.core.registry import Registry
from portero_py.core.routes import Route
from portero_py.core.routing_table import RoutingTable
from portero_py.feed.feed import Feed
from portero_py.run.control_plane import ControlPlane
from portero_py.run.sockets import Listening
from portero_py.run.tuning import Shares
from tests.control.workers import Worker
from tests.waiting import until

CORAL, TEAL = Backend("::1", 8001), Backend("::1", 8002, use_tls=True)


async def _nobody(names: list[str]) -> list[Certificate]:
    return []


@contextlib.asynccontextmanager
async def control(
    *providers: Provider,
    services: tuple[FixedService, ...] = (),
    state_dir: Path | None = None,
    former: RoutingTable | None = None,
) -> AsyncIterator[tuple[Worker, ControlPlane]]:
    """A control plane with these providers, in the place of one whose last table was `former`."""
    config = Config(
        registration=Registration(secret="open sesame", hmac_keys=(("", "k" * 32),)),
        tls=Tls(enabled=False),
        state_dir=str(state_dir or ""),
        services=services,
    )
    feed, worker = Feed(), Worker()
    feed.subscribe(worker)
    plane = ControlPlane(config, Listening([], []), 443, feed, Shares(8, 8, 8), providers=providers)
    if former is None:
        await plane.load()
    else:
        await plane.take_over(former, _nobody)
    try:
        await plane.serve()
        plane.state = State.READY
        yield worker, plane
    finally:
        await plane.close()


def fixed(*backends: str, name: str = "app.example", policy: ServicePolicy = DEFAULTS) -> FixedService:
    """A service of the configuration with `host:port`s."""
    found = []
    for backend in backends:
        host, _, port = backend.rpartition(":")
        found.append(FixedBackend(Address(host.strip("[]"), int(port))))
    return FixedService(name, tuple(found), policy)


async def test_fixed_backends_are_there_before_the_first_request_and_for_ever() -> None:
    async with control(services=(fixed("[::1]:8001", "10.0.0.1:80"),)) as (worker, _):
        assert worker.addresses("app.example") == ["[::1]:8001", "10.0.0.1:80"]
        for lease in worker.table.services["app.example"].leases:
            assert (lease.source, lease.can_serve(1e18)) == ("static", True)


@pytest.mark.parametrize("how", ["the snapshot", "the workers"])
async def test_after_a_restart_the_list_is_what_it_says_now(tmp_path: Path, how: str) -> None:
    state = tmp_path if how == "the snapshot" else None
    both, one = fixed("[::1]:8001", "[::1]:8002"), fixed("[::1]:8002")
    async with control(services=(both,), state_dir=state) as (worker, _):
        assert len(worker.addresses("app.example")) == 2
    former = None if state else worker.table
    async with control(services=(one,), state_dir=state, former=former) as (worker, _):
        assert worker.addresses("app.example") == ["[::1]:8002"]
    former = None if state else worker.table
    async with control(state_dir=state, former=former) as (worker, _):
        assert worker.addresses("app.example") == []


async def test_policies_routes_and_backends_change_in_one_table() -> None:
    async with control(services=(fixed("[::1]:1", "[::1]:2"), fixed("[::1]:9", name="old.example"))) as (
        worker,
        plane,
    ):
        policy = ServicePolicy(max_in_flight=3)
        config = replace(
            plane._config,
            services=(fixed("[::1]:2", "[::1]:3", policy=policy), fixed("[::1]:4", name="new.example")),
            routes=(Route("www.example", "/api", "app.example"),),
            proxy=Proxy(default_service="new.example"),
        )
        former, tables = worker.table, worker.tables
        await plane.reconfigure(config)
        table = worker.table
        assert worker.tables == tables + 1  # not one after the other
        assert worker.addresses("app.example") == ["[::1]:2", "[::1]:3"]
        assert [lease.max_in_flight for lease in table.services["app.example"].leases] == [3, 3]
        assert worker.addresses("new.example") == ["[::1]:4"]
        assert worker.addresses("old.example") == []
        assert table.default_service == "new.example"
        assert table.routes.find("www.example", b"/api/x") == config.routes[0]
        kept = {lease.backend: lease.since for lease in former.services["app.example"].leases}
        stayed = table.services["app.example"].leases[0]
        assert stayed.since == kept[stayed.backend]
        await plane.reconfigure(config)
        assert worker.table is table


async def test_a_reload_changes_no_backend_that_stays_the_same() -> None:
    services = (fixed("[::1]:1", "[::1]:2"), fixed("[::1]:1", name="other.example"))
    async with control(services=services) as (worker, plane):
        await plane._leases.set_state("app.example", "::1", 1, LeaseState.DRAINING)
        await plane._leases.set_state("app.example", "::1", 2, LeaseState.DOWN)
        before = worker.table.services["app.example"].leases
        others = worker.table.services["other.example"]
        changed = (fixed("[::1]:1", "[::1]:2", "[::1]:3"), services[1])
        await plane.reconfigure(replace(plane._config, services=changed))
        after = worker.table.services["app.example"].leases
        assert after[:2] == before
        assert [lease.state for lease in after] == [LeaseState.DRAINING, LeaseState.DOWN, LeaseState.READY]
        assert worker.table.services["other.example"] is others


async def test_thousands_of_backends_are_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    many = tuple(fixed("[::1]:1", name=f"s{number}.example") for number in range(3000))
    async with control(services=many) as (worker, plane):
        assert len(worker.table.services) == 3000
        await plane.reconfigure(replace(plane._config, services=many[:2000]))
        said = [each.getMessage() for each in caplog.records if "leases" in each.getMessage()]
        assert said == [
            "many leases at once: 3000 registered",
            "many leases at once: 1000 deregistered",
        ]


async def test_registered_and_fixed_backends_are_one_set() -> None:
    async with control(services=(fixed("[::1]:1"),)) as (worker, plane):
        for port in (1, 2):
            await plane._leases.grant(LeaseRequest("app.example", Backend("::1", port), 30))
        assert worker.addresses("app.example") == ["[::1]:1", "[::1]:2"]  # one turn each
        await plane.reconfigure(replace(plane._config, services=()))
        assert worker.addresses("app.example") == ["[::1]:1", "[::1]:2"]
        assert [each.source for each in worker.table.services["app.example"].leases] == ["api", "api"]


async def test_who_waited_for_a_probe_that_is_not_asked_for_any_more_serves() -> None:
    probed = ServicePolicy(health_path="/up")
    async with control(services=(fixed("[::1]:1", policy=probed),)) as (worker, plane):
        [lease] = worker.table.services["app.example"].leases
        assert lease.state is LeaseState.STARTING
        await plane.reconfigure(replace(plane._config, services=(fixed("[::1]:1"),)))
        [lease] = worker.table.services["app.example"].leases
        assert (lease.state, lease.health_path) == (LeaseState.READY, "")


# Names


class Resolver:
    """Answers as it is told; `turns` are the pauses of the provider, which end when they are taken."""

    def __init__(self, **answers: list[str] | OSError) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.at_once = self.most_at_once = 0
        self.pauses: list[float] = []
        self.tell: Callable[[], object] = lambda: None  # called at each question
        self.hanging: set[str] = set()
        self._turn = asyncio.Semaphore(0)

    async def resolve(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        self.tell()
        if name in self.hanging:
            await asyncio.Event().wait()
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        answer = self.answers.get(name.removesuffix(".internal"), OSError(-2, "Name or service not known"))
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def sleep(self, sooner: asyncio.Event, seconds: float) -> None:
        self.pauses.append(seconds)
        await self._turn.acquire()

    async def turn(self) -> None:
        """Let one pause end, and the look-ups after it."""
        pauses = len(self.pauses)
        self._turn.release()
        await until(lambda: len(self.pauses) > pauses)


@contextlib.asynccontextmanager
async def provided(
    resolver: Resolver, *services: FixedService, former: RoutingTable | None = None
) -> AsyncIterator[tuple[Worker, StaticBackends, Leases]]:
    """The provider alone, with real leases, after its first look-ups."""
    feed, worker = Feed(), Worker()
    feed.subscribe(worker)
    leases = Leases(Registry(), feed, clock=time.monotonic, count_fault=pytest.fail)
    if former is not None:
        leases.restore(former.services.values(), former.version)
    provider = StaticBackends(services, resolver.resolve, resolver.sleep)
    await leases.replace("static", provider.begin(leases))
    await leases.start()
    running = asyncio.create_task(provider.run(leases))
    try:
        await until(lambda: bool(resolver.pauses) or running.done())
        yield worker, provider, leases
    finally:
        running.cancel()
        await asyncio.wait([running])
        await leases.close()


async def test_a_name_is_as_many_backends_as_it_has_addresses() -> None:
    resolver = Resolver(app=["10.0.0.2", "fd00::2", "10.0.0.1", "::ffff:10.0.0.1", "0.0.0.0", "ff02::1"])
    async with provided(resolver, fixed("app.internal:80", "10.0.0.2:80", "10.0.0.2:81")) as (worker, _, _):
        assert sorted(worker.addresses("app.example")) == [
            "10.0.0.1:80",
            "10.0.0.2:80",
            "10.0.0.2:81",
            "[fd00::2]:80",
        ]
        ids = {lease.instance_id for lease in worker.table.services["app.example"].leases}
        assert "app.internal:80/fd00::2 (static)" in ids


async def test_names_are_looked_up_again_and_what_they_had_before_leaves() -> None:
    resolver = Resolver(app=["10.0.0.1", "10.0.0.2"])
    async with provided(resolver, fixed("app.internal:80")) as (worker, _, leases):
        assert worker.addresses("app.example") == ["10.0.0.1:80", "10.0.0.2:80"]
        assert resolver.pauses == [30.0]
        await leases.set_state("app.example", "10.0.0.2", 80, LeaseState.DOWN)
        stays = worker.table.services["app.example"].leases[1]
        resolver.answers["app"] = ["10.0.0.3", "10.0.0.2"]
        await resolver.turn()
        assert worker.addresses("app.example") == ["10.0.0.2:80", "10.0.0.3:80"]
        assert worker.table.services["app.example"].leases[0] == stays
        version = worker.table.version
        await resolver.turn()
        assert worker.table.version == version  # nothing new is no new table


async def test_a_failed_look_up_keeps_the_last_answer_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    resolver = Resolver(app=["10.0.0.1"])
    async with provided(resolver, fixed("app.internal:80")) as (worker, _, _):
        refusal = "Temporary failure in name resolution"
        answers: tuple[list[str] | OSError, ...] = (OSError(-3, refusal), [], OSError(-2, "other"))
        for answer in answers:
            resolver.answers["app"] = answer
            await resolver.turn()
            assert worker.addresses("app.example") == ["10.0.0.1:80"]
        said = [each.getMessage() for each in caplog.records if "looked up" in each.getMessage()]
        assert said == [
            f"backend app.internal cannot be looked up: {refusal}; the last answer stays: 10.0.0.1"
        ]
        resolver.answers["app"] = ["10.0.0.2"]
        await resolver.turn()
        assert worker.addresses("app.example") == ["10.0.0.2:80"]
        assert "backend app.internal: found again" in caplog.text


async def test_a_name_without_any_answer_is_asked_for_sooner_and_hinders_no_other() -> None:
    resolver = Resolver(good=["10.0.0.1"])
    async with provided(resolver, fixed("gone.internal:80", "good.internal:80")) as (worker, _, _):
        assert worker.addresses("app.example") == ["10.0.0.1:80"]
        for _ in range(6):
            await resolver.turn()
        assert resolver.pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
        resolver.answers["gone"] = ["10.0.0.9"]
        await resolver.turn()
        assert len(worker.addresses("app.example")) == 2


async def test_a_new_process_knows_what_a_name_had() -> None:
    services = fixed("app.internal:80", "gone.internal:81")
    resolver = Resolver(app=["10.0.0.1"], gone=["fd00::9"])
    async with provided(resolver, services) as (worker, _, _):
        former = worker.table
    resolver = Resolver(app=["10.0.0.2"])
    async with provided(resolver, services, former=former) as (worker, _, _):
        assert sorted(worker.addresses("app.example")) == ["10.0.0.2:80", "[fd00::9]:81"]


async def test_look_ups_at_a_time_are_bounded() -> None:
    names = [f"n{number}" for number in range(200)]
    resolver = Resolver(**{name: ["10.0.0.1"] for name in names})
    services = [fixed(f"{name}.internal:80", name=f"{name}.example") for name in names]
    async with provided(resolver, *services) as (worker, _, _):
        assert len(worker.table.services) == 200
        assert sorted(resolver.asked) == sorted(f"{name}.internal" for name in names)
        assert resolver.most_at_once <= 16


async def test_another_configuration_is_in_force_with_its_new_names() -> None:
    resolver = Resolver(app=["10.0.0.1"], new=["10.0.0.5"])
    async with provided(resolver, fixed("app.internal:80", "10.0.0.9:80")) as (worker, provider, leases):
        await provider.configure((fixed("app.internal:80", "new.internal:80", "10.0.0.8:80"),), leases)
        assert sorted(worker.addresses("app.example")) == ["10.0.0.1:80", "10.0.0.5:80", "10.0.0.8:80"]


async def test_no_service_is_without_backends_while_a_name_takes_an_address_place() -> None:
    resolver = Resolver(app=["10.0.0.5"])
    async with provided(resolver, fixed("10.0.0.9:80")) as (worker, provider, leases):
        seen = []
        resolver.tell = lambda: seen.append(worker.addresses("app.example"))
        await provider.configure((fixed("app.internal:80"),), leases)
        assert seen == [["10.0.0.9:80"]]
        assert worker.addresses("app.example") == ["10.0.0.5:80"]


async def test_a_new_name_without_an_answer_keeps_no_configuration_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(static, "NEW_NAMES_SECONDS", 0.01)
    resolver = Resolver(app=["10.0.0.5"])
    async with provided(resolver, fixed("10.0.0.9:80")) as (worker, provider, leases):
        resolver.hanging = {"app.internal"}
        await provider.configure((fixed("app.internal:80", "10.0.0.8:80"),), leases)
        assert worker.addresses("app.example") == ["10.0.0.8:80"]


async def test_what_is_known_is_granted_while_another_name_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "GRANT_SECONDS", 0.01)
    resolver = Resolver(good=["10.0.0.1"], slow=["10.0.0.2"])
    resolver.hanging = {"slow.internal"}
    feed, worker = Feed(), Worker()
    feed.subscribe(worker)
    leases = Leases(Registry(), feed, clock=time.monotonic, count_fault=pytest.fail)
    provider = StaticBackends(
        [fixed("slow.internal:80", "good.internal:80")], resolver.resolve, resolver.sleep
    )
    await leases.start()
    running = asyncio.create_task(provider.run(leases))
    try:
        await until(lambda: "app.example" in worker.table.services)
        assert worker.addresses("app.example") == ["10.0.0.1:80"]
        assert resolver.pauses == []
    finally:
        running.cancel()
        await asyncio.wait([running])
        await leases.close()


async def test_backends_that_do_not_fit_are_left_out_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    resolver = Resolver(app=["10.0.0.1"])
    async with provided(resolver, fixed("app.internal:80")) as (worker, _, leases):
        for number in range(999):
            backend = Backend("10.1.0.1", 1 + number)
            leases._registry.register(LeaseRequest("app.example", backend, 60), time.monotonic())
        resolver.answers["app"] = ["10.0.0.1", "10.0.0.2"]
        for _ in range(3):
            await resolver.turn()
        assert worker.addresses("app.example") == ["10.0.0.1:80"]
        assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == [
            "some backends of the configuration are left out: app.example is full: 1000 leases"
        ]


async def test_an_address_that_was_a_name_is_called_as_it_is_written_now() -> None:
    resolver = Resolver(app=["10.0.0.1"])
    async with provided(resolver, fixed("app.internal:80")) as (worker, provider, leases):
        await provider.configure((fixed("10.0.0.1:80"),), leases)
        assert [lease.instance_id for lease in worker.table.services["app.example"].leases] == [
            "10.0.0.1:80 (static)"
        ]


async def test_the_system_knows_localhost() -> None:
    found = await static.resolve("localhost")
    assert {"127.0.0.1", "::1"} & set(found)


class Faltering(Provider):
    """Fails at its first attempt, after it has granted something."""

    source = "faltering"

    def __init__(self) -> None:
        self.runs = 0

    async def run(self, leases: Leases) -> None:
        self.runs += 1
        wanted: Sequence[Backend] = [CORAL] if self.runs == 1 else [TEAL]
        await leases.replace(self.source, [LeaseRequest("app.example", each, None) for each in wanted])
        if self.runs == 1:
            raise OSError("the daemon went away")
        await asyncio.Event().wait()


async def test_a_provider_that_fails_keeps_its_leases_is_seen_and_begins_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    provider = Faltering()
    async with control(provider) as (worker, plane):
        plane._tasks._first_pause = 0.05
        await until(lambda: "faltering failed; it begins again" in caplog.text)
        assert worker.backends("app.example") == [CORAL]
        assert plane._tasks.faults == ["faltering"]
        await until(lambda: worker.backends("app.example") == [TEAL])
        assert provider.runs == 2
    assert worker.backends("app.example") == [TEAL]  # its leases outlive it
