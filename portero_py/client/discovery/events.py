"""What happens to containers, as far as it matters: one event of Docker's stream, read.

Most say only that something changed: what it is now, an inspection shows. Those after which nothing new may
go to a container say so themselves, because they come while there is still time: a `kill` precedes the end by
what the program makes of its signal, a `die` is the end. `stop` is none of them: it may come after the next
`start`.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import orjson

from portero_py.client.discovery.containers import is_id, texts


class Happened(Enum):
    """What an event says of a container."""

    CHANGED = "changed"  # look at it
    STARTED = "started"  # anew: look at it
    PAUSED = "paused"  # nothing new may go there
    UNHEALTHY = "unhealthy"  # nothing new may go there
    SIGNALLED = "signalled"  # it may be about to end
    ENDED = "ended"
    DESTROYED = "destroyed"


@dataclass(frozen=True, slots=True)
class Event:
    """`signal_number` is that of SIGNALLED, 0 when it is none that we know.

    `at` is when it was, by Docker's clock, in seconds; 0.0 when that is not said.
    """

    happened: Happened
    container_id: str
    signal_number: int = 0
    at: float = 0.0


_ACTIONS: Final = {
    "start": Happened.STARTED,
    "stop": Happened.CHANGED,
    "unpause": Happened.CHANGED,
    "rename": Happened.CHANGED,
    "update": Happened.CHANGED,
    "health_status": Happened.CHANGED,
    "health_status: healthy": Happened.CHANGED,
    "health_status: starting": Happened.CHANGED,
    "health_status: unhealthy": Happened.UNHEALTHY,
    "pause": Happened.PAUSED,
    "kill": Happened.SIGNALLED,
    "die": Happened.ENDED,
    "died": Happened.ENDED,  # Podman
    "destroy": Happened.DESTROYED,
    "remove": Happened.DESTROYED,  # Podman
}
_OF_NETWORKS: Final = ("connect", "disconnect")

#: What Docker is asked for: an exec or a copy is no business of ours, and there are many of them.
FILTERS: Final = {
    "type": ["container", "network"],
    "event": [*(action for action in _ACTIONS if ":" not in action), *_OF_NETWORKS],
}


def read_event(line: bytes) -> Event | None:
    """The event in one line of the stream, None when it does not matter. Raises ValueError for no JSON."""
    said: Any = orjson.loads(line)
    if not isinstance(said, dict) or not isinstance(said.get("Actor"), dict):
        return None
    action, actor = said.get("Action"), said["Actor"]
    attributes = texts(actor.get("Attributes"))
    container_id = actor.get("ID")
    happened = _ACTIONS.get(action) if isinstance(action, str) else None
    if said.get("Type") == "network":
        container_id = attributes.get("container")
        happened = Happened.CHANGED if action in _OF_NETWORKS else None
    if happened is None or not isinstance(container_id, str) or not is_id(container_id):
        return None
    number = signal_number(attributes.get("signal", "")) if happened is Happened.SIGNALLED else 0
    nanoseconds = said.get("timeNano")
    return Event(happened, container_id, number, nanoseconds / 1e9 if isinstance(nanoseconds, int) else 0.0)


def signal_number(name: str) -> int:
    """The number of a signal as Docker writes it: "15", "SIGTERM", "term", "RTMIN+3"; 0 when it is none."""
    name = name.strip().upper().removeprefix("SIG")
    if name.isascii() and name.isdigit():
        return int(name[:4])
    base, plus, offset = name.partition("+")
    try:
        number = int(signal.Signals[f"SIG{base}"])
    except KeyError:
        return 0
    if not plus:
        return number
    return number + int(offset) if offset.isascii() and offset.isdigit() and len(offset) < 3 else 0
