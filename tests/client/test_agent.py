"""The agent ends when it is told to, also where the registration API does not answer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from portero_py.client import registrar
from portero_py.client.agent import keep_registered
from portero_py.client.registrar import Api, Registration

BACKEND = Registration("app.example", "::1", 8000, ttl_seconds=86400)


class MuteApi:
    """Takes connections and requests, and answers nothing."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: asyncio.Queue[str] = asyncio.Queue()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.asked.put_nowait((await reader.readline()).split()[0].decode())
            await reader.read()
        finally:
            writer.close()


@pytest.fixture
async def mute() -> AsyncIterator[MuteApi]:
    api = MuteApi()
    server = await asyncio.start_server(api.take, "127.0.0.1", 0)
    api.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield api
    server.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has no limit of its own waits for longer than any test."""
    monkeypatch.setattr(registrar, "REQUEST_TIMEOUT", 3600.0)


async def test_a_stop_ends_a_registration_that_waits_and_gives_back_what_may_be_there(
    mute: MuteApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrar, "GOODBYE_TIMEOUT", 2.0)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(keep_registered(Api(mute.url, "hush", "k" * 32), BACKEND))
        assert await mute.asked.get() == "POST"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await mute.asked.get() == "DELETE"


async def test_a_second_signal_ends_the_goodbye(mute: MuteApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrar, "GOODBYE_TIMEOUT", 3600.0)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(keep_registered(Api(mute.url, "hush", "k" * 32), BACKEND))
        assert await mute.asked.get() == "POST"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await mute.asked.get() == "DELETE"
        os.kill(os.getpid(), signal.SIGINT)
