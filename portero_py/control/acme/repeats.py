"""What was begun last for each name: the same act for the same reason has a pause before it, which doubles.

Every act changes what the next look sees, or says itself when it is tried again. One that does neither,
because of a fault that nobody knows of, would otherwise be repeated at full speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from portero_py.control.acme.looks import Look

#: Before an act that left everything as it was is done again, the first time, and at the most.
AGAIN_SECONDS: Final = 1.0
MAX_AGAIN_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class _Begun:
    reason: tuple[object, ...]
    times: int  # in a row before this one
    at: float


class Repeats:
    """Knows when what is due may be begun. Times are epoch seconds."""

    def __init__(self) -> None:
        self._begun: dict[str, _Begun] = {}

    def begin(self, look: Look, now: float) -> None:
        """What this look says is begun."""
        former, reason = self._begun.get(look.names[0]), _reason(look)
        times = former.times + 1 if former is not None and former.reason == reason else 0
        self._begun[look.names[0]] = _Begun(reason, times, now)

    def earliest(self, look: Look) -> float:
        """When it may be begun; 0.0 when nothing like it was begun before."""
        former = self._begun.get(look.names[0])
        if former is None or former.reason != _reason(look):
            return 0.0
        return former.at + min(AGAIN_SECONDS * 2.0 ** min(former.times, 20), MAX_AGAIN_SECONDS)

    def forget(self, name: str) -> None:
        """There is nothing to do for it just now, or nothing was done."""
        self._begun.pop(name, None)


# Private


def _reason(look: Look) -> tuple[object, ...]:
    return (look.decision.act, look.progress, look.kept.fingerprint if look.kept is not None else "")
