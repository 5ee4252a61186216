"""How far one certificate has come: the state that is written down after every step.

    IDLE ----ordered----> ORDERED --finalized--> FINALIZED
      ^                    |    \\                    |
      |                    |     +-----issued-----+  |  issued
      +------ dropped -----+                      v  v
      +------------------- installed ------------ ISSUED

- ORDERED: the CA gave the order an address; the key is on disk since before. FINALIZED: the CSR was sent.
  What is true of the order is what the CA says about it: a crash after a request, but before the step was
  written down, makes the same order be looked at again, never a second one.
- ISSUED: chain and key are together in the state directory; what is left is to copy them to the certificate
  directory, which can be repeated at will.
- A failure keeps the step when the order can still be carried on, and drops it when it cannot.

A step that the arrows do not allow raises: it would be a fault in portero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Final, get_type_hints

_MAX_TEXT: Final = 2000
_MAX_COUNT: Final = 1_000_000
#: Of the year 9999: what is after it, or infinite, no calendar can show.
_LAST_TIME: Final = 253402300799


class Step(Enum):
    """Where an order is."""

    IDLE = "idle"
    ORDERED = "ordered"
    FINALIZED = "finalized"
    ISSUED = "issued"


#: Step -> those that may follow.
TRANSITIONS: Final[Mapping[Step, frozenset[Step]]] = {
    Step.IDLE: frozenset({Step.ORDERED}),
    Step.ORDERED: frozenset({Step.FINALIZED, Step.ISSUED, Step.IDLE}),
    Step.FINALIZED: frozenset({Step.ISSUED, Step.IDLE}),
    Step.ISSUED: frozenset({Step.IDLE}),
}


@dataclass(frozen=True, slots=True)
class Progress:
    """One certificate's state. Times are seconds since the epoch, 0.0 for none.

    names        that the order is for
    order_url    of the order that is going on, "" in IDLE
    replaces     the ARI identifier of the certificate that the order replaces, or ""
    tried        the challenge types that failed since the last pause
    failures     attempts that failed since the last success, without those that the CA never heard of
    unheard      attempts in a row that the CA never heard of: no connection could be made
    retry_at     nothing is asked of the CA before
    reason, error   of the last failure, for metrics and for people; "" after a success
    failed_at    when that was
    fingerprint  of the certificate that was issued last
    installed_at when
    renew_at     when ARI, if the CA has it, wants the certificate renewed; 0.0: two thirds of its life
    window       the ARI window that `renew_at` was drawn from, (start, end)
    ask_at       when to ask for ARI again
    why          the address of the CA's explanation for the window, or ""
    no_replaces  the CA said that the certificate was replaced already: do not name it again
    revoked      the certificate was revoked: replace it now
    """

    names: tuple[str, ...] = ()
    step: Step = Step.IDLE
    order_url: str = ""
    replaces: str = ""
    tried: tuple[str, ...] = ()
    failures: int = 0
    unheard: int = 0
    retry_at: float = 0.0
    reason: str = ""
    error: str = ""
    failed_at: float = 0.0
    fingerprint: str = ""
    installed_at: float = 0.0
    renew_at: float = 0.0
    window: tuple[float, ...] = ()
    ask_at: float = 0.0
    why: str = ""
    no_replaces: bool = False
    revoked: bool = False

    def ordered(self, names: tuple[str, ...], order_url: str, replaces: str) -> Progress:
        """The CA took an order."""
        return replace(self._to(Step.ORDERED), names=names, order_url=order_url, replaces=replaces)

    def finalized(self) -> Progress:
        """The CSR was sent."""
        return self._to(Step.FINALIZED)

    def issued(self) -> Progress:
        """Chain and key are in the state directory."""
        return self._to(Step.ISSUED)

    def installed(self, fingerprint: str, now: float) -> Progress:
        """The pair is in the certificate directory: everything that was wrong before is over."""
        return replace(
            Progress(self.names), step=self._to(Step.IDLE).step, fingerprint=fingerprint, installed_at=now
        )

    def adopted(self, names: tuple[str, ...], fingerprint: str, since: float, ask_at: float) -> Progress:
        """The pair in the certificate directory was found to be portero's own: go on with that one.

        `since` is when it was issued, `ask_at` when the CA is asked about its renewal.
        """
        if self.step is not Step.IDLE:
            raise ValueError(f"an order that is {self.step.value} is carried on first")
        return Progress(names, fingerprint=fingerprint, installed_at=since, ask_at=ask_at)

    def dropped(self) -> Progress:
        """The order cannot be carried on; the next one is a new one."""
        return replace(self._to(Step.IDLE), order_url="", replaces="")

    def failed(
        self, reason: str, error: str, now: float, retry_at: float, *, was_heard: bool = True
    ) -> Progress:
        """An attempt ended; the next may begin at `retry_at`. `was_heard`: the CA may know of it."""
        return replace(
            self,
            failures=self.failures + was_heard,
            unheard=0 if was_heard else self.unheard + 1,
            retry_at=retry_at,
            tried=(),
            reason=reason,
            error=error[:_MAX_TEXT],
            failed_at=now,
        )

    def challenge_failed(self, kind: str, reason: str, error: str, now: float) -> Progress:
        """One type of challenge failed, and another is left for this attempt."""
        return replace(self, tried=(*self.tried, kind), reason=reason, error=error[:_MAX_TEXT], failed_at=now)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "step": self.step.value}

    # Private

    def _to(self, step: Step) -> Progress:
        if step not in TRANSITIONS[self.step]:
            raise ValueError(f"an order that is {self.step.value} cannot become {step.value}")
        return replace(self, step=step)


def from_json(document: object) -> Progress:
    """What `to_json` gave, read again; fields of other versions are ignored, missing ones have their default.

    Raises ValueError when it is nothing of the kind.
    """
    if not isinstance(document, Mapping):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - one kind of error for whatever is wrong
    found: dict[str, Any] = {}
    hints = get_type_hints(Progress)
    for field in fields(Progress):
        if field.name in document:
            found[field.name] = _read(field.name, hints[field.name], document[field.name])
    return Progress(**found)


# Private


def _read(name: str, hint: object, value: object) -> object:
    if hint is Step:
        return Step(value)
    if hint == tuple[str, ...] and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    if hint == tuple[float, ...] and isinstance(value, list) and all(_is_time(one) for one in value):
        return tuple(float(one) for one in value)
    if hint is float and _is_time(value):
        return float(value)  # type: ignore[arg-type]  # `_is_time` has looked
    if hint is int and type(value) is int and 0 <= value <= _MAX_COUNT:
        return value
    if type(value) is hint and hint not in (int, float):
        return value
    raise ValueError(f"{name} has an impossible value")


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LAST_TIME  # type: ignore[operator]  # mypy sees no `type() in`
