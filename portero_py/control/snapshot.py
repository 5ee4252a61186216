"""The leases on disk: what lets them survive a restart of portero.

The rules
- One file an instance in the state directory (`slots` says which), only for its owner. A new one is written
  beside it, synced and renamed: what is read is always whole.
- It is written in a thread, at once when a lease begins, moves or ends. Then there is a pause, in which more
  changes gather: the more work the table is, the longer (`SHARE`). Renewals alone wait for `INTERVAL`.
- One write at a time, and never an older table over a newer one: what is written at the end waits for what is
  being written.
- A steady clock says nothing after a restart: times in the file are wall-clock times. What has expired
  meanwhile is dropped, and if the clock was set back no lease is longer than it was when it was granted. Null
  is the time of what never ends.
- Each source's lease is written by itself, also where several have one address. What is paused or stopped is
  written too.
- A file that cannot be used is no reason not to start: it is set aside, named in the log, and backends
  register again. What is in it is looked at as closely as what a backend sends: one lease that could never
  have been granted, and the file is none. Neither is a disk that is full: leases go on in memory, and saving
  them is tried again.
- Only what was read is judged. A file that cannot be read just now (no descriptors, a faulty disk) stays
  where it is, and nothing is written over it: it may be good. When it can be read again, it is set aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import orjson

from portero_py.control.api.body import lease_request
from portero_py.control.slots import PATIENCE, Slot, claim, claim_late
from portero_py.core.model import API, NEVER, Backend, Halt, Lease, Service
from portero_py.core.names import normalise_service_name
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import BadField, BadSnapshot
from portero_py.feed.messages import lease_from

#: Seconds between two writes when only renewals came, and before another attempt after a failure.
INTERVAL: Final = 5.0
#: Seconds between two writes, at least.
SHORT_INTERVAL: Final = 0.1
#: The part of the processor's time that writing may take: 10,000 leases are 40 ms.
SHARE: Final = 0.02

#: What is set aside is kept, as long as there are not more of them.
MOST_BAD: Final = 3

FILE_NAME: Final = "leases.json"

_FORMAT: Final = 1
_BACKEND: Final = tuple(each.name for each in fields(Backend))
_LEASE: Final = frozenset(each.name for each in fields(Lease))

# O_NONBLOCK: a FIFO in the place of a file must hold up nobody.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK

#: What opening something says that will never be a file: a directory, a loop of links, a socket, a device.
_NO_FILE: Final = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV})
#: What a file system says that does not sync directories, or an owner who may only write into one.
_NO_SYNC: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES})

_log = logging.getLogger(__name__)


class Snapshot:
    """The file in `directory`. `clock` is the registry's, `wall_clock` gives seconds since the epoch.

    `claim` before the others when `directory` may be shared; `run`, with `changed` whenever there is
    something new; `close` at the end.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        interval: float = INTERVAL,
    ) -> None:
        self._directory = Path(directory)
        self._path = self._directory / FILE_NAME
        self._slot: Slot | None = None
        self._homeless = ""  # who still wants a slot
        self._clock = clock
        self._wall_clock = wall_clock
        self._interval = interval
        self._turn = threading.Lock()  # one write at a time
        self._saved = -1  # the version that is on disk
        self._is_unread = False  # there is a file, and nobody knows what is in it
        # while it runs
        self._generation = -1
        self._changed = asyncio.Event()
        self._urgent = asyncio.Event()

    async def claim(self, owner: str, patience: float = PATIENCE) -> None:
        """Find out which file is that of `owner`, and keep others away from it.

        If there is none to be had, nothing is loaded, and saving asks for one again.
        """
        try:
            self._moved_into(await claim(self._directory, owner, patience))
        except BadSnapshot as error:
            self._homeless = owner
            _log.error("starting without leases, and with none saved for the time being: %s", error)

    def load(self) -> list[Service]:
        """The services that were saved, with what is left of their leases.

        Raises BadSnapshot when they cannot be used; then the file is out of the way, unless it could not even
        be read.
        """
        if self._homeless:
            return []
        try:
            content = orjson.loads(self._read())
            return self._services(self._leases(content), _halts_from(content))
        except FileNotFoundError:
            return []
        except BadSnapshot as error:
            raise BadSnapshot(f"{error}{self._set_aside()}") from error
        except OSError as error:
            why = f"{self._path} cannot be read: {os.strerror(error.errno or 0)}"
            if error.errno in _NO_FILE:
                raise BadSnapshot(f"{why}{self._set_aside()}") from error
            self._is_unread = True
            raise BadSnapshot(f"{why}; it stays, and no leases are saved until it can be") from error
        except (ValueError, TypeError, KeyError, AttributeError, BadField) as error:
            raise BadSnapshot(f"{self._path} is no snapshot of leases{self._set_aside()}") from error

    def save(self, table: RoutingTable) -> float:
        """Write the leases of `table`, unless they are on disk already; the processor time that it took.

        Raises BadSnapshot.
        """
        with self._turn:
            begun = time.thread_time()
            if self._homeless:
                self._moved_into(claim_late(self._directory, self._homeless))
                self._homeless = ""
            if self._slot is not None and not self._slot.enter():
                return 0.0
            try:
                if table.version > self._saved:
                    if self._is_unread:
                        self._make_way()
                    self._write(self._content(table))
                    self._saved = table.version
            except OSError as error:
                raise BadSnapshot(
                    f"{self._path} cannot be written: {os.strerror(error.errno or 0)}"
                ) from error
            finally:
                if self._slot is not None:
                    self._slot.leave()
            return time.thread_time() - begun

    def changed(self, generation: int) -> None:
        """There is a new table; `generation` is `Registry.generation`."""
        if generation != self._generation:
            self._generation = generation
            self._urgent.set()
        self._changed.set()

    async def run(self, newest: Callable[[], RoutingTable]) -> None:
        """Save the newest table whenever it has changed, until cancelled."""
        complained = False
        self._changed.set()  # what an earlier run may have taken note of, and not saved
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._urgent.clear()
            try:
                seconds = await asyncio.to_thread(self.save, newest())
            except BadSnapshot as error:
                if not complained:
                    _log.error(
                        "leases go on in memory, but would not survive a restart: %s; it is tried again",
                        error,
                    )
                complained = True
                await asyncio.sleep(self._interval)
                self._changed.set()
            else:
                if complained:
                    _log.info("leases are saved again")
                complained = False
                pause = min(max(seconds / SHARE, SHORT_INTERVAL), self._interval)
                await asyncio.sleep(pause)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval - pause):
                        await self._urgent.wait()

    def lend(self, table: RoutingTable) -> None:
        """Save `table`. From then on a successor may have the file; when it has, nothing is saved any more.

        Raises BadSnapshot.
        """
        try:
            self.save(table)
        finally:
            if self._slot is not None:
                with self._turn:
                    self._slot.lend()

    def close(self, table: RoutingTable) -> None:
        """Save for the last time. Raises BadSnapshot."""
        try:
            self.save(table)
        finally:
            if self._slot is not None:
                self._slot.release()

    # Private

    def _moved_into(self, slot: Slot) -> None:
        self._slot = slot
        self._path = self._directory / slot.file_name

    def _read(self) -> bytes:
        with open(os.open(self._path, _READ), "rb") as file:  # noqa: PTH123 - by descriptor
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadSnapshot(f"{self._path} is no regular file")
            return file.read()

    def _make_way(self) -> None:
        """Before the first write over a file that nobody has read. Raises BadSnapshot while nobody can."""
        try:
            self._read()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise BadSnapshot(
                f"{self._path} cannot be read, nor replaced unread: {os.strerror(error.errno or 0)}"
            ) from error
        else:
            _log.warning("%s can be read again%s", self._path, self._set_aside())
        self._is_unread = False

    def _set_aside(self) -> str:
        """Keep what cannot be used for whoever wants to look at it; what to say about it."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._wall_clock()))
        place = self._path.with_name(f"{self._path.name}.bad-{stamp}")
        try:
            self._path.rename(place)
        except OSError as error:
            return f"; it stays there: {os.strerror(error.errno or 0)}"
        others = sorted(each for each in self._directory.glob(f"{self._path.name}.bad-*") if each != place)
        for old in others[: max(len(others) + 1 - MOST_BAD, 0)]:
            with contextlib.suppress(OSError):
                old.unlink()
        return f"; it is now {place}"

    def _leases(self, content: Any) -> list[Lease]:
        if content["format"] != _FORMAT:
            raise BadSnapshot(f"{self._path} was written by another version of portero-py")
        return [_lease_from(each) for each in content["leases"]]

    def _services(self, leases: list[Lease], halts: Mapping[str, Halt]) -> list[Service]:
        shift, now = self._wall_clock() - self._clock(), self._clock()
        services: dict[str, list[Lease]] = {}
        for lease in leases:
            longest = NEVER if lease.ttl_seconds is None else now + lease.ttl_seconds
            expires_at = min(lease.expires_at - shift, longest)
            if now < expires_at:
                since = min(lease.since - shift, now) if lease.since else now
                there = services.setdefault(lease.service, [])
                there.append(replace(lease, expires_at=expires_at, since=since))
        halted = {name: halt for name, halt in halts.items() if name not in services}
        return [
            *(Service(name, tuple(found), halts.get(name)) for name, found in services.items()),
            *(Service(name, (), halt) for name, halt in halted.items()),
        ]

    def _content(self, table: RoutingTable) -> bytes:
        shift = self._wall_clock() - self._clock()
        leases = [
            replace(lease, expires_at=lease.expires_at + shift, since=lease.since + shift)
            for service in table.services.values()
            for entry in service.leases
            for lease in entry.grants
        ]
        halts = {name: service.halt for name, service in table.services.items() if service.halt is not None}
        return orjson.dumps({"format": _FORMAT, "leases": leases, "halts": halts})

    def _write(self, content: bytes) -> None:
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            with open(os.open(part, _WRITE, 0o600), "wb") as file:  # noqa: PTH123 - by descriptor
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
            _sync(self._directory)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def _lease_from(written: dict[str, Any]) -> Lease:
    """One lease of the file. Raises KeyError, TypeError, ValueError, BadField for what never was granted."""
    if written.get("also") or written.get("granted"):
        raise ValueError("each lease is written by itself, as it was granted")
    if written.keys() - _LEASE or written["backend"].keys() - set(_BACKEND):
        raise ValueError("a lease with fields that nobody knows")
    lease = lease_from(written)
    if not isinstance(lease.source, str) or not isinstance(lease.instance_id, str):
        raise TypeError("a source and an instance id are text")
    of_source = "" if lease.source == API else f" ({lease.source})"
    if not lease.source.isprintable() or not lease.instance_id.endswith(of_source):
        raise ValueError("the instance id is not of that source")
    instance_id = lease.instance_id.removesuffix(of_source)
    ttl = 1 if lease.ttl_seconds is None else lease.ttl_seconds
    asked = lease_request(
        {
            "service_name": lease.service,
            "instance_id": instance_id,
            "ttl_seconds": ttl,
            "weight": lease.weight,
            "health_path": lease.health_path,
            "max_in_flight": lease.max_in_flight or None,
            **{name: getattr(lease.backend, name) for name in _BACKEND},
        }
    )
    was = lease.service, instance_id, lease.backend, lease.weight, lease.health_path, lease.max_in_flight
    if was != (
        asked.service,
        asked.instance_id,
        asked.backend,
        asked.weight,
        asked.health_path,
        asked.max_in_flight,
    ):
        raise ValueError("a lease that was never granted in that form")
    if type(lease.expires_at) not in (int, float) or math.isnan(lease.expires_at) or not instance_id:
        raise ValueError("a lease without an end or an id")
    if type(lease.since) not in (int, float) or not math.isfinite(lease.since):
        raise ValueError("a state without a beginning")
    return lease


def _halts_from(content: dict[str, Any]) -> dict[str, Halt]:
    """The services that are paused or stopped. Raises as `_lease_from`."""
    found = {}
    for name, written in content.get("halts", {}).items():
        seconds, message = written["seconds"], written["message"]
        is_time = seconds is None or (type(seconds) in (int, float) and 0 < seconds < math.inf)
        if normalise_service_name(name) != name or not is_time or not isinstance(message, str):
            raise ValueError("a service that was never paused in that form")
        found[name] = Halt(seconds, message)
    return found


def _sync(directory: Path) -> None:
    """Have a rename on disk. Raises OSError."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
