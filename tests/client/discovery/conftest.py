"""The real registration API on a loopback port, which can be gone for a while, and forget what it granted."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp import web

from portero_py.client.registrar import Api
from portero_py.config.model import Registration
from portero_py.control.api.application import RegistrationApi
from portero_py.control.api.metrics import Metrics
from portero_py.control.leases import Leases
from portero_py.core.registry import Registry
from portero_py.feed.feed import Feed

SECRET, KEY = "a-shared-secret", "k" * 32
#: Where backends may be.
NETWORKS = (ip_network("172.17.0.0/16"), ip_network("127.0.0.0/8"))


class RealApi:
    """`open` and `close` as often as need be: each time it has forgotten everything, at the same port."""

    def __init__(self) -> None:
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._leases: Leases
        self._metrics: Metrics

    @property
    def api(self) -> Api:
        return Api(f"http://127.0.0.1:{self.port}", SECRET, KEY)

    def served(self) -> dict[str, list[str]]:
        """host:port of the backends, by service; those without any are left out."""
        services = self._leases.table.services.values()
        found = {
            each.name: sorted(f"{lease.backend.host}:{lease.backend.port}" for lease in each.leases)
            for each in services
        }
        return {name: places for name, places in found.items() if places}

    async def until_answered(self, result: str, count: int) -> None:
        """Wait until so many more answers to /register were `renewed`, or an error's reason."""
        wanted = await self._answered(result) + count
        async with asyncio.timeout(60):
            while await self._answered(result) < wanted:
                await asyncio.sleep(0.02)

    async def until(self, check: Callable[[], Any]) -> None:
        """Wait until `check` holds."""
        async with asyncio.timeout(60):
            while not check():
                await asyncio.sleep(0.005)

    async def until_served(self, **wanted: list[str]) -> None:
        """Wait until just these are served; `_` in a name stands for `.`."""
        services = {name.replace("_", "."): places for name, places in wanted.items()}
        try:
            await self.until(lambda: self.served() == services)
        except TimeoutError:
            assert self.served() == services

    async def open(self) -> None:
        registry, feed = Registry(), Feed()
        config = Registration(secret=SECRET, hmac_keys=(("", KEY),), backend_cidrs=NETWORKS)
        self._metrics = metrics = Metrics(registry, feed.counters)
        self._leases = Leases(registry, feed, clock=time.monotonic, count_fault=metrics.fault)
        served = RegistrationApi(config, self._leases, metrics, clock=time.monotonic, wall_clock=time.time)
        await self._leases.start()
        self._runner = served.runner()
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()
            await self._leases.close()

    # Private

    async def _answered(self, result: str) -> float:
        text = (await self._metrics.scrape()).decode()
        found = re.search(rf'^portero_registrations_total{{result="{result}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture
async def api() -> AsyncIterator[RealApi]:
    found = RealApi()
    await found.open()
    yield found
    await found.close()
