"""Leases on disk: what was granted is there after a restart, and never for longer than it was granted."""

from __future__ import annotations

import asyncio
import logging
import stat
from pathlib import Path

import orjson
import pytest

from portero_py.control.snapshot import FILE_NAME, Snapshot
from portero_py.core.model import Backend, LeaseRequest
from portero_py.core.registry import Registry
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import BadSnapshot

EPOCH = 1_700_000_000.0


class Times:
    """A steady clock, which a restart sets to anything, and the wall clock."""

    def __init__(self) -> None:
        self.steady = 1000.0
        self.wall = EPOCH

    def snapshot(self, directory: Path, interval: float = 5.0) -> Snapshot:
        return Snapshot(directory, clock=lambda: self.steady, wall_clock=lambda: self.wall, interval=interval)

    def restart(self, seconds: float) -> None:
        """The machine comes back after so many seconds."""
        self.steady, self.wall = 3.0, self.wall + seconds


def table(*ttls: int) -> RoutingTable:
    """One service for each of these leases, granted at 1000.0."""
    registry = Registry()
    for number, ttl in enumerate(ttls):
        request = LeaseRequest(f"s{number}.example", Backend("::1", 8000, use_tls=True), ttl, weight=2)
        registry.register(request, 1000.0)
    return registry.table


def test_what_is_left_of_a_lease_survives_and_what_expired_is_dropped(tmp_path: Path) -> None:
    times, before = Times(), table(60, 20)
    times.snapshot(tmp_path).save(before)
    times.restart(25.0)
    [service] = times.snapshot(tmp_path).load()
    [lease] = service.leases
    [granted] = before.services["s0.example"].leases
    assert service.name == "s0.example"
    assert lease.expires_at == pytest.approx(3.0 + 35.0)
    assert (lease.backend, lease.ttl_seconds, lease.weight) == (granted.backend, 60, 2)
    assert lease.instance_id == granted.instance_id


def test_a_clock_that_was_set_back_makes_no_lease_longer_than_it_was_granted(tmp_path: Path) -> None:
    times = Times()
    times.snapshot(tmp_path).save(table(60))
    times.restart(-100_000.0)
    [service] = times.snapshot(tmp_path).load()
    assert service.leases[0].expires_at == 3.0 + 60.0


def test_without_a_file_there_is_nothing_to_restore(tmp_path: Path) -> None:
    assert Times().snapshot(tmp_path).load() == []


def test_only_the_owner_may_read_it_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    Times().snapshot(tmp_path).save(table(60))
    [file] = tmp_path.iterdir()
    assert file.name == FILE_NAME
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"format":1}',
        b'{"format":1,"leases":[{}]}',
        b'{"format":1,"leases":[{"backend":{"host":"::1","port":1},"surprise":1}]}',
        b'{"format":2,"leases":[]}',
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(BadSnapshot, match=FILE_NAME):
        Times().snapshot(tmp_path).load()


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(BadSnapshot, match="cannot be read: Is a directory"):
        Times().snapshot(tmp_path).load()
    with pytest.raises(BadSnapshot, match="cannot be written"):
        Times().snapshot(tmp_path).save(table(60))
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]


def test_a_table_that_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    snapshot, saved = Times().snapshot(tmp_path), table(60)
    snapshot.save(saved)
    (tmp_path / FILE_NAME).unlink()
    snapshot.save(saved)
    assert list(tmp_path.iterdir()) == []


async def test_it_is_saved_again_and_again_and_a_failure_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "state"
    newest = table(60)
    running = asyncio.create_task(Times().snapshot(directory, interval=0.005).run(lambda: newest))
    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(10):
            while not caplog.records:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.03)
            directory.mkdir()
            while not (directory / FILE_NAME).exists():
                await asyncio.sleep(0.005)
    newest = table(60, 60)
    async with asyncio.timeout(10):
        while len(orjson.loads((directory / FILE_NAME).read_bytes())["leases"]) < 2:
            await asyncio.sleep(0.005)
    assert len(caplog.records) == 1
    running.cancel()
    await asyncio.wait([running])
