"""What happened in a chaos run and when: the one clock, the faults, the times of trouble, what broke.

Whoever does something to the proxy writes it down here first; whoever sees something break writes that down
without judging it. The judge (`chaos_judge`) puts the two together when the run is over, so that an exchange
that broke just before its reason was known is not blamed on the proxy.

- A `Death` is a process that was killed, with its inventory: the client's ports of the connections that it
  had accepted. It was stopped before the inventory was taken, so nothing is missing and nothing too much.
- A `Trouble` is a time in which something (`control`, `worker 0`, `descriptors`, ...) could not do its work.
- A `Breakage` is what a client, an agent or a watcher saw.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


def now() -> float:
    """The clock of the run, seconds; the same in all processes of this machine."""
    return time.monotonic()


@dataclass(frozen=True)
class Event:
    """Something that was done to the proxy, or that it did visibly."""

    at: float
    what: str


@dataclass(frozen=True)
class Death:
    """A process that was killed; `ports` are its clients'."""

    at: float
    name: str
    pid: int
    ports: frozenset[int]


@dataclass
class Trouble:
    """From `begun` to `ended` (None: still), `what` was not itself."""

    what: str
    begun: float
    ended: float | None = None

    def touches(self, begun: float, ended: float) -> bool:
        """Whether any of it lies in that time."""
        return self.begun <= ended and (self.ended is None or begun <= self.ended)


@dataclass(frozen=True)
class Breakage:
    """One thing that was not as it should be, as it was seen.

    `kind` is one of the judge's; `port` and `opened` (the client's port and when it connected) are those of
    the connection, where there was one.
    """

    kind: str
    who: str
    begun: float
    at: float
    detail: str
    service: str = ""
    status: int = 0
    port: int = 0
    opened: float = 0.0
    answered: int = 0  # exchanges that the connection had completed before


@dataclass
class Journal:
    """Everything that is known of one run."""

    started: float = field(default_factory=now)
    events: list[Event] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    breakages: list[Breakage] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)  # what was done, by kind
    served: Counter[str] = field(default_factory=Counter)  # good answers, by kind of client

    def note(self, what: str) -> None:
        """Write an event down."""
        self.events.append(Event(now(), what))

    def fault(self, name: str, what: str) -> None:
        """Write a fault down, before it is done."""
        self.faults[name] += 1
        self.note(f"{name}: {what}")

    def died(self, name: str, pid: int, ports: frozenset[int]) -> None:
        """A process was killed that had accepted the connections from `ports`."""
        self.deaths.append(Death(now(), name, pid, ports))
        self.note(f"{name} (pid {pid}) is killed with {len(ports)} connections")

    def broke(self, breakage: Breakage) -> None:
        """Write down what was seen."""
        self.breakages.append(breakage)

    @contextmanager
    def trouble(self, what: str, after: float = 0.0) -> Iterator[Trouble]:
        """`what` is in trouble meanwhile, and for `after` seconds more."""
        found = Trouble(what, now())
        self.troubles.append(found)
        try:
            yield found
        finally:
            found.ended = now() + after

    # What the judge asks

    def troubled(self, begun: float, ended: float, *what: str) -> Trouble | None:
        """The first trouble in that time of any of `what`, by the beginning of its name."""
        for trouble in self.troubles:
            if trouble.what.startswith(what) and trouble.touches(begun, ended):
                return trouble
        return None

    def killer(self, port: int, opened: float, at: float) -> Death | None:
        """The death that took that connection along."""
        for death in self.deaths:
            if port in death.ports and opened <= death.at <= at:
                return death
        return None

    def before(self, at: float, count: int = 6) -> list[Event]:
        """The last events before that time."""
        return [event for event in self.events if event.at <= at][-count:]

    def clock(self, at: float) -> str:
        """A time of the run for people."""
        return f"{at - self.started:8.3f} s"
