"""Locks between instances that share a state directory.

A lock file is locked with flock(2) and holds a lease: who has it, and until when.
- On one machine flock decides, containers that share a volume included: the kernel gives it back when the
  holder dies, so nobody waits for the dead. (The boot id says whether it is the same kernel.)
- Between machines flock may or may not work (NFS does, others do not). There the lease decides: somebody
  else's that has not ended is respected, so what a dead machine held is free after `LEASE` seconds.

A lock file whose bytes are no lease, or one longer than `LEASE` can have made it, says nothing.

Acquiring and renewing block, so they run in a thread, and go on there when whoever waited was cancelled.
`release` may so come while they are at work: then it is they who close the file, at their end.

The lease is renewed while an order goes on. Clocks of machines that share a directory must agree within a
minute or so.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from portero_py.control.acme.files import decoded, make_folder
from portero_py.control.regular_files import UnfitFileError, require_regular
from portero_py.errors import Busy, StateUnwritable

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds: longer than any single request to a CA takes.
LEASE: Final = 180.0

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """What tells one running kernel from the others."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return os.uname().nodename


class Lock:
    """One lock file, held between `acquire` and `release`. `owner` names this machine."""

    def __init__(self, path: Path, owner: str | None = None) -> None:
        self._path = path
        self._owner = machine() if owner is None else owner
        self._turn = threading.Lock()
        self._descriptor = -1
        self._is_over = False

    def acquire(self, now: float) -> None:
        """Take it. Raises Busy when somebody else has it, StateUnwritable when the file cannot be made."""
        with self._at_work():
            descriptor = open_lock(self._path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._respect(_read(descriptor), now)
            except BlockingIOError as error:
                os.close(descriptor)
                raise Busy(f"another process is at it ({self._path})") from error
            except OSError as error:
                os.close(descriptor)
                raise _cannot("lock", self._path, error) from error
            except BaseException:  # raised on, Busy for one: nobody else closes the descriptor
                os.close(descriptor)
                raise
            self._descriptor = descriptor
            self._sign(now)

    def renew(self, now: float) -> None:
        """Have it for `LEASE` seconds from `now`."""
        with self._at_work():
            if self._descriptor >= 0:  # else it was given back
                self._sign(now)

    def release(self) -> None:
        """Give it back, for good."""
        self._is_over = True
        if self._turn.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._turn.release()

    # Private

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        try:
            with self._turn:
                yield
        finally:
            if self._is_over:  # `release` came meanwhile
                self.release()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)

    def _respect(self, lease: dict[str, float | str], now: float) -> None:
        # Twice: clocks differ. What goes further was made by a clock that was wrong.
        ends = float(lease.get("until", 0))
        if lease.get("owner") not in (None, self._owner) and now < ends <= now + 2 * LEASE:
            raise Busy(f"another machine is at it ({self._path})")

    def _sign(self, now: float) -> None:
        lease = {"owner": self._owner, "pid": os.getpid(), "until": round(now + LEASE, 3)}
        content = json.dumps(lease).encode()
        try:
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))
        except OSError as error:
            raise _cannot("write", self._path, error) from error


@contextmanager
def account_in_use(path: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Keep others from changing the account's key; `exclusive`: from using it. Raises Busy."""
    descriptor = open_lock(path)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Busy(f"the ACME account is in use ({path})") from error
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """A lock file, made when it is missing; whoever has it closes it. Raises StateUnwritable."""
    try:
        make_folder(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise _cannot("open", path, error) from error
    try:
        require_regular(descriptor)
    except UnfitFileError as error:
        os.close(descriptor)
        raise StateUnwritable(f"{path} {error}") from error
    return descriptor


# Private


def _cannot(verb: str, path: Path, error: OSError) -> StateUnwritable:
    return StateUnwritable(f"cannot {verb} {path}: {os.strerror(error.errno or 0)}")


def _read(descriptor: int) -> dict[str, float | str]:
    """The lease in the file; an empty one where there is none, or a torn one."""
    try:
        found = decoded(os.pread(descriptor, 4096, 0))
        float(found.get("until", 0))
    except (ValueError, OverflowError, TypeError, AttributeError):
        return {}
    return dict(found)
