"""Every dialogue ends with the same question: was everything given back?"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator

import pytest

from portero_py.proxy import exchange, queues, surroundings
from portero_py.proxy.downstream import http1, leaving
from portero_py.proxy.upstream import http1 as upstream_http1
from portero_py.proxy.upstream import pool
from tests.proxy.dialogue import Clock, World
from tests.proxy.downstream.tls_listener import LOOPS, Play, Scene


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A proxy with one backend for app.example; after the test no claim and no exchange is left."""
    clock = Clock()
    for module in (http1, exchange, leaving, upstream_http1, pool, queues, surroundings):
        monkeypatch.setattr(module, "monotonic", clock)
    world = World(clock)
    yield world
    await world.close()


@pytest.fixture(params=LOOPS)
def play(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Play:
    """Run a coroutine function on one kind of loop, in production mode; log and stderr must stay silent."""

    def run(scene: Scene) -> None:
        caplog.set_level(logging.INFO)
        # asyncio's debug mode logs every failed handshake; what counts here is what an operator sees.
        with asyncio.Runner(loop_factory=LOOPS[request.param], debug=False) as runner:

            async def scene_of() -> None:
                await scene()

            runner.run(scene_of())
        gc.collect()
        assert [record.getMessage() for record in caplog.records] == []
        assert capsys.readouterr().err == ""

    return run
