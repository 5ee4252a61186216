"""Tests of what belongs to a whole process (signals, timers, children) run in a process of their own.

The one of the tests has threads, which the kernel may give a signal instead of who waits for it, and children
of others; and its interval timer is what ends a test that hangs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from portero_py.run import debugging

#: Seconds, which only what hangs needs.
PATIENCE = 60


def alone(work: Callable[[], None]) -> Callable[[], None]:
    """Have `work`, a function of a module, done by another process: it fails as that one fails, or hangs."""

    @functools.wraps(work)
    def test() -> None:
        __tracebackhide__ = True
        done = ended(work)
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"

    return test


def ended(work: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """How a process ended that did `work`, which nobody else has to do."""
    names = work.__module__, work.__qualname__
    return subprocess.run(
        [sys.executable, "-c", f"from tests import own_process; own_process.work_of{names}()"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        text=True,
    )


def work_of(module: str, name: str) -> Callable[[], None]:
    """What is to be done in this process."""
    debugging.watch()  # an illegal step raises
    found = getattr(importlib.import_module(module), name)
    work: Callable[[], None] = inspect.unwrap(found)
    return work
