"""What is wanted of each container now, from what happened and what was seen. Pure: time is an argument.

The rules
- An event only says that a container is worth a look, or that nothing new may go there from now on. What it
  is, an inspection shows; one that began before the container's last event shows what it was: look again.
- A container that got a signal which ends it (SIGTERM, SIGINT, SIGKILL, or its own stop signal) is out until
  it is started anew, whatever an inspection says: it still runs, and may even be healthy. A program that made
  something else of its signal is taken back after STOP_PATIENCE. Other signals (SIGHUP, say) end nothing.
- Who is not in a listing is gone, unless something happened to it since that began.
- What is wrong with a container is said when it should serve, once, and again only when it is something else.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from portero_py.client.discovery.containers import Container, Options, is_id, texts, wanted
from portero_py.client.discovery.events import Event, Happened, signal_number
from portero_py.client.discovery.labels import is_labelled
from portero_py.client.registrar import Registration

#: Seconds after which a container that was told to stop, and did not, is taken for one that goes on. Longer
#: than `docker stop --time` is in practice.
STOP_PATIENCE: Final = 600.0

#: Of how many containers it is remembered what was said of their labels.
REMEMBERED: Final = 10_000

_ENDING: Final = frozenset({int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGKILL)})


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look led to: `registrations` are wanted; none, and `why_not`, when it is to be out.

    `complaint` is what to tell the operator, "" when there is nothing, or nothing new. `is_news` says whether
    it was otherwise, or nobody knew, when it was looked at before.
    """

    name: str
    registrations: tuple[Registration, ...] = ()
    why_not: str = ""
    complaint: str = ""
    is_news: bool = False


class Watch:
    """The containers of one Docker. `engine` is part of their leases' names."""

    def __init__(self, options: Options, engine: str = "") -> None:
        self._options = options
        self._engine = engine
        self._known: dict[str, _Known] = {}
        self._pending: dict[str, None] = {}
        self._complained: dict[str, str] = {}
        self._moment = 0

    def next_look(self) -> str | None:
        """Who is to be looked at next; it is not named again before something happens to it."""
        for container_id in self._pending:
            del self._pending[container_id]
            return container_id
        return None

    @property
    def count(self) -> int:
        """How many containers speak of us, or did something and are not looked at yet."""
        return len(self._known)

    @property
    def is_settled(self) -> bool:
        """Whether nobody is to be looked at."""
        return not self._pending

    def look_again(self, container_id: str) -> None:
        """A look that failed."""
        if container_id in self._known:
            self._pending[container_id] = None

    def begin(self) -> int:
        """When a look or a listing begins, for `seen` and `listed`."""
        return self._moment

    def heard(self, event: Event, now: float) -> str:
        """An event came. Why nothing new may go to its container from now on, "" when a look will tell."""
        self._moment += 1
        known = self._known.setdefault(event.container_id, _Known())
        known.moment = self._moment
        why_not = self._heard(event, known, now)
        if why_not:
            known.why_not = why_not
        return why_not

    def listed(self, summaries: Iterable[object], began: int) -> list[str]:
        """Those that run are listed: all that speak of us are to be looked at. Returns who is gone."""
        running: set[str] = set()
        for summary in summaries:
            said: dict[str, Any] = summary if isinstance(summary, dict) else {}
            container_id = said.get("Id")
            if isinstance(container_id, str) and is_id(container_id):
                running.add(container_id)
                known = self._known.get(container_id)
                if known is not None and known.moment <= began:
                    known.runs = True  # its start may have been missed
                if container_id in self._known or is_labelled(texts(said.get("Labels"))):
                    self._known.setdefault(container_id, _Known(self._moment))
                    self._pending[container_id] = None
        gone = [
            container_id
            for container_id, known in self._known.items()
            if container_id not in running and known.moment <= began
        ]
        for container_id in gone:
            del self._known[container_id]
            self._pending.pop(container_id, None)
        return gone

    def seen(
        self, container_id: str, container: Container | None, around: Container | None, began: int, now: float
    ) -> Seen | None:
        """A look is over: it showed `container`, None when there is none, or none that speaks of us.

        Returns None when that is no news any more: something happened since `began`, and it is to be looked
        at again, unless that was its end.
        """
        known = self._known.get(container_id)
        if known is None:
            return None
        if known.moment > began:
            if known.runs:
                self._pending[container_id] = None
            return None
        if container is None or not is_labelled(container.labels):
            del self._known[container_id]
            return Seen(container_id[:12], why_not="it is not there")
        known.inside = container.inside
        known.stop_signal = signal_number(container.stop_signal)
        if known.stopped_at is not None and (
            now - known.stopped_at >= STOP_PATIENCE or 0 < known.signalled_at < container.started_at
        ):
            known.stopped_at = None
        found = wanted(container, self._options, self._engine, around)
        why_not = container.why_not or (_STOPS if known.stopped_at is not None else "")
        # One that does not run has no address: what is wrong with it is said when it should serve.
        complaint = "" if why_not else self._news(container_id, "; ".join(found.complaints))
        is_news, known.why_not = why_not != known.why_not, why_not
        return Seen(container.name, () if why_not else found.registrations, why_not, complaint, is_news)

    # Private

    def _heard(self, event: Event, known: _Known, now: float) -> str:
        happened = event.happened
        if happened is Happened.SIGNALLED:
            return self._signalled(event, known, now)
        if happened in {Happened.STARTED, Happened.ENDED}:
            known.stopped_at = None
            known.runs = happened is Happened.STARTED
            self._look_at_those_inside(event.container_id)
        if happened in {Happened.ENDED, Happened.DESTROYED}:
            self._pending.pop(event.container_id, None)
            if happened is Happened.DESTROYED:
                self._known.pop(event.container_id)
                self._complained.pop(event.container_id, None)
            return "it has ended"
        self._pending[event.container_id] = None
        return _WHY_OUT.get(happened, "")

    def _signalled(self, event: Event, known: _Known, now: float) -> str:
        if not event.signal_number or event.signal_number not in _ENDING | {known.stop_signal}:
            return ""
        if known.stopped_at is None:
            known.stopped_at = now
        known.signalled_at = event.at
        return _STOPS

    def _look_at_those_inside(self, container_id: str) -> None:
        for each, known in self._known.items():
            if known.inside == container_id:
                known.moment = self._moment
                self._pending[each] = None

    def _news(self, container_id: str, complaint: str) -> str:
        if self._complained.get(container_id, "") == complaint:
            return ""
        self._complained.pop(container_id, None)
        if complaint:
            self._complained[container_id] = complaint
        while len(self._complained) > REMEMBERED:
            del self._complained[next(iter(self._complained))]
        return complaint


# Private


_STOPS: Final = "it is about to end"
_WHY_OUT: Final = {Happened.PAUSED: "it is paused", Happened.UNHEALTHY: "it is unhealthy"}


class _Known:
    """What is remembered of a container. `moment` is that of its last event."""

    def __init__(self, moment: int = 0) -> None:
        self.moment = moment
        self.runs = True
        self.stop_signal = 0
        # When it got a signal that ends it: by our clock and, as far as it is known, by Docker's
        self.stopped_at: float | None = None
        self.signalled_at = 0.0
        self.inside = ""
        self.why_not = ""
