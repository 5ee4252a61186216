"""The contract of a provider, proved by the simplest one, in a real control plane."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from portero_py.config.model import Config, Registration, Tls
from portero_py.control.api.state import State
from portero_py.control.leases import Leases
from portero_py.control.providers.provider import Provider
from portero_py.control.providers.static import StaticBackends
from portero_py.core.certificates import Certificate
from portero_py.core.model import Backend, LeaseRequest
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
    *providers: Provider, state_dir: Path | None = None, former: RoutingTable | None = None
) -> AsyncIterator[tuple[Worker, ControlPlane]]:
    """A control plane with these providers, in the place of one whose last table was `former`."""
    config = Config(
        registration=Registration(secret="open sesame", hmac_keys=(("", "k" * 32),)),
        tls=Tls(enabled=False),
        state_dir=str(state_dir or ""),
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


def static(*backends: Backend) -> StaticBackends:
    return StaticBackends(("app.example", backend) for backend in backends)


async def test_the_backends_of_a_fixed_list_are_served_for_ever() -> None:
    async with control(static(CORAL, TEAL)) as (worker, _):
        await until(lambda: worker.backends("app.example") == [CORAL, TEAL])
        for lease in worker.table.services["app.example"].leases:
            assert (lease.source, lease.can_serve(1e18)) == ("static", True)


@pytest.mark.parametrize("how", ["the snapshot", "the workers"])
async def test_after_a_restart_the_list_is_what_it_says_now(tmp_path: Path, how: str) -> None:
    state = tmp_path if how == "the snapshot" else None
    async with control(static(CORAL, TEAL), state_dir=state) as (worker, _):
        await until(lambda: worker.backends("app.example") == [CORAL, TEAL])
    former = None if state else worker.table
    async with control(static(TEAL), state_dir=state, former=former) as (worker, _):
        assert worker.backends("app.example") == [CORAL, TEAL]  # nobody waits for a provider
        await until(lambda: worker.backends("app.example") == [TEAL])
    former = None if state else worker.table
    async with control(state_dir=state, former=former) as (worker, _):
        assert worker.backends("app.example") == []  # nobody keeps that source any more


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
