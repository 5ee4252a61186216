"""Waiting for a condition, with a deadline: the only place of the end-to-end suite that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds that anything may take on a machine busy with other things.
PATIENCE = 60.0


def eventually(check: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Return the first truthy result of `check`; fail with `what` when none comes in time."""
    deadline = time.monotonic() + seconds
    pause = 0.002
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds} s still not: {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def settled(read: Callable[[], int], quiet: float = 0.4, seconds: float = PATIENCE) -> int:
    """Return the value of `read` once it has not changed for `quiet` seconds."""
    deadline = time.monotonic() + seconds
    last, since = read(), time.monotonic()
    while time.monotonic() - since < quiet:
        if time.monotonic() > deadline:
            raise AssertionError(f"it never settled: {last}")
        time.sleep(0.02)
        now = read()
        if now != last:
            last, since = now, time.monotonic()
    return last
