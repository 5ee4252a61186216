"""Who was answered right, and what became of the others: the counts that a row is made of.

The rules
- An ask is *sent* once and *settled* once: answered, or lost in one named way. A second settlement, or one of
  an ask that was never sent, is a fault of whoever counts and raises. What nobody settled is lost, too.
- Answered means: status 200 and the very bytes that `Ask.answer` says. Nothing else is good, and nothing is
  asked again.
- A POST that backends carried out twice is *repeated*: it may have been answered right all the same, so it
  is counted beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.faults.asks import Ask, Kind

#: An ask that nobody settled.
FORGOTTEN = "forgotten"

#: A body that is not the right one, and one that is only its beginning though it ended as if it were whole.
WRONG = "wrong bytes"
SHORT = "short, as if whole"


class CountingError(Exception):
    """The load counts wrong: its figures mean nothing."""


class Lost(Exception):
    """An ask without an answer; its text is the way in which it was lost."""


@dataclass
class Tally:
    """What one run came to. Times are in seconds, beyond what the exchange takes by itself."""

    sent: dict[str, int] = field(default_factory=dict)  # kind -> number
    answered: dict[str, int] = field(default_factory=dict)
    lost: dict[str, dict[str, int]] = field(default_factory=dict)  # kind -> way -> number
    slowest: dict[str, float] = field(default_factory=dict)
    p99: float = 0.0
    late: float = 0.0  # by how much the load itself was behind at its worst
    seconds: float = 0.0  # how long it was loaded
    examples: list[str] = field(default_factory=list)

    @property
    def total_sent(self) -> int:
        return sum(self.sent.values())

    @property
    def total_answered(self) -> int:
        return sum(self.answered.values())

    def lost_of(self, *kinds: str) -> int:
        """How many of these kinds were lost."""
        return sum(sum(self.lost.get(kind, {}).values()) for kind in kinds)

    def ways(self) -> dict[str, int]:
        """How many were lost in which way, the most frequent first."""
        counts: Counter[str] = Counter()
        for ways in self.lost.values():
            counts.update(ways)
        return dict(counts.most_common())


class Ledger:
    """The asks of one run."""

    def __init__(self) -> None:
        self._open: dict[str, Ask] = {}
        self._settled: set[str] = set()
        self._sent: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        self._lost: dict[str, Counter[str]] = {kind.value: Counter() for kind in Kind}
        self._times: dict[str, list[float]] = {kind.value: [] for kind in Kind}
        self._examples: dict[tuple[str, str], str] = {}

    def send(self, ask: Ask) -> None:
        """It is about to be asked. Raises CountingError: its identity was there before."""
        if ask.identity in self._open or ask.identity in self._settled:
            raise CountingError(f"{ask.identity} was sent before")
        self._open[ask.identity] = ask
        self._sent[ask.kind.value] += 1

    def answer(self, ask: Ask, status: int, body: bytes, seconds: float, at: float) -> None:
        """An answer came, `seconds` after it was due to be asked and `at` seconds into the run.

        Raises CountingError.
        """
        if status != 200:
            self.lose(ask, str(status), seconds, at)
        elif body != ask.answer:
            self.lose(ask, SHORT if ask.answer.startswith(body) else WRONG, seconds, at)
        else:
            self._settle(ask, seconds)
            self._answered[ask.kind.value] += 1

    def lose(self, ask: Ask, way: str, seconds: float, at: float) -> None:
        """There is no right answer. Raises CountingError."""
        self._settle(ask, seconds)
        self._lost[ask.kind.value][way] += 1
        protocol = "h2" if ask.http2 else "h1"
        self._examples.setdefault(
            (ask.kind.value, way), f"{ask.kind.value} {way} at {at:.2f} s, {protocol}, after {seconds:.2f} s"
        )

    def close(self, *, seconds: float, late: float) -> Tally:
        """The counts; what is still open is lost."""
        for ask in list(self._open.values()):
            self.lose(ask, FORGOTTEN, 0.0, seconds)
        quick = sorted(self._times[Kind.GET] + self._times[Kind.POST])
        return Tally(
            sent=dict(self._sent),
            answered=dict(self._answered),
            lost={kind: dict(ways) for kind, ways in self._lost.items() if ways},
            slowest={kind: max(times) for kind, times in self._times.items() if times},
            p99=quick[min(len(quick) - 1, int(len(quick) * 0.99))] if quick else 0.0,
            late=late,
            seconds=seconds,
            examples=list(self._examples.values()),
        )

    # Private

    def _settle(self, ask: Ask, seconds: float) -> None:
        if self._open.pop(ask.identity, None) is None:
            what = "settled before" if ask.identity in self._settled else "never sent"
            raise CountingError(f"{ask.identity} was {what}")
        self._settled.add(ask.identity)
        self._times[ask.kind.value].append(max(0.0, seconds - ask.seconds))


def repeated(carried_out: Iterable[str]) -> int:
    """How many times too many POSTs were carried out, from the identities that the backends wrote down."""
    return sum(count - 1 for count in Counter(carried_out).values())
