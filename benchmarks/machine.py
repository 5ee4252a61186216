"""What the benchmark needs to know of this machine: its cores, its CPU clocks, its versions.

CPU time is utime + stime of a whole process tree, from /proc (proc(5)): the kernel scales both so that
their sum is the time the scheduler counted, to one clock tick (10 ms as a rule). At three seconds a
measurement that is an error of a third of a percent.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import portero_py

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

_VERSION_COMMANDS = {
    "nginx": ["nginx", "-v"],
    "haproxy": ["haproxy", "-v"],
    "caddy": ["caddy", "version"],
    "wrk": ["wrk", "-v"],
    "h2load": ["h2load", "--version"],
    "openssl": ["openssl", "version"],
}


def program(name: str) -> str | None:
    """The path of an installed program, also from the sbin folders, or None."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")


def cores() -> tuple[int, int]:
    """The core of the proxy under test, and the core of everything else (the same if there is but one)."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[min(1, len(allowed) - 1)]


def process_tree(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    found = [pid]
    for parent in found:
        for task in _entries(Path(f"/proc/{parent}/task")):
            found += [int(child) for child in _read(task / "children").split()]
    return found


def cpu_seconds(pids: list[int]) -> float:
    """User and system time that these processes and their descendants have used so far, in seconds."""
    ticks = 0
    for root in pids:
        for pid in process_tree(root):
            # The name in parentheses may hold anything, so count fields from the last ")".
            fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
            if fields:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_SECOND


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of these process trees, in bytes."""
    total = 0
    for root in pids:
        for pid in process_tree(root):
            fields = _read(Path(f"/proc/{pid}/statm")).split()
            if len(fields) > 1:
                total += int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def describe() -> dict[str, str]:
    """Processor, kernel, versions and commit: what a reader needs to judge the figures."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    about = {
        "processor": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "portero-py": portero_py.__version__,
        "python": platform.python_version(),
        "commit": _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    for name, command in _VERSION_COMMANDS.items():
        path = program(command[0])
        if path:
            version = re.search(r"\d+(\.\d+)+", _first_line([path, *command[1:]]))
            about[name] = version[0] if version else "?"
    return about


# Private


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else "?"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended in the meantime
        return ""


def _entries(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError:
        return []
