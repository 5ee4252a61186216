"""One reading of the configuration, for all processes."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from portero_py.config.model import Config, Registration
from portero_py.config.sources import load
from portero_py.errors import ConfigError
from portero_py.run.live_configuration import read_again, waiting_for_restart, with_live
from portero_py.run.readings import Reader, Readings
from tests.own_process import alone

FILE = """
[limits]
h2_streams = 7
[[service]]
name = "app.example"
backends = ["10.0.0.1:80", "app.internal:80"]
allow = ["10.0.0.0/8"]
rate_limit = { requests = 5 }
[[route]]
host = "www.example"
service = "app.example"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "portero.toml"
    path.write_text(FILE)
    return path


def test_what_was_read_arrives_whole_and_workers_get_what_they_need(file: Path) -> None:
    reader, readings = Reader({"config": str(file)}, {}), Readings()
    assert readings.whole() is None
    assert readings.common() is None
    assert readings.reloads == reader.reloads
    config = reader()
    reader.count(ok=True, again=False)
    readings.write(config, reader)
    found = readings.whole()
    assert found == (config, reader.seen)
    assert readings.common() == replace(config, services=(), routes=())
    assert readings.reloads == reader.reloads
    assert (reader.reloads.ok, reader.reloads.failed) == (0, 0)
    assert reader.reloads.succeeded_at > 1_600_000_000
    readings.close()


@alone
def test_one_that_does_not_fit_leaves_the_former_in_place() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "portero.toml")
        file.write_text(FILE)
        reader, readings = Reader({"config": str(file)}, {}), Readings()
        config = reader()
        readings.write(config, reader)
        file.write_text(FILE + "".join(f'[[service]]\nname = "s{number}"\n' for number in range(5_000)))
        longer = reader()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
        with pytest.raises(OSError, match="File too large"):
            readings.write(longer, reader)
        found = readings.whole()
        assert found is not None
        assert found[0] == config


def test_a_longer_one_and_a_shorter_one_take_its_place(file: Path) -> None:
    reader, readings = Reader({"config": str(file)}, {}), Readings()
    for content in (FILE, FILE + '[[service]]\nname = "b"\n' * 1, "", FILE):
        file.write_text(content)
        config = reader()
        readings.write(config, reader)
        found = readings.whole()
        assert found is not None
        assert found[0] == config
    readings.close()


@pytest.mark.parametrize("length", [0, 10, 60, 500])
def test_one_that_is_half_written_is_none(file: Path, length: int) -> None:
    reader, readings = Reader({"config": str(file)}, {}), Readings()
    readings.write(reader(), reader)
    size = os.fstat(readings._descriptor).st_size
    os.pwrite(readings._descriptor, b"\xff\xff\xff", min(length + 40, size - 3))
    assert readings.whole() is None
    os.ftruncate(readings._descriptor, length)
    assert readings.whole() is None
    assert readings.common() is None
    readings.close()


def test_secrets_travel_too(file: Path) -> None:
    reader, readings = Reader({"config": str(file), "register-secret": "open sesame"}, {}), Readings()
    readings.write(reader(), reader)
    found = readings.common()
    assert found is not None
    assert found.registration == Registration(secret="open sesame")
    readings.close()


def test_a_reading_that_fails_is_counted_and_its_files_are_known(file: Path) -> None:
    reader = Reader({"config": str(file)}, {})
    running = reader()
    file.write_text("[[service]]\nname = 1\n")
    with pytest.raises(ConfigError, match=r"portero.toml:2: service 1: name: must be text"):
        reader()
    assert reader.seen == reader.seen.again()
    reader.count(ok=False)
    assert (reader.reloads.ok, reader.reloads.failed, reader.reloads.succeeded_at) == (0, 1, 0)
    assert read_again(running, reader) is None


def test_services_routes_and_the_default_service_are_live(file: Path) -> None:
    found = load({"config": str(file), "default-service": "app.example"}, {})
    running = Config()
    live = with_live(running, found)
    assert (live.services, live.routes) == (found.services, found.routes)
    assert live.proxy.default_service == "app.example"
    assert live.limits.h2_streams == 7
    assert waiting_for_restart(running, found) == []
    assert with_live(live, found) is live
