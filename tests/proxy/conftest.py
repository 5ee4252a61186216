"""Every dialogue ends with the same question: was everything given back?"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from portero_py.proxy import downstream_http1, exchange, leaving, upstream_http1, upstream_pool
from tests.proxy.dialogue import Clock, World


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A proxy with one backend for app.example; after the test no claim and no exchange is left."""
    clock = Clock()
    for module in (downstream_http1, exchange, leaving, upstream_http1, upstream_pool):
        monkeypatch.setattr(module, "monotonic", clock)
    world = World(clock)
    yield world
    await world.close()
