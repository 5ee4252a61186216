"""The control plane put together: what keeps a first start from coming about ends no later one."""

from __future__ import annotations

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
