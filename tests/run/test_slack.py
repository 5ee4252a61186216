"""Free memory is given back when a process has nothing to do, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest

from portero_py.run import slack
from portero_py.run.slack import LOOK_SECONDS, WORTH, Slack

#: A process that had 40 MB of buffers, as the proxy has them: what is free, what it holds, and then.
_REAL = """
from pathlib import Path
from portero_py.run import slack, tuning
def held():
    return next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").open() if l.startswith("VmRSS"))
assert tuning.tune_malloc()
heap = slack.glibc()
buffers = [bytes(bytearray(100_000)) for _ in range(400)]
last = bytes(bytearray(100_000))
del buffers
print(heap.free(), held())
heap.give_back()
print(held())
"""


class Process:
    """A heap, a clock, and the CPU time that was used."""

    def __init__(self, free: int) -> None:
        self.bytes_free = free
        self.given_back = 0
        self.now = self.used = 100.0
        self.slack = Slack(self, cpu=lambda: self.used, clock=lambda: self.now)

    def free(self) -> int:
        return self.bytes_free

    def give_back(self) -> None:
        self.given_back += 1
        self.bytes_free = 0

    def later(self, seconds: float, used: float) -> int:
        """Look again; how often memory was given back so far."""
        self.now += seconds
        self.used += used
        self.slack.look()
        return self.given_back


def test_an_idle_process_gives_back_what_is_free() -> None:
    process = Process(WORTH)
    assert process.later(LOOK_SECONDS, 0.0) == 1
    assert process.later(LOOK_SECONDS, 0.0) == 1  # nothing is free any more


def test_a_busy_process_keeps_its_buffers_until_it_is_idle() -> None:
    process = Process(10 * WORTH)
    assert process.later(LOOK_SECONDS, 1.0) == 0
    assert process.later(LOOK_SECONDS, 0.6) == 0
    assert process.later(LOOK_SECONDS, 0.4) == 1


def test_little_is_not_worth_it() -> None:
    assert Process(WORTH - 1).later(LOOK_SECONDS, 0.0) == 0


def test_it_may_be_asked_more_often_than_it_looks() -> None:
    process = Process(WORTH)
    assert process.later(LOOK_SECONDS / 2, 4.0) == 0
    assert process.later(LOOK_SECONDS / 2, 0.0) == 0  # 4 of 10 seconds: busy
    assert process.later(LOOK_SECONDS, 0.0) == 1


def test_where_nobody_says_how_much_is_free_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slack, "glibc", lambda: None)
    now = [0.0]
    watch = Slack(cpu=lambda: 0.0, clock=lambda: now[0])
    now[0] = 2 * LOOK_SECONDS
    watch.look()


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        def __init__(self, name: None) -> None:
            self.malloc_trim = None

    monkeypatch.setattr("ctypes.CDLL", Musl)
    assert slack.glibc() is None


def test_what_is_given_back_is_no_longer_held() -> None:
    if slack.glibc() is None:
        pytest.skip("not glibc 2.33 or later")
    done = subprocess.run(
        [sys.executable, "-c", _REAL], capture_output=True, text=True, timeout=60, check=True
    )
    free, held, left = map(int, done.stdout.split())
    assert free > 30 << 20
    assert held - left > 30 << 20
