"""The proxy's processes as /proc shows them: who lives, what they hold open, whose connections they have."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path


class Processes:
    """The supervisor with that pid, and its children: `control`, `worker 0`, `worker 1`, ..."""

    def __init__(self, supervisor: int, port: int) -> None:
        self.supervisor = supervisor
        self._port = port

    def children(self) -> dict[str, int]:
        """Name -> pid of those that live and have got their name."""
        found = {}
        task = Path(f"/proc/{self.supervisor}/task/{self.supervisor}/children")
        for pid in task.read_text().split():
            try:
                comm = Path(f"/proc/{pid}/comm").read_text().strip()
                state = _state(int(pid))
            except OSError:
                continue  # it ended meanwhile
            if comm.startswith("portero-") and state != "Z":
                found[comm.removeprefix("portero-").replace("work", "worker ")] = int(pid)
        return found

    def pids(self) -> frozenset[int]:
        """All children that live, whatever their names: those of an older generation too."""
        task = Path(f"/proc/{self.supervisor}/task/{self.supervisor}/children")
        return frozenset(int(pid) for pid in task.read_text().split())

    def memory(self) -> int:
        """Bytes that all of them hold, what they share counted once (PSS)."""
        total = 0
        for pid in (self.supervisor, *self.pids()):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue  # it ended meanwhile
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        return total

    def all(self) -> dict[str, int]:
        """The same with the supervisor."""
        return {"supervisor": self.supervisor, **self.children()}

    def age(self, pid: int) -> float:
        """Seconds since it was forked."""
        ticks = int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks

    def freeze(self, pid: int) -> None:
        """Stop it, and return when it stands still."""
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while _state(pid) not in "TtZX" and time.monotonic() < deadline:
            time.sleep(0.0005)

    def thaw(self, pid: int) -> None:
        """Let it go on, if it still lives."""
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return

    def ports(self, pid: int) -> frozenset[int]:
        """The clients' ports of the connections that it has accepted on the proxy's port."""
        held = {link for link in _links(pid) if link.startswith("socket:")}
        here = f":{self._port:04X}"
        found = set()
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(here) and f"socket:[{fields[9]}]" in held:
                found.add(int(fields[2].rpartition(":")[2], 16))
        return frozenset(found)

    def descriptors(self, pid: int) -> Counter[str]:
        """What it holds open, by kind: `socket`, `pipe`, a path, ..."""
        # libuv keeps one in reserve for connections that it cannot accept: /dev/null at first, later /.
        links = ("/dev/null" if link == "/" else link for link in _links(pid))
        return Counter(re.sub(r":?\[\d+\]$|\d{4,}", "", link) for link in links)


# Private


def _links(pid: int) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    found = []
    for name in os.listdir(folder):  # noqa: PTH208 - names, not paths
        try:
            found.append(os.readlink(folder / name))  # noqa: PTH115 - what it points to is no path
        except OSError:
            continue  # closed meanwhile
    return found


def _stat(pid: int) -> list[str]:
    """The fields behind the name; the first one is the state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _state(pid: int) -> str:
    return _stat(pid)[0]
