"""A process of its own that takes slots and gives them back: record locks belong to processes.

Run as a program it obeys one line after the other: `take LIMIT`, `room LIMIT`, `give SLOT LIMIT`, `wait`,
`rest`; each is answered by one line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from portero_py.core.model import Backend, Lease
from portero_py.proxy.upstream.rooms import Rooms

SERVICE = "app.example"


def lease(limit: int, port: int = 9000) -> Lease:
    """A lease with this limit."""
    return Lease(SERVICE, "b", Backend("127.0.0.1", port), float("inf"), None, max_in_flight=limit)


class Holder:
    """Worker `number` of `workers`, in a process of its own."""

    def __init__(self, file: int, number: int, workers: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(file), str(number), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[file],
        )
        self.slots: list[int] = []

    def take(self, limit: int) -> bool:
        """Take a slot; whether there was one."""
        slot = int(self._ask(f"take {limit}"))
        if slot >= 0:
            self.slots.append(slot)
        return slot >= 0

    def has_room(self, limit: int) -> bool:
        """Whether there is one."""
        return self._ask(f"room {limit}") == "True"

    def give_back(self, limit: int) -> None:
        """Give the oldest one back."""
        self._ask(f"give {self.slots.pop(0)} {limit}")

    def wait(self) -> None:
        """Tell the others that somebody waits."""
        self._ask("wait")

    def wait_no_more(self) -> None:
        """Nobody waits."""
        self._ask("rest")

    def freeze(self) -> None:
        """It does nothing any more."""
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """It is gone, without a last word."""
        self._process.kill()
        self._process.communicate()
        self.slots.clear()

    # Private

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def _obey(rooms: Rooms, word: str, *numbers: int) -> object:
    if word == "take":
        return rooms.take(lease(numbers[0]))
    if word == "room":
        return rooms.has_room(lease(numbers[0]))
    if word == "give":
        rooms.give_back(lease(numbers[1]), numbers[0])
        return ""
    (rooms.wait if word == "wait" else rooms.wait_no_more)(SERVICE)
    return ""


def main() -> None:
    """Obey until stdin ends."""
    rooms = Rooms(*map(int, sys.argv[1:]))
    for line in sys.stdin:
        word, *numbers = line.split()
        os.write(1, f"{_obey(rooms, word, *map(int, numbers))}\n".encode())


if __name__ == "__main__":
    main()
