"""How the only process ends: each phase in its turn, and at once when it is told to stop again."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, cast

import pytest

from portero_py.config.model import Config
from portero_py.control.api.state import State
from portero_py.proxy.worker import Leave
from portero_py.run.channel import Channel
from portero_py.run.generation import Generation
from portero_py.run.readings import Reader
from portero_py.run.single_process import SingleProcess
from portero_py.run.sockets import Listening
from portero_py.run.systemd import Notifier


class Planes:
    """Both planes: the phases that have begun, and the one that does not end."""

    def __init__(self, stuck: str = "", broken: str = "") -> None:
        self.state = State.READY
        self.begun: list[str] = []
        self.is_stuck = asyncio.Event()
        self.main, ours = Channel.pair()
        self.place = Generation(ours, os.getpid())
        self._stuck = stuck
        self._broken = broken

    def __enter__(self) -> Planes:
        return self

    def __exit__(self, *_: object) -> None:
        self.main.close()
        self.place.channel.close()

    async def drain(self, seconds: float, leave: Leave) -> None:
        await self._phase("drain")

    async def close(self) -> None:
        await self._phase("close")

    async def _phase(self, name: str) -> None:
        self.begun.append(name)
        if name == self._broken:
            raise RuntimeError("a fault")
        if name == self._stuck:
            self.is_stuck.set()
            await asyncio.Event().wait()


def process(planes: Planes) -> SingleProcess:
    config = Config()
    place = planes.place
    notifier = Notifier({}, os.getpid(), place.notify)
    nothing = cast("Any", None)
    one = SingleProcess(config, Reader({}, {}), Listening(), notifier, place, nothing, nothing)
    one._worker = one._control = cast("Any", planes)
    return one


@pytest.mark.parametrize("phase", ["drain", "close"])
async def test_a_second_signal_ends_it_at_once_in_each_phase(phase: str) -> None:
    with Planes(stuck=phase) as planes:
        one = process(planes)
        stopping = asyncio.create_task(one._stop())
        await planes.is_stuck.wait()
        assert planes.begun[-1] == phase
        one._signals.tell(signal.SIGHUP)  # is no wish to hurry
        one._signals.tell(signal.SIGTERM)
        async with asyncio.timeout(5):
            assert await stopping == 1
        assert planes.state is State.DRAINING


@pytest.mark.parametrize(("broken", "status"), [("", 0), ("drain", 1)])
async def test_the_control_plane_closes_after_the_drain_also_when_that_failed(
    broken: str, status: int
) -> None:
    with Planes(broken=broken) as planes:
        assert await process(planes)._stop() == status
        assert planes.begun == ["drain", "close"]
