"""A program of the operator's that makes and removes DNS records, called once for each.

    PROGRAM [ARGUMENT...] present|cleanup NAME VALUE

- No shell. Its environment is PATH, HOME and the locale: nothing of what portero was given, which holds
  secrets. Its folder is `/`, it has nothing to read, and a session of its own.
- It has `seconds`. When they are over, or portero ends, its whole process group is killed; whatever it has
  left of the group when it ends is killed too. (The group is killed before its leader's number is free.)
  One that became another user (sudo) cannot be killed: it is left to itself.
- What it writes goes to the log, `MAX_LINES` lines of it; the rest is read and dropped, so that it never
  waits for us. Its last line is what an error says.
- One at a time for each record: a lock file says so, to other processes too. The program inherits it, so
  that one which outlived a crash of ours is waited for, as long as it may take at most.

Everything here blocks: it runs in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from portero_py.control.acme.locks import open_lock
from portero_py.core.acme.dns_records import MAX_LINE, TxtRecord, line
from portero_py.errors import DnsFailed

if TYPE_CHECKING:
    from typing import IO

PRESENT: Final = "present"
CLEANUP: Final = "cleanup"

#: Lines of a run that are logged.
MAX_LINES: Final = 100
#: What it is given of our environment.
PASSED_ON: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
#: Where a program is looked for when nobody says.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Seconds between two looks whether it has ended, and for what it wrote last to arrive after that.
_LOOK: Final = 0.05
_LAST_WORDS: Final = 1.0
#: For what was killed to be gone.
_GONE: Final = 1.0

_log = logging.getLogger(__name__)


class HookRun:
    """One call. `run` in a thread; `stop` from any other."""

    def __init__(
        self,
        command: Sequence[str],
        verb: str,
        record: TxtRecord,
        seconds: float,
        lock: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments = (*command, verb, record.name, record.value)
        self._said = f"acme.dns_hook {verb} {record.name}"
        self._seconds = seconds
        self._lock = lock
        self._environ = environment(os.environ if environ is None else environ)
        self._is_over = threading.Event()
        self._turn = threading.Lock()  # to kill, or to give its number back
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Call it, and wait for its end. Raises DnsFailed, StateUnwritable when the lock cannot be made."""
        ends = time.monotonic() + self._seconds
        with self._alone(ends) as lock, _spawned(self._arguments, self._environ, lock) as process:
            output = _Output(self._said)
            self._process = process
            status = self._watched(process, output, time.monotonic() + self._seconds)
        output.close()
        last = f": {output.last}" if output.last else ""
        if status is None:
            raise DnsFailed(f"{self._said}: no end within {self._seconds:g} s, it was killed{last}")
        if status < 0:
            raise DnsFailed(f"{self._said}: it was killed by {_signal_name(-status)}{last}")
        if status:
            raise DnsFailed(f"{self._said}: exit status {status}{last}")

    def stop(self) -> None:
        """Kill it: portero ends. Also before it was called."""
        self._is_over.set()
        with self._turn:
            if self._process is not None:
                _kill_group(self._process)

    # Private

    @contextlib.contextmanager
    def _alone(self, ends: float) -> Iterator[int]:
        """Wait for a program that is at the same record, as long as one may take."""
        descriptor = open_lock(self._lock)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > ends:
                        # It has had its time: what holds the lock is something that it left behind.
                        _log.warning("%s: an earlier one has left a process behind", self._said)
                        break
                except OSError:
                    break  # a file system without locks
                if self._is_over.wait(_LOOK):
                    raise DnsFailed(f"{self._said}: portero ends")
            yield descriptor
        finally:
            os.close(descriptor)

    def _watched(self, process: subprocess.Popen[bytes], output: _Output, ends: float) -> int | None:
        """Its exit status; None when its time was up, or ours."""
        assert process.stdout is not None
        while not _has_ended(process):
            if time.monotonic() > ends or self._is_over.is_set():
                self._end(process)
                output.read(process.stdout, 0)
                return None
            output.read(process.stdout, _LOOK)
        status = self._end(process)
        # Whoever left the group may still write: what has been written by now is all that counts.
        silent_at = time.monotonic() + _LAST_WORDS
        while output.read(process.stdout, _LOOK) and time.monotonic() < silent_at:
            pass
        return status

    def _end(self, process: subprocess.Popen[bytes]) -> int | None:
        """Kill what is left of its group, and take its status; None when it goes on all the same."""
        with self._turn:
            self._process = None
            return _ended(process)


def unfit(program: str) -> str:
    """Why a program cannot be called, in words; "" when it can."""
    if shutil.which(program, path=environment(os.environ)["PATH"]):
        return ""
    return f"{program} {'cannot be run' if os.path.exists(program) else 'is not there'}"  # noqa: PTH110 - a NUL in it is a no


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What the program gets of our environment."""
    return {"PATH": _PATH, **{name: ours[name] for name in PASSED_ON if ours.get(name)}}


# Private


class _Output:
    """What it writes, line by line into the log; the rest is dropped."""

    def __init__(self, said: str) -> None:
        self.last = ""
        self._said = said
        self._lines = 0
        self._dropped = 0
        self._part = b""

    def read(self, pipe: IO[bytes], seconds: float) -> bool:
        """Take what comes within so many seconds; whether more may come."""
        # Not `select`: it knows no descriptor above 1023, and a proxy has many.
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        if not waiting.poll(1000 * seconds):
            return False
        data = os.read(pipe.fileno(), 65536)
        *whole, self._part = (self._part + data).split(b"\n")
        for each in whole:
            self._take(each)
        if len(self._part) > 4 * MAX_LINE:
            self._part = self._part[: 4 * MAX_LINE]
        if not data:
            time.sleep(seconds)  # it has closed its output, and goes on
        return bool(data)

    def close(self) -> None:
        """No more comes."""
        self._take(self._part)
        if self._dropped:
            _log.info("%s: %d lines more", self._said, self._dropped)

    # Private

    def _take(self, data: bytes) -> None:
        text = line(data[: 4 * MAX_LINE].decode("utf-8", "replace"))
        if not text:
            return
        self.last = text
        self._lines += 1
        if self._lines > MAX_LINES:
            self._dropped += 1
        else:
            _log.info("%s: %s", self._said, text)


@contextlib.contextmanager
def _spawned(
    arguments: Sequence[str], environ: Mapping[str, str], lock: int
) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(  # noqa: S603 - the operator named it; its arguments are plain (`TxtRecord`)
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            cwd="/",
            start_new_session=True,
            pass_fds=(lock,),
        )
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise DnsFailed(f"acme.dns_hook: cannot run {arguments[0]}: {reason}") from error
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process
        except BaseException:  # raised on: nobody else ends the program
            _ended(process)
            raise


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has; its number stays taken until it is waited for."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """Kill what is left of its group, and give its number back: its status, None when it goes on."""
    _kill_group(process)
    try:
        return process.wait(_GONE)
    except subprocess.TimeoutExpired:
        _log.warning("acme.dns_hook: process %d cannot be killed, and goes on", process.pid)
        threading.Thread(target=process.wait, name="acme-hook-left", daemon=True).start()
        return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is left of it
    except PermissionError:
        pass  # all that is left of it is another user's, be it dead and waited for


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
