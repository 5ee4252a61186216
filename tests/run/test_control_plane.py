"""The control plane put together: what keeps a first start from coming about ends no later one."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from portero_py.config.model import Config, Registration, Tls
from portero_py.core.certificates import Certificate
from portero_py.errors import ConfigError
from portero_py.feed.feed import Feed
from portero_py.run.control_plane import ControlPlane
from portero_py.run.sockets import Listening
from portero_py.run.tuning import Shares


def without_certificates(directory: Path) -> ControlPlane:
    registration = Registration(secret="s" * 32, hmac_keys=(("", "k" * 32),))
    config = replace(Config(), tls=Tls(cert_dir=str(directory / "away")), registration=registration)
    return ControlPlane(config, Listening([], [], []), 443, Feed(), Shares(1, 1, 1))


async def nothing_presented(names: list[str]) -> list[Certificate]:
    return []


async def test_the_first_control_plane_needs_its_certificates(tmp_path: Path) -> None:
    plane = without_certificates(tmp_path)
    with pytest.raises(ConfigError):
        await plane.load()


async def test_one_that_takes_anothers_place_goes_on_with_what_the_workers_present(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plane = without_certificates(tmp_path)
    await plane.load(nothing_presented)
    assert "away" in caplog.text
    await plane.close()


async def test_a_client_that_was_let_in_just_before_an_upgrade_is_answered() -> None:
    registration = Registration(secret="s" * 32, hmac_keys=(("", "k" * 32),))
    config = replace(Config(), tls=Tls(enabled=False), registration=registration)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        plane = ControlPlane(config, Listening([], [listening], []), 443, Feed(), Shares(9, 9, 9, 9))
        await plane.load()
        await plane.serve()
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        await asyncio.sleep(0.05)  # it is let in
        closing = asyncio.create_task(plane.close(hand_over=True))
        await asyncio.sleep(0.05)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await closing
