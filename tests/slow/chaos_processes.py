"""The proxy's processes as /proc shows them: who lives, what they hold open, whose connections they have."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path


class Processes:
    """The main process with that pid, its supervisor, and whose children: `control`, `worker 0`, ...

    After an upgrade there are two supervisors for a while: the younger one counts.
    """

    def __init__(self, main: int, port: int) -> None:
        self.main = main
        self._port = port

    @property
    def supervisor(self) -> int:
        """Of the generation that serves, or is about to."""
        return max(_children(self.main), key=lambda pid: float(_stat(pid)[19]))

    def children(self) -> dict[str, int]:
        """Name -> pid of those that live and have got their name."""
        found = {}
        for pid in _children(self.supervisor):
            try:
                comm = Path(f"/proc/{pid}/comm").read_text().strip()
                state = _state(pid)
            except OSError:
                continue  # it ended meanwhile
            if comm.startswith("portero-") and state != "Z":
                found[comm.removeprefix("portero-").replace("work", "worker ")] = pid
        return found

    def pids(self) -> frozenset[int]:
        """All that live, whatever their names: those of an older generation too."""
        found, to_look_at = set(), [self.main]
        while to_look_at:
            pid = to_look_at.pop()
            found.add(pid)
            to_look_at += _children(pid)
        return frozenset(found)

    def memory(self) -> int:
        """Bytes that all of them hold, what they share counted once (PSS)."""
        total = 0
        for pid in self.pids():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue  # it ended meanwhile
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        return total

    def all(self) -> dict[str, int]:
        """The same with the supervisor and the main process."""
        return {"main": self.main, "supervisor": self.supervisor, **self.children()}

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
        return Counter(re.sub(r":?\[\d+\]$|\d{4,}|(?<=/portero-)\w+", "", link) for link in links)


# Private


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []  # it ended meanwhile


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
