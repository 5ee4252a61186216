"""What a scenario asks of every proxy, in words that each of them has a way for.

The same times everywhere: 3 s to connect, 10 s to begin an answer, health checks every second on /health,
30 s to finish what is in flight when it ends. Each proxy is configured as its own documentation advises for
this, so that what is compared is the best of each.
"""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from benchmarks.faults.stage import Stage
from benchmarks.stage import BenchError, free_port

CONNECT_SECONDS = 3
HEAD_SECONDS = 10
DRAIN_SECONDS = 30
HEALTH_SECONDS = 1


class Peer(ABC):
    """A proxy with one TLS listener, HTTP/1.1 and HTTP/2, before the backends of one service.

    `add`, `remove`, `reload`, `restart` and `upgrade` work on the running one; they raise BenchError when it
    does not do as it is told.
    """

    #: How it does what the scenarios of these names ask for: for the table's reader.
    ways: ClassVar[dict[str, str]] = {}

    def __init__(self, stage: Stage, backends: list[str], descriptors: int = 0) -> None:
        self.stage = stage
        self.backends = list(backends)
        self.descriptors = descriptors
        self.port = free_port()
        self.changing = threading.Lock()  # two backends may leave at once

    @abstractmethod
    def start(self, *, kept_socket: bool = False) -> None:
        """Start it; `kept_socket`: somebody else holds the listening socket, where it can be had that way."""

    @abstractmethod
    def add(self, backend: str) -> None:
        """From the return on, requests may go there."""

    @abstractmethod
    def remove(self, backend: str, wait: float) -> bool:
        """From the return on, no new request goes there. True: and it vouches that none is there any more,
        for which it may wait so many seconds.
        """

    @abstractmethod
    def reload(self) -> None:
        """Let it read its configuration and its certificates again."""

    @abstractmethod
    def restart(self) -> None:
        """The best restart of the whole program that it has."""

    @abstractmethod
    def stop(self) -> None:
        """End it as a service manager does: SIGTERM or its like, and wait."""

    @abstractmethod
    def upgrade(self) -> None:
        """Let the program that is installed now take over from the one that runs; on return it has."""

    @abstractmethod
    def close(self) -> None:
        """End what `Stage` does not know of, and give back what the harness itself holds."""

    def is_alive(self) -> bool:
        """Whether somebody accepts."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError:
            return False
        return True

    def fail(self, why: str) -> BenchError:
        return BenchError(f"{type(self).__name__}: {why}")
