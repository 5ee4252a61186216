"""Which breakages are explained by what was done, and which are portero's own.

What counts as *the exchanges of a killed worker*: those on a connection that the worker had accepted when it
was killed. Its inventory was taken while it stood still (`Processes.ports`), and a connection that nobody has
accepted yet stays in the listening socket, which all workers share: so the rule is exact, not a time window.

Explained too is
- a **new** connection that ends before its first answer while the workers had no descriptor left;
- a connection between two answers that was closed to make room then, in the moment of the next request: not a
  byte of an answer had come (RFC 9112, 9.5: a client has to be ready for that);
- 404 or 503 for a service whose leases last seconds, from a worker that was stopped or new: it had not heard
  of the last renewal (whose granting does not wait for a worker that hangs, by design);
- 504 from a service with a backend that hangs, and 503 from one with a backend that says so, for a request
  that began before the workers could know (`SLOW_TO_HANG`, `SLOW_TO_FAIL`; longer while control is away or a
  worker is new), `MOST_EACH` of them at most;
- a request to the registration API that was cut off while control was killed or stopped, or the API's port
  was held by strangers. An *answer* of 5xx is never explained.

Everything else is not, above all: any 5xx, an answer with other bytes than it should have, a broken
connection of a worker that lived, a lease or a certificate that is not what was promised.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final

from tests.slow.chaos_backends import FAILING
from tests.slow.chaos_journal import Breakage, Journal, Trouble

#: Unexplained breakages that are told in full, of each kind.
TOLD = 2

#: Seconds that a backend's answer may take (`timeouts.upstream_head` of the run).
UPSTREAM_HEAD: Final = 2.0
#: Seconds after which no request is sent to a backend that hangs, or answers 503 and says so to its probes:
#: the first time-outs (or answers) have counted by then, and the probe has spoken. Where only the answers
#: tell, because no probe asks for the health, a client tries it at the end of each pause: that is told so.
SLOW_TO_HANG: Final = UPSTREAM_HEAD + 2.0
SLOW_TO_FAIL: Final = 4.0
#: How the services begin of whose backends the health is asked.
PROBED: Final = "shaky-1"
#: What the troubles of backends are called, before ` of ` and their service.
HANGS: Final = "a backend hangs"
FAILS: Final = "a backend fails"
#: Exchanges that one hanging or failing backend may cost: what the load has in flight at a time, and the
#: first ones of each worker.
MOST_EACH: Final = 30


def explanation(journal: Journal, breakage: Breakage) -> str:
    """Why it had to be so; "" when it had not."""
    kind, begun, at = breakage.kind, breakage.begun, breakage.at
    if kind == "broken" and breakage.port:
        death = journal.killer(breakage.port, breakage.opened, at)
        if death is not None:
            return f"{death.name.split()[0]} was killed"
        if breakage.answered == 0 and journal.troubled(begun, at, "descriptors"):
            return "no descriptor for a new connection"
        if "('0 bytes read" in breakage.detail and journal.troubled(begun, at, "descriptors"):
            return "an idle connection made room"
    if (
        kind == "status"
        and breakage.status in (404, 503)
        and breakage.service.startswith(("fleeting", "extra"))
        and journal.troubled(begun, at, "worker")
    ):
        return "the worker had not heard of the renewal"
    if kind == "status" and breakage.service.startswith("shaky"):
        trouble = _of_a_backend(journal, breakage)
        if trouble is not None:
            return f"{trouble.what.split(' of ')[0]}, and nobody knew yet"
    if kind == "api broken" and journal.troubled(begun, at, "control", "registration port"):
        return "control was killed, stopped or crowded out"
    return ""


def _of_a_backend(journal: Journal, breakage: Breakage) -> Trouble | None:
    """The backend that hangs or fails and has to do with it, if it still could."""
    hangs = breakage.status == 504
    if not hangs and not (breakage.status == 503 and FAILING.decode() in breakage.detail):
        return None
    what, slow = (HANGS, SLOW_TO_HANG) if hangs else (FAILS, SLOW_TO_FAIL)
    for trouble in journal.troubles:
        if trouble.what == f"{what} of {breakage.service}" and trouble.touches(breakage.begun, breakage.at):
            since = breakage.begun - trouble.begun
            disorder = journal.troubled(
                trouble.begun, breakage.at, "control", "worker", "supervisor", "upgrade"
            )
            is_tried = not hangs and not breakage.service.startswith(PROBED)
            if since <= slow or disorder is not None or is_tried:
                return trouble
    return None


class Verdict:
    """The breakages of a run, sorted."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.explained: Counter[tuple[str, str]] = Counter()
        self.unexplained: list[Breakage] = []
        costs: Counter[int] = Counter()
        for breakage in journal.breakages:
            why = explanation(journal, breakage)
            trouble = _of_a_backend(journal, breakage) if breakage.kind == "status" else None
            if trouble is not None:
                costs[id(trouble)] += 1
            if why and (trouble is None or costs[id(trouble)] <= MOST_EACH):
                self.explained[breakage.kind, why] += 1
            else:
                self.unexplained.append(breakage)

    def summary(self, title: str) -> str:
        """The table at the end of a run."""
        lines = [title, "", "  faults"]
        lines += _rows(self._journal.faults)
        lines += ["  good"]
        lines += _rows(self._journal.served)
        lines += ["  broken, and explained"]
        lines += _rows(Counter({f"{kind}: {why}": count for (kind, why), count in self.explained.items()}))
        lines += ["  broken, and not explained"]
        lines += _rows(Counter(f"{each.kind} ({each.who})" for each in self.unexplained)) or ["         0"]
        return "\n".join(lines)

    def story(self) -> str:
        """What is unexplained, the first kind first: what, when, and what was done before it."""
        found: dict[tuple[str, str], list[Breakage]] = defaultdict(list)
        for breakage in self.unexplained:
            found[breakage.kind, breakage.who].append(breakage)
        lines = []
        for (kind, who), breakages in sorted(found.items(), key=lambda each: each[1][0].begun):
            lines += ["", f"{kind} ({who}), {len(breakages)} times"]
            for breakage in breakages[:TOLD]:
                lines += self._told(breakage)
        return "\n".join(lines)

    # Private

    def _told(self, breakage: Breakage) -> list[str]:
        clock = self._journal.clock
        lines = [f"  {clock(breakage.at)}  {breakage.detail}"]
        if breakage.opened:
            since = f"since {clock(breakage.opened).strip()}, {breakage.answered} answers before"
            lines.append(f"              connection from port {breakage.port} {since}")
        lines.append(f"              begun at {clock(breakage.begun).strip()}; before it:")
        lines += [
            f"              {clock(event.at)}  {event.what}" for event in self._journal.before(breakage.at)
        ]
        return lines


def _rows(counts: Counter[str]) -> list[str]:
    return [f"  {count:8d}  {what}" for what, count in sorted(counts.items())]
