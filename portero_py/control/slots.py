"""Which snapshot of leases is whose, when several instances share a state directory.

The rules
- An instance holds one slot: slot 1 is `leases.json`, slot 2 `leases-2.json`, and so on. Whoever holds the
  flock(2) on `leases.lock`, `leases-2.lock`, ... has it. The lock is taken by the process that writes the
  file, after the fork: nobody inherits it, and the kernel gives it back when that process dies.
- The lock file names its last owner (the address of the registration API). After a restart an instance takes
  the slot that was its own. While somebody else holds that one it waits for `PATIENCE` seconds: most often it
  is its own predecessor, who is about to end. Then it takes the first slot that is free, or a new one.
- `lend` is for a process that is about to end and still writes: the lock is then only held while a file is
  written. When a successor has it, there is nothing to write any more.
- Where a file system knows no locks, or takes no new file, slot 1 is used without one, and the log says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import Final

#: Seconds that the owner of a slot has for leaving it to its successor.
PATIENCE: Final = 3.0
STEP: Final = 0.05

MOST: Final = 64
#: The longest name of an owner, bytes.
_NAME: Final = 512

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
    """Hold a slot in `directory`: that of `owner`, if it can be had."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + patience
    while True:
        slot = await asyncio.to_thread(_take, directory, owner, any_slot=loop.time() >= ends_at)
        if slot is not None:
            return slot
        await asyncio.sleep(STEP)


# Private


def _stem(number: int) -> str:
    return "leases" if number == 1 else f"leases-{number}"


def _take(directory: Path, owner: str, *, any_slot: bool) -> Slot | None:
    """A slot; None when that of `owner` is taken and worth waiting for."""
    owners = _owners(directory)
    own = [number for number, found in owners.items() if found == owner]
    others = [number for number in owners if number not in own] if any_slot or not own else []
    for number in (*own, *others):
        try:
            slot = _lock(directory, number, owner)
        except OSError as error:
            return _without_lock(directory, error)
        if slot is not None:
            return slot
    if own and not any_slot:
        return None
    for number in range(len(owners) + 1, MOST + 1):
        try:
            slot = _lock(directory, number, owner)
        except OSError as error:
            return _without_lock(directory, error)
        if slot is not None:
            return slot
    return _without_lock(directory, None)


def _without_lock(directory: Path, error: OSError | None) -> Slot:
    why = "all are taken" if error is None else os.strerror(error.errno or 0)
    _log.warning(
        "no lock for the leases in %s (%s): another instance that shares it may overwrite them",
        directory,
        why,
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
