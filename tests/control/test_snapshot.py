"""Leases on disk: what was granted is there after a restart, and never for longer than it was granted."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from portero_py.control.snapshot import FILE_NAME, MOST_BAD, SHORT_INTERVAL, Snapshot
from portero_py.core.model import NEVER, Backend, Lease, LeaseRequest, LeaseState
from portero_py.core.policies import ServicePolicy
from portero_py.core.registry import Registry
from portero_py.core.routes import NO_ROUTES
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import BadSnapshot
from tests.waiting import until

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


def test_sources_and_leases_without_an_end_survive_also_where_they_share_an_address(tmp_path: Path) -> None:
    registry, backend = Registry(), Backend("::1", 8000)
    registry.register(LeaseRequest("a.example", backend, 60), 1000.0)
    registry.register(LeaseRequest("a.example", backend, None), 1000.0, "static")
    times = Times()
    times.snapshot(tmp_path).save(registry.table)
    written = orjson.loads((tmp_path / FILE_NAME).read_bytes())["leases"]
    assert [lease["expires_at"] for lease in written] == [EPOCH + 60.0, None]
    times.restart(25.0)
    again = Registry()
    again.restore(times.snapshot(tmp_path).load(), 0, times.steady)
    [entry] = again.table.services["a.example"].leases
    left = [(lease.source, lease.expires_at) for lease in entry.grants]
    assert left == [("api", pytest.approx(3.0 + 35.0)), ("static", NEVER)]
    times.restart(1e9)
    [service] = times.snapshot(tmp_path).load()
    assert [lease.source for lease in service.leases] == ["static"]


def test_a_snapshot_from_before_there_were_sources_is_read(tmp_path: Path) -> None:
    lease = {
        "service": "s0.example",
        "instance_id": "one",
        "backend": {"host": "::1", "port": 8000, "use_tls": True, "protocol": "http1", "tls_fingerprint": ""},
        "expires_at": EPOCH + 60.0,
        "ttl_seconds": 60,
        "weight": 2,
        "health_path": "/up",
    }
    (tmp_path / FILE_NAME).write_bytes(orjson.dumps({"format": 1, "leases": [lease]}))
    [service] = Times().snapshot(tmp_path).load()
    assert service.leases == (
        Lease("s0.example", "one", Backend("::1", 8000, use_tls=True), 1060.0, 60, 2, "/up", since=1000.0),
    )
    assert (service.leases[0].source, service.leases[0].state) == ("api", LeaseState.READY)


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


GRANTED = {
    "service": "s0.example",
    "instance_id": "one",
    "backend": {"host": "::1", "port": 8000, "use_tls": True, "protocol": "http1", "tls_fingerprint": ""},
    "expires_at": EPOCH + 60.0,
    "ttl_seconds": 60,
    "weight": 2,
    "health_path": "/up",
    "source": "api",
    "state": "ready",
    "also": [],
}


@pytest.mark.parametrize(
    "change",
    [
        *({"service": value} for value in (5, None, "", "A.example", "a..b ", ["a"])),
        *({"instance_id": value} for value in (None, "", ["a"], 7, "a b", "a" * 129, "one (static)")),
        *({"weight": value} for value in (0, -3, "x", None, 10**9, True, 1.5)),
        {"granted": ["/up", 3]},
        *({"ttl_seconds": value} for value in (0, "9", 1e308, 86_401, True)),
        *({"expires_at": value} for value in ("z", True, [1])),
        *({"health_path": value} for value in (7, None, "up", "/a\nb")),
        *({"source": value} for value in (7, None, "static", "a\nb")),
        *({"state": value} for value in (7, None, "odd")),
        *({"host": value} for value in (5, None, "no address", "[::1]", "0.0.0.0", "0:0:0:0:0:0:0:1")),
        *({"port": value} for value in ("x", 0, 70_000, None, True)),
        *({"use_tls": value} for value in (None, 1)),
        *({"protocol": value} for value in (None, 1, "gopher")),
        *({"tls_fingerprint": value} for value in ("zz", None, 3, "AB" * 32)),
        {"also": [GRANTED]},
        {"also": "x"},
        {"since": None},
        {"since": "yesterday"},
        {"max_in_flight": -1},
    ],
    ids=str,
)
def test_a_lease_that_could_never_have_been_granted_makes_the_file_none(
    tmp_path: Path, change: dict[str, object]
) -> None:
    backend = {**GRANTED["backend"], **{k: v for k, v in change.items() if k in GRANTED["backend"]}}  # type: ignore[dict-item, operator]
    lease = {**GRANTED, **{k: v for k, v in change.items() if k not in backend}, "backend": backend}
    (tmp_path / FILE_NAME).write_bytes(orjson.dumps({"format": 1, "leases": [GRANTED, lease]}))
    with pytest.raises(BadSnapshot, match="is no snapshot of leases; it is now "):
        Times().snapshot(tmp_path).load()


def test_what_cannot_be_read_just_now_is_neither_set_aside_nor_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Times()
    times.snapshot(tmp_path).save(table(60, 60))
    good, snapshot, really_open = (tmp_path / FILE_NAME).read_bytes(), times.snapshot(tmp_path), os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if path == tmp_path / FILE_NAME:
            raise OSError(errno.EMFILE, "no")
        return really_open(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(BadSnapshot, match="cannot be read: Too many open files; it stays"):
            snapshot.load()
        with pytest.raises(BadSnapshot, match="cannot be read, nor replaced unread: Too many open files"):
            snapshot.save(table(60))
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == good
    snapshot.save(table(60))  # it can be read again: kept for whoever wants it
    [aside] = tmp_path.glob(f"{FILE_NAME}.bad-*")
    assert aside.read_bytes() == good
    assert len(times.snapshot(tmp_path).load()) == 1
    # And when somebody took it away, nothing is in the way.
    gone = times.snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(BadSnapshot, match="it stays"):
            gone.load()
    (tmp_path / FILE_NAME).unlink()
    gone.save(table(60))
    assert len(times.snapshot(tmp_path).load()) == 1


def test_the_directory_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = list[bool](), os.fsync

    def note(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append((tmp_path / FILE_NAME).exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    Times().snapshot(tmp_path).save(table(60))
    assert synced == [True]


def test_a_file_system_that_syncs_no_directories_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    Times().snapshot(tmp_path).save(table(60))
    assert len(Times().snapshot(tmp_path).load()) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_what_is_no_file_holds_up_nobody_and_is_set_aside(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / FILE_NAME)
    with pytest.raises(BadSnapshot, match=f"is now {tmp_path}/leases.json.bad-20231114T221320"):
        Times().snapshot(tmp_path).load()
    times = Times()
    times.snapshot(tmp_path).save(table(60))
    assert len(times.snapshot(tmp_path).load()) == 1


def test_what_cannot_be_used_is_kept_a_few_times_and_named(tmp_path: Path) -> None:
    times, kept = Times(), []
    for number in range(MOST_BAD + 2):
        (tmp_path / FILE_NAME).write_text(f"broken {number}")
        times.wall += 1.0
        with pytest.raises(BadSnapshot, match="is no snapshot of leases; it is now ") as caught:
            times.snapshot(tmp_path).load()
        kept.append(Path(str(caught.value).rpartition(" is now ")[2]))
        assert kept[-1].read_text() == f"broken {number}"
    assert sorted(tmp_path.iterdir()) == kept[-MOST_BAD:]
    assert Times().snapshot(tmp_path).load() == []


def test_what_cannot_be_set_aside_stays_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE_NAME).write_text("broken")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "no")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BadSnapshot, match="it stays there: Read-only file system"):
        Times().snapshot(tmp_path).load()


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(BadSnapshot, match=f"{FILE_NAME} cannot be written: Is a directory"):
        Times().snapshot(tmp_path).save(table(60))
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]


def test_the_last_save_waits_for_the_one_that_is_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, begun, go_on = Times().snapshot(tmp_path), threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        begun.set()
        assert go_on.wait(30)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    older, newest = table(60), table(60, 60)
    first = threading.Thread(target=snapshot.save, args=(older,))
    first.start()
    assert begun.wait(30)
    last = threading.Thread(target=snapshot.close, args=(newest,))
    last.start()
    last.join(0.05)
    go_on.set()
    first.join(30)
    last.join(30)
    assert len(Times().snapshot(tmp_path).load()) == 2
    snapshot.save(older)  # never back
    assert len(Times().snapshot(tmp_path).load()) == 2


def test_a_table_that_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    snapshot, saved = Times().snapshot(tmp_path), table(60)
    snapshot.save(saved)
    (tmp_path / FILE_NAME).unlink()
    snapshot.save(saved)
    assert list(tmp_path.iterdir()) == []


class Running:
    """A snapshot that is kept true, of a registry."""

    def __init__(self, directory: Path, interval: float) -> None:
        self.file = directory / FILE_NAME
        self.registry = Registry()
        self._snapshot = Times().snapshot(directory, interval)
        self._task = asyncio.create_task(self._snapshot.run(lambda: self.registry.table))

    def register(self, port: int, now: float = 1000.0) -> None:
        self.registry.register(LeaseRequest("app.example", Backend("::1", port), 60), now)
        self._snapshot.changed(self.registry.generation)

    def ends(self) -> list[float]:
        """When the leases on disk end, seconds after those that were granted first."""
        try:
            leases = orjson.loads(self.file.read_bytes())["leases"]
        except FileNotFoundError:
            return []
        return [lease["expires_at"] - EPOCH - 60.0 for lease in leases]

    async def until(self, ends: list[float]) -> None:
        await until(lambda: self.ends() == ends)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


async def test_a_lease_is_written_at_once_and_what_follows_soon(tmp_path: Path) -> None:
    one = Running(tmp_path, interval=100_000.0)
    one.register(1)
    await one.until([0.0])
    for port in (2, 3, 4):
        one.register(port)
    await one.until([0.0] * 4)
    one.registry.release("app.example", host="::1", port=4, now=1000.0)
    one.register(5)
    await one.until([0.0] * 4)
    await one.close()


async def test_renewals_alone_wait_for_each_other(tmp_path: Path) -> None:
    one = Running(tmp_path, interval=100_000.0)
    one.register(1)
    await one.until([0.0])
    await asyncio.sleep(2 * SHORT_INTERVAL)
    for now in (1001.0, 1002.0):
        one.register(1, now)
    await asyncio.sleep(2 * SHORT_INTERVAL)
    assert one.ends() == [0.0]
    one.register(2)  # takes them along
    await one.until([2.0, 0.0])
    await one.close()
    one = Running(tmp_path, interval=0.2)
    for now in (1000.0, 1001.0):
        one.register(1, now)
        await one.until([now - 1000.0])
    await one.close()


async def test_a_full_disk_is_said_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    attempts, fsync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal attempts
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return
        attempts += 1
        if attempts < 4:
            raise OSError(errno.ENOSPC, "no")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    one = Running(tmp_path, interval=0.01)
    one.register(1)
    await until(lambda: "leases are saved again" in caplog.text)
    await one.close()
    assert attempts == 4
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith(f"{FILE_NAME} cannot be written: No space left on device; it is tried again")
    assert said[1:] == ["leases are saved again"]
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]


# Instances that share the directory


async def test_instances_that_share_a_directory_have_a_file_each(tmp_path: Path) -> None:
    one, two = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await one.claim("127.0.0.1:1")
    await two.claim("127.0.0.1:2")
    one.close(table(60))
    two.close(table(60, 60))
    # In the other order, and each has its own again.
    two, one = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await two.claim("127.0.0.1:2")
    await one.claim("127.0.0.1:1")
    assert (len(one.load()), len(two.load())) == (1, 2)
    assert sorted(each.name for each in tmp_path.glob("*.json")) == ["leases-2.json", "leases.json"]
    one.close(table(60))
    two.close(table(60))


async def test_an_instance_that_moved_takes_what_is_free(tmp_path: Path) -> None:
    one = Times().snapshot(tmp_path)
    await one.claim("127.0.0.1:1")
    one.close(table(60))
    moved = Times().snapshot(tmp_path)
    await moved.claim("127.0.0.1:99")
    assert len(moved.load()) == 1
    moved.close(table(60))


async def test_a_successor_waits_a_little_for_the_slot_that_is_its_own(tmp_path: Path) -> None:
    one, successor = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await one.claim("127.0.0.1:1")
    claiming = asyncio.create_task(successor.claim("127.0.0.1:1", patience=1000.0))
    await asyncio.sleep(0.1)
    assert not claiming.done()
    one.close(table(60))
    async with asyncio.timeout(30):
        await claiming
    assert len(successor.load()) == 1
    impatient = Times().snapshot(tmp_path)
    await impatient.claim("127.0.0.1:1", patience=0.0)
    assert impatient.load() == []
    for each in (successor, impatient):
        each.close(table(60))


async def test_who_lends_its_file_writes_on_until_a_successor_has_it(tmp_path: Path) -> None:
    one, successor = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await one.claim("127.0.0.1:1")
    one.lend(table(60))
    one.save(table(60, 60))
    await successor.claim("127.0.0.1:1", patience=1000.0)
    assert len(successor.load()) == 2
    one.close(table(60, 60, 60))
    assert len(successor.load()) == 2
    successor.close(table(60))
    assert len(Times().snapshot(tmp_path).load()) == 1


async def test_a_lock_is_nobodys_after_its_holder_was_killed(tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HOLD_FOR_EVER, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"leases.json\n"
    other = Times().snapshot(tmp_path)
    await other.claim("127.0.0.1:2")
    other.close(table(60, 60))
    holder.kill()
    await holder.wait()
    again = Times().snapshot(tmp_path)
    await again.claim("127.0.0.1:1", patience=0.0)
    again.close(table(60))
    assert sorted(each.name for each in tmp_path.glob("*.json")) == ["leases-2.json", "leases.json"]


_HOLD_FOR_EVER = """
import asyncio, pathlib, signal, sys
from portero_py.control.slots import claim
slot = asyncio.run(claim(pathlib.Path(sys.argv[1]), "127.0.0.1:1"))
print(slot.file_name, flush=True)
signal.pause()
"""


async def test_without_locks_there_is_one_file_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no")

    monkeypatch.setattr("fcntl.flock", refuse)
    for name in ("127.0.0.1:1", "127.0.0.1:2"):
        snapshot = Times().snapshot(tmp_path)
        await snapshot.claim(name)
        snapshot.lend(table(60))
        snapshot.close(table(60, 60))
        assert len(Times().snapshot(tmp_path).load()) == 2
    assert "No locks available" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
async def test_a_lock_file_that_is_none_holds_up_nobody(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "leases.lock")
    snapshot = Times().snapshot(tmp_path)
    await snapshot.claim("127.0.0.1:1")
    snapshot.close(table(60))
    assert len(list(tmp_path.glob("leases*.json"))) == 1


async def test_containers_with_one_address_and_names_of_their_own_never_swap(tmp_path: Path) -> None:
    one, two = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await one.claim("[::]:18080 a")
    await two.claim("[::]:18080 b", patience=0.0)
    one.close(table(60))
    two.close(table(60, 60))
    two, one = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await two.claim("[::]:18080 b")
    await one.claim("[::]:18080 a")
    assert (len(one.load()), len(two.load())) == (1, 2)
    one.close(table(60))
    two.close(table(60))


async def test_a_container_with_a_new_name_takes_its_predecessors_file_when_that_has_left(
    tmp_path: Path,
) -> None:
    other, one, successor = (Times().snapshot(tmp_path) for _ in range(3))
    await other.claim("[::]:99 x")
    await one.claim("[::]:18080 a")
    other.close(table(60))
    claiming = asyncio.create_task(successor.claim("[::]:18080 b", patience=1000.0))
    async with asyncio.timeout(30):
        await claiming  # the other one's is free, and better than none
    assert len(successor.load()) == 1
    third = Times().snapshot(tmp_path)
    claiming = asyncio.create_task(third.claim("[::]:18080 c", patience=1000.0))
    one.close(table(60, 60))
    async with asyncio.timeout(30):
        await claiming
    assert len(third.load()) == 2
    for each in (successor, third):
        each.close(table(60))


async def test_the_owner_that_an_older_version_wrote_is_known_by_its_address(tmp_path: Path) -> None:
    (tmp_path / "leases.lock").write_text("127.0.0.1:1")
    (tmp_path / "leases-2.lock").write_text("127.0.0.1:2")
    two = Times().snapshot(tmp_path)
    await two.claim("127.0.0.1:2 a")
    two.close(table(60))
    assert [each.name for each in tmp_path.glob("*.json")] == ["leases-2.json"]


def _refuse_new_locks(monkeypatch: pytest.MonkeyPatch, why: int) -> None:
    really_open = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT and Path(path).suffix == ".lock" and not Path(path).exists():
            raise OSError(why, "no")
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EMFILE, errno.EACCES])
async def test_who_gets_no_file_takes_none_of_anothers_and_asks_again(
    tmp_path: Path, why: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await one.claim("127.0.0.1:1")
    one.save(table(60))
    with monkeypatch.context() as patch:
        _refuse_new_locks(patch, why)
        await two.claim("127.0.0.1:2")
        assert two.load() == []
        with pytest.raises(BadSnapshot, match=f"no file for them in {tmp_path}: {os.strerror(why)}"):
            two.save(table(60, 60))
        with pytest.raises(BadSnapshot):
            two.lend(table(60, 60))
    assert os.strerror(why) in caplog.text
    two.close(table(60, 60))  # there is room again
    assert len(orjson.loads((tmp_path / "leases.json").read_bytes())["leases"]) == 1
    assert len(orjson.loads((tmp_path / "leases-2.json").read_bytes())["leases"]) == 2
    one.close(table(60))


async def test_who_gets_a_file_late_writes_over_nobodys_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, holder = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await one.claim("127.0.0.1:1")
    late = Times().snapshot(tmp_path)
    with monkeypatch.context() as patch:
        _refuse_new_locks(patch, errno.ENOSPC)
        await late.claim("127.0.0.1:2")
    one.close(table(60))  # free now, but it is not ours
    late.close(table(60, 60))
    await holder.claim("127.0.0.1:1")
    assert len(holder.load()) == 1
    holder.close(table(60))


async def test_when_all_are_taken_nobody_shares_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portero_py.control.slots.MOST", 1)
    one, two = Times().snapshot(tmp_path), Times().snapshot(tmp_path)
    await one.claim("127.0.0.1:1")
    await two.claim("127.0.0.1:2")
    with pytest.raises(BadSnapshot, match="all are taken"):
        two.save(table(60))
    one.close(table(60))


def test_a_services_terms_are_not_saved_with_its_leases(tmp_path: Path) -> None:
    times, registry = Times(), Registry()
    registry.configure(
        {"app.example": ServicePolicy(health_path="/up", max_in_flight=7)}, NO_ROUTES, times.steady
    )
    backend = Backend("::1", 8000)
    registry.register(LeaseRequest("app.example", backend, 60), times.steady)
    registry.register(LeaseRequest("app.example", Backend("::1", 8001), 60, "", 1, "/own", 2), times.steady)
    times.snapshot(tmp_path).save(registry.table)
    services = times.snapshot(tmp_path).load()
    for policy, terms in ((ServicePolicy(health_path="/other"), ("/other", 0)), (None, ("", 0))):
        later = Registry()
        later.configure({} if policy is None else {"app.example": policy}, NO_ROUTES, times.steady)
        later.restore(services, 0, times.steady)
        leases = later.table.services["app.example"].leases
        assert [(lease.health_path, lease.max_in_flight) for lease in leases] == [terms, ("/own", 2)]
