"""Leases in memory: the newest that is whole, whatever happened to who wrote it."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Iterator

import pytest

from portero_py.control import kept_leases
from portero_py.control.kept_leases import Kept, KeptLeases
from portero_py.core.counters import Counters
from portero_py.core.model import Backend, Halt, LeaseRequest, LeaseState
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
        kept.changed(newest[0], 1)
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


class Granting:
    """A registry whose changes are kept."""

    def __init__(self, kept: KeptLeases) -> None:
        self.registry = Registry()
        self._kept = kept

    def grant(self, service: str, ttl_seconds: int = 60) -> None:
        self.registry.register(LeaseRequest(service, Backend("192.0.2.1", 80), ttl_seconds), 0.0)
        self.tell()

    def release(self, service: str) -> None:
        self.registry.release(service, "", "192.0.2.1", 80, now=0.0)
        self.tell()

    def tell(self) -> None:
        self._kept.changed(self.registry.table, self.registry.generation)


@pytest.fixture
def granting(kept: KeptLeases) -> Granting:
    one = Granting(kept)
    one.grant("first.example")
    kept.save(one.registry.table, counted(1))
    return one


def test_what_begins_ends_or_gets_another_state_is_there_at_once(
    kept: KeptLeases, granting: Granting
) -> None:
    registry = granting.registry
    granting.grant("second.example")
    assert loaded(kept) == Kept(registry.table, counted(1))
    granting.release("first.example")
    assert loaded(kept).table == registry.table
    registry.set_state("second.example", "192.0.2.1", 80, LeaseState.DRAINING, 0.0)
    granting.tell()
    assert loaded(kept).table == registry.table
    registry.halt("second.example", Halt(None, "closed"))
    granting.tell()
    assert loaded(kept).table == registry.table


def test_renewals_gather_and_go_along_with_what_does_not_wait(kept: KeptLeases, granting: Granting) -> None:
    granting.grant("second.example")
    before = loaded(kept)
    granting.grant("first.example", 90)
    granting.grant("second.example", 90)
    assert loaded(kept) == before
    granting.grant("third.example")
    assert loaded(kept).table == granting.registry.table
    granting.grant("first.example", 120)
    kept.save(granting.registry.table, counted(2))
    assert loaded(kept) == Kept(granting.registry.table, counted(2))


def test_whoever_dies_while_he_writes_a_change_leaves_what_was_there_before(
    kept: KeptLeases, granting: Granting
) -> None:
    granting.grant("former.example")
    before, [file] = loaded(kept), [each for each in kept.descriptors if os.fstat(each).st_size]
    length = os.fstat(file).st_size
    granting.grant("torn.example")
    whole = os.pread(file, 1 << 20, 0)
    assert loaded(kept).table == granting.registry.table
    for until in range(length, len(whole)):
        os.ftruncate(file, until)
        assert loaded(kept) == before, until
        os.pwrite(file, whole, 0)
    for at in range(length, len(whole)):
        os.pwrite(file, bytes([whole[at] ^ 1]), at)
        assert loaded(kept) == before, at
        os.pwrite(file, whole, 0)
    os.pwrite(file, bytes(4096), len(whole))  # space that was made, and nothing in it
    assert loaded(kept).table == granting.registry.table


def test_what_is_behind_a_shorter_table_is_not_of_it(kept: KeptLeases, granting: Granting) -> None:
    for number in range(50):
        granting.grant(f"s{number}.example")
    for number in range(50):
        granting.release(f"s{number}.example")
    kept.save(table("one.example"), Counters())
    kept.save(table("two.example"), Counters())
    assert set(loaded(kept).table.services) == {"two.example"}


def test_what_cannot_be_written_spoils_nothing_and_is_in_the_next_whole_table(
    kept: KeptLeases, granting: Granting, monkeypatch: pytest.MonkeyPatch
) -> None:
    granting.grant("former.example")
    before, write = loaded(kept), os.pwrite
    monkeypatch.setattr(os, "pwrite", _full(write))
    granting.grant("late.example")
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            kept.save(granting.registry.table, Counters())
        assert loaded(kept) == before
    monkeypatch.setattr(os, "pwrite", write)
    granting.grant("later.example")
    assert loaded(kept) == before
    kept.save(granting.registry.table, Counters())
    assert loaded(kept).table == granting.registry.table
    granting.grant("last.example")
    assert loaded(kept).table == granting.registry.table


def _full(write: Callable[[int, memoryview, int], int]) -> Callable[[int, memoryview, int], int]:
    """Writes a part of it, and then there is no memory."""
    room = [10]

    def attempt(descriptor: int, data: memoryview, at: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[: room[0]], at)
        room[0] -= written
        return written

    return attempt


async def test_who_comes_next_waits_for_the_end_of_who_may_still_write(kept: KeptLeases) -> None:
    code = """
import sys
from portero_py.control import kept_leases
from portero_py.control.kept_leases import KeptLeases
kept = KeptLeases((int(sys.argv[1]), int(sys.argv[2])))
assert kept._is_claimed()
print("claimed", flush=True)
sys.stdin.read()
"""
    writer = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *map(str, kept.descriptors),
        pass_fds=kept.descriptors,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    assert await writer.stdout.readline() == b"claimed\n"
    waiting = asyncio.create_task(kept.claim())
    await asyncio.sleep(0)
    assert not waiting.done()
    writer.kill()
    await writer.wait()
    await waiting
    await kept.claim()  # who has it has it
    kept.release()


async def test_who_never_ends_is_not_waited_for_for_ever(
    kept: KeptLeases, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(KeptLeases, "_is_claimed", lambda _: False)
    monkeypatch.setattr(kept_leases, "PATIENCE", 10 * kept_leases.LOOK_SECONDS)
    await kept.claim()
    assert "some may be lost" in caplog.text
