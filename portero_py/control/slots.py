"""Which snapshot of leases is whose, when several instances share a state directory.

The rules
- An instance holds one slot: slot 1 is `leases.json`, slot 2 `leases-2.json`, and so on. Whoever holds the
  flock(2) on `leases.lock`, `leases-2.lock`, ... has it. The lock is taken by the process that writes the
  file, after the fork: nobody inherits it, and the kernel gives it back when that process dies.
- The lock file names its last owner: the address of the registration API, and the host (containers have one
  address and several hosts). After a restart an instance takes the slot that was its own. While somebody else
  holds that one it waits for `PATIENCE` seconds: most often it is its own predecessor, who is about to end.
  Then it takes the first slot that is free, or a new one.
- An instance that has no slot (it is new, or its container got a new host name) takes one that is free, first
  one of its address. While one of its address is held it waits in the same way: that may be its predecessor.
- `lend` is for a process that is about to end and still writes: the lock is then only held while a file is
  written. When a successor has it, there is nothing to write any more.
- Where a file system knows no locks, slot 1 is used without one, and the log says so. Where locks work,
  nobody ever writes without one: an instance that gets no slot (the disk takes no new file) has none for the
  time being, and its leases are in memory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from portero_py.errors import BadSnapshot

#: Seconds that the owner of a slot has for leaving it to its successor.
PATIENCE: Final = 3.0
STEP: Final = 0.05

MOST: Final = 64
#: The longest name of an owner, bytes.
_NAME: Final = 512

#: What a file system says that knows no locks.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})

_log = logging.getLogger(__name__)


class Slot:
    """One slot that is held. `file_name` is that of its snapshot."""

    def __init__(self, number: int, descriptor: int = -1) -> None:
        self.file_name = f"{_stem(number)}.json"
        self._descriptor = descriptor
        self._lent = False
        self._lost = False

    def lend(self) -> None:
        """From now on hold the lock between `enter` and `leave` only."""
        self._lent = True
        self.leave()

    def enter(self) -> bool:
        """Before the snapshot is written: whether it is still ours to write."""
        if self._lent and not self._lost and self._descriptor >= 0:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lost = True
        return not self._lost

    def leave(self) -> None:
        """After that."""
        if self._lent and not self._lost and self._descriptor >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def release(self) -> None:
        """Give it back."""
        descriptor, self._descriptor = self._descriptor, -1
        self._lost = True
        if descriptor >= 0:
            os.close(descriptor)


async def claim(directory: Path, owner: str, patience: float = PATIENCE) -> Slot:
    """Hold a slot in `directory`: that of `owner` ("address host"), if it can be had.

    Raises BadSnapshot when there is none to be had now.
    """
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + patience
    while True:
        slot = await asyncio.to_thread(_take, directory, owner, any_slot=loop.time() >= ends_at)
        if slot is not None:
            return slot
        await asyncio.sleep(STEP)


def claim_late(directory: Path, owner: str) -> Slot:
    """Hold a slot for leases that are there already: that of `owner`, or a new one, never another's.

    Raises BadSnapshot when there is none to be had now.
    """
    own = [number for number, found in _owners(directory).items() if found == owner]
    return _first_free(directory, owner, own) or _new(directory, owner)


# Private


def _stem(number: int) -> str:
    return "leases" if number == 1 else f"leases-{number}"


def _take(directory: Path, owner: str, *, any_slot: bool) -> Slot | None:
    """A slot; None when one is taken that is worth waiting for. Raises BadSnapshot."""
    owners = _owners(directory)
    address = owner.partition(" ")[0]
    own = [number for number, found in owners.items() if found == owner]
    kin = [number for number, found in owners.items() if found.partition(" ")[0] == address]
    candidates = list(own) if own and not any_slot else [*own, *kin, *owners]
    slot = _first_free(directory, owner, dict.fromkeys(candidates))
    if slot is not None:
        return slot
    return None if kin and not any_slot else _new(directory, owner)


def _first_free(directory: Path, owner: str, numbers: Iterable[int]) -> Slot | None:
    locks_work = False
    for number in numbers:
        try:
            slot = _lock(directory, number, owner)
        except OSError as error:
            if error.errno in _NO_LOCKS and not locks_work:
                return _without_lock(directory, error)
            _log.debug("%s.lock cannot be used: %s", _stem(number), error)
            continue
        if slot is not None:
            return slot
        locks_work = True
    return None


def _new(directory: Path, owner: str) -> Slot:
    """A slot that nobody had. Raises BadSnapshot."""
    why = "all are taken"
    for number in range(len(_owners(directory)) + 1, MOST + 1):
        try:
            slot = _lock(directory, number, owner)
        except OSError as error:
            if error.errno in _NO_LOCKS and number == 1:
                return _without_lock(directory, error)
            why = os.strerror(error.errno or 0)
            break
        if slot is not None:
            return slot
    raise BadSnapshot(f"there is no file for them in {directory}: {why}")


def _without_lock(directory: Path, error: OSError) -> Slot:
    _log.warning(
        "no lock for the leases in %s (%s): another instance that shares it may overwrite them",
        directory,
        os.strerror(error.errno or 0),
    )
    return Slot(1)


def _owners(directory: Path) -> dict[int, str]:
    """Who had each slot that there is, by its number."""
    owners = {}
    for number in range(1, MOST + 1):
        try:
            descriptor = _open(directory / f"{_stem(number)}.lock", os.O_RDONLY)
        except FileNotFoundError:
            break
        except OSError:
            owners[number] = ""
            continue
        try:
            owners[number] = os.read(descriptor, _NAME).decode("utf-8", "replace")
        except OSError:  # a directory, a FIFO
            owners[number] = ""
        finally:
            os.close(descriptor)
    return owners


def _lock(directory: Path, number: int, owner: str) -> Slot | None:
    """That slot; None when somebody has it. Raises OSError where there are no locks."""
    path = directory / f"{_stem(number)}.lock"
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    with contextlib.suppress(OSError):  # the disk may be full: then it is not found again by its name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode()[:_NAME], 0)
    return Slot(number, descriptor)


def _open(path: Path, flags: int) -> int:
    # O_NONBLOCK: a FIFO must not hold up the start.
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
