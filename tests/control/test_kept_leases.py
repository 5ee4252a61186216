"""Leases in memory: the newest that is whole, whatever happened to who wrote it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from portero_py.control.kept_leases import Kept, KeptLeases
from portero_py.core.counters import Counters
from portero_py.core.model import Backend, LeaseRequest
from portero_py.core.registry import Registry
from portero_py.core.routing_table import RoutingTable


@pytest.fixture
def kept() -> Iterator[KeptLeases]:
    one = KeptLeases.make()
    yield one
    one.close()


def table(*services: str) -> RoutingTable:
    registry = Registry()
    for service in services:
        registry.register(LeaseRequest(service, Backend("192.0.2.1", 80), 60), 0.0)
    return registry.table


def counted(number: int) -> Counters:
    counters = Counters()
    counters.connections_total = number
    return counters


def loaded(kept: KeptLeases) -> Kept:
    """What another process finds there."""
    found = KeptLeases(kept.descriptors).load()
    assert found is not None
    return found


def test_nothing_was_written_yet(kept: KeptLeases) -> None:
    assert kept.load() is None


def test_what_was_written_last_is_read_by_another_process(kept: KeptLeases) -> None:
    for number in range(1, 6):
        names = [f"s{each}.example" for each in range(number)]
        kept.save(table(*names), counted(number))
        found = loaded(kept)
        assert set(found.table.services) == set(names)
        assert found.table.version == table(*names).version
        assert found.departed.connections_total == number


def test_whoever_comes_later_writes_over_the_older_one(kept: KeptLeases) -> None:
    kept.save(table("one.example"), Counters())
    KeptLeases(kept.descriptors).save(table("two.example"), Counters())
    KeptLeases(kept.descriptors).save(table("three.example"), Counters())
    assert set(loaded(kept).table.services) == {"three.example"}


def test_whoever_dies_while_he_writes_leaves_what_was_there_before(kept: KeptLeases) -> None:
    kept.save(table("former.example"), counted(1))
    kept.save(table("torn.example"), counted(2))
    torn = kept.descriptors[0]
    whole = os.pread(torn, 1 << 20, 0)
    assert b"torn.example" in whole
    for length in range(len(whole)):
        os.ftruncate(torn, length)
        assert set(loaded(kept).table.services) == {"former.example"}, length
        os.pwrite(torn, whole, 0)
    for at in range(4, len(whole), 5):
        os.pwrite(torn, bytes([whole[at] ^ 1]), at)
        assert set(loaded(kept).table.services) == {"former.example"}, at
        os.pwrite(torn, whole, 0)
    assert set(loaded(kept).table.services) == {"torn.example"}


async def test_a_change_is_written_and_nothing_is_while_there_is_none(kept: KeptLeases) -> None:
    newest = [table("first.example")]
    written = 0

    def read() -> tuple[RoutingTable, Counters]:
        nonlocal written
        written += 1
        return newest[0], Counters()

    running = asyncio.create_task(kept.run(read))
    async with asyncio.timeout(20):
        while not written:
            await asyncio.sleep(0.001)
        newest[0] = table("second.example")
        kept.changed()
        while written < 2:
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
    assert set(loaded(kept).table.services) == {"second.example"}
    assert written == 2


def test_what_others_have_written_since_is_no_newer_than_what_is_written_after_it(kept: KeptLeases) -> None:
    """A control process is forked again by one who had looked at the files long before."""
    late = KeptLeases(kept.descriptors)
    for number in range(1, 8):
        kept.save(table("one.example"), counted(number))
    assert late.load() is not None
    late.save(table("one.example", "two.example"), counted(8))
    found = loaded(kept)
    assert set(found.table.services) == {"one.example", "two.example"}
    assert found.departed.connections_total == 8
