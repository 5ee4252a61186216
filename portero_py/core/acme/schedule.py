"""When to order, renew, ask and wait: every decision about one certificate, with time as an argument.

The rules
- A certificate that portero did not bring is never touched.
- Renewal: at the moment drawn from the CA's window (ARI, RFC 9773) if it has one, else at two thirds of the
  lifetime; with either not later than when a tenth of the lifetime is left, and never within an hour (or a
  tenth of the lifetime, if that is less) of the last issuance: no answer of a CA makes portero order in a
  loop.
- After a failure: max(Retry-After, min(12 h, 300 s x 2^n)), with a fifth of jitter, so that several instances
  spread. A Retry-After counts up to `MAX_RETRY_AFTER`. When no connection to the CA could be made, none of
  its limits was touched: min(300 s, 2 s x 2^n), so that a network that comes up late costs seconds.
- A time to wait for that is further away than these rules can have made it was written under a clock that was
  ahead: it counts as come.
- An order that was begun is carried on before anything else, unless the names have changed.
- A state directory that was lost costs no certificate: the pair in the certificate directory, if this CA
  issued it to portero and its renewal is not due, is adopted. So is one that another instance renewed.
- Which challenge: dns-01 where a wildcard is on the certificate. Else first what is answered at the port that
  a CA asks at, then dns-01 (if it can be had), then what is answered at another port, which a router may map.
- At most `AT_ONCE` names are acted upon at a time: first certificates first, and at most `LATER_AT_ONCE` of
  the others, so that names that cannot be validated delay none that can.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from portero_py.core.acme.names import has_wildcard
from portero_py.core.acme.progress import Progress, Step

FIRST_DELAY: Final = 300.0
MAX_DELAY: Final = 12 * 3600.0
#: Where the CA never heard of the attempt.
FIRST_REACH: Final = 2.0
MAX_REACH: Final = 300.0
#: Let's Encrypt's longest limits last a week.
MAX_RETRY_AFTER: Final = 8 * 86400.0

#: RFC 9773, 4.3.2 and 4.3.3: a minute to a day, and six hours where the CA says nothing or cannot be asked.
MIN_ASK: Final = 60.0
MAX_ASK: Final = 86400.0
DEFAULT_ASK: Final = 6 * 3600.0

#: Names that are acted upon at a time, and those among them that have a certificate or have failed before.
AT_ONCE: Final = 32
LATER_AT_ONCE: Final = 8

TLS_ALPN_01: Final = "tls-alpn-01"
HTTP_01: Final = "http-01"
DNS_01: Final = "dns-01"
AUTO: Final = "auto"


class Act(Enum):
    """What to do about a certificate."""

    WAIT = "wait"
    ORDER = "order"
    RESUME = "resume"
    INSTALL = "install"
    ADOPT = "adopt"  # the pair in the certificate directory
    ASK = "ask"  # for renewal information
    LEAVE = "leave"  # it is hand-made


class Turn(IntEnum):
    """Who comes first, when not all can be acted upon at a time."""

    LOCAL = 0  # files only: no CA is asked
    FIRST = 1  # nothing is served yet, and nothing has failed
    RENEWAL = 2
    RETRY = 3


@dataclass(frozen=True, slots=True)
class Held:
    """A certificate that exists: what it lists, its validity (epoch seconds) and its SHA-256."""

    names: frozenset[str]
    not_before: float
    not_after: float
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and when to look again (epoch seconds) if there is nothing to do now."""

    act: Act
    until: float = 0.0


def decide(
    names: tuple[str, ...],
    progress: Progress,
    kept: Held | None,
    served: Held | None,
    now: float,
    *,
    is_ours: bool,
    adoptable: Held | None = None,
) -> Decision:
    """What to do about the certificate for `names`.

    `kept` is the pair in the state directory, `served` the one in the certificate directory; `is_ours` says
    whether that one was put there by portero. `adoptable` is that one again, when it is another than `kept`,
    is whole, and was issued by the CA that is asked now.
    """
    if served is not None and not is_ours:
        return Decision(Act.LEAVE)
    if now < progress.retry_at <= now + MAX_RETRY_AFTER + MAX_DELAY:
        return Decision(Act.WAIT, progress.retry_at)
    if progress.step is Step.ISSUED:
        return Decision(Act.INSTALL)
    if progress.step is not Step.IDLE and set(progress.names) == set(names):
        return Decision(Act.RESUME)
    if (
        adoptable is not None
        and not progress.revoked
        and adoptable.names.issuperset(names)
        and (kept is None or adoptable.not_after > kept.not_after)
        and now < renewal_time(adoptable, Progress())
    ):
        return Decision(Act.ADOPT)
    if progress.revoked or kept is None or not kept.names.issuperset(names) or now >= kept.not_after:
        return Decision(Act.ORDER)
    if served is None or served.fingerprint != kept.fingerprint:
        return Decision(Act.INSTALL)
    renew_at = renewal_time(kept, progress)
    if now >= renew_at:
        return Decision(Act.ORDER)
    if not now < progress.ask_at <= now + MAX_RETRY_AFTER + MAX_DELAY:
        return Decision(Act.ASK)
    return Decision(Act.WAIT, min(renew_at, progress.ask_at))


def renewal_time(held: Held, progress: Progress) -> float:
    """When this certificate is renewed, epoch seconds."""
    lifetime = held.not_after - held.not_before
    if progress.revoked:
        return progress.installed_at
    wanted = progress.renew_at or held.not_before + lifetime * 2 / 3
    latest = held.not_after - lifetime / 10
    earliest = progress.installed_at + min(3600.0, lifetime / 10)
    return max(min(wanted, latest), earliest)


def drawn(start: float, end: float, chance: float) -> float:
    """A moment of the window; `chance` is uniform in [0, 1)."""
    return start + (end - start) * chance


def next_question(now: float, retry_after: float) -> float:
    """When to ask for renewal information again; `retry_after` in seconds, 0.0 when the CA said none."""
    return now + (min(max(retry_after, MIN_ASK), MAX_ASK) if retry_after else DEFAULT_ASK)


def retry_time(now: float, failures: int, retry_after: float, chance: float) -> float:
    """When to try again after `failures` failures before this one; `chance` is uniform in [0, 1)."""
    delay = min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(failures, 20)) * (0.9 + 0.2 * chance)
    return now + max(delay, min(retry_after, MAX_RETRY_AFTER))


def reach_time(now: float, unheard: int, chance: float) -> float:
    """When to try again after `unheard` attempts before this one that the CA never heard of."""
    return now + min(MAX_REACH, FIRST_REACH * 2.0 ** min(unheard, 20)) * (0.9 + 0.2 * chance)


def turn(act: Act, progress: Progress, kept: Held | None) -> Turn:
    """Whose turn it is to `act`."""
    if act in (Act.INSTALL, Act.ADOPT):
        return Turn.LOCAL
    if progress.failures:
        return Turn.RETRY
    return Turn.RENEWAL if kept is not None else Turn.FIRST


def admitted(due: Sequence[Turn], going_on: Sequence[Turn]) -> list[int]:
    """Which of `due` may begin now, by their places there, while others are `going_on`."""
    room = AT_ONCE - len(going_on)
    later = LATER_AT_ONCE - sum(each > Turn.FIRST for each in going_on)
    found: list[int] = []
    for place in sorted(range(len(due)), key=lambda place: due[place]):
        if due[place] > Turn.FIRST:
            later -= 1
            if later < 0:
                break
        if len(found) >= room:
            break
        found.append(place)
    return found


def challenges_for(
    names: Sequence[str], answered: tuple[str, ...], at_usual_port: Collection[str], *, has_dns: bool
) -> tuple[str, ...]:
    """The types that can validate these names, best first.

    `answered` are those of portero's listeners, `at_usual_port` those of them that listen at 443 and 80.
    """
    if has_wildcard(names):
        return (DNS_01,) if has_dns else ()
    if not has_dns:
        return answered
    near = tuple(kind for kind in answered if kind in at_usual_port)
    return (*near, DNS_01, *(kind for kind in answered if kind not in at_usual_port))


def choose_challenge(wanted: str, answerable: tuple[str, ...], tried: tuple[str, ...]) -> str:
    """The type to use next, or "" when none is left. `answerable` is what portero's listeners can do."""
    usable = answerable if wanted == AUTO else tuple(kind for kind in answerable if kind == wanted)
    return next((kind for kind in usable if kind not in tried), "")


def ends_soon(not_before: float, not_after: float, now: float) -> bool:
    """Whether somebody should be warned: a sixth of the lifetime is left, or two weeks if that is less.

    Renewal begins at a third, so by then it has failed for half of the time it has.
    """
    return not_after - now < min((not_after - not_before) / 6, 14 * 86400.0)
