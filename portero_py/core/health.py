"""What a worker itself saw of its backends: marks, which outlive renewals and new routing tables.

The rules
- A mark belongs to one worker and to one backend of one service: the same address may be well for one service
  and broken for another. It is found by service and instance id, whose hashes are at hand, and it counts only
  while that instance is at the address at which it was seen: who comes back elsewhere begins anew.
- Only what is wrong is marked. A backend about which there is nothing to say has no mark, and as long as no
  backend has one all of this is an empty dictionary.
- `retain(table)` forgets whoever the table does not have: its service is gone, its lease is, or it moved. A
  renewal is a new Lease and a new Service, and changes nothing here.

Nothing is decided here: a policy sees the marks (`balancing/policy.py`) and passes over whom it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

from portero_py.core.model import Backend, Lease
from portero_py.core.routing_table import RoutingTable


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a worker tells control when a backend has failed it too often in a row, ejected or not.

    `hangs`: it takes connections and does not answer, so that a connection to it proves nothing.
    """

    service: str
    host: str
    port: int
    hangs: bool
    error: str


class Mark:
    """What is wrong with `backend`: `failures` in a row."""

    __slots__ = ("backend", "failures")

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.failures = 0


class Health:
    """The marks of one worker."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: dict[str, dict[str, Mark]] = {}  # service -> instance id -> mark

    def __len__(self) -> int:
        return sum([len(marks) for marks in self._marks.values()])

    def of(self, lease: Lease) -> Mark | None:
        """The mark of the backend that holds `lease`, or None when there is nothing to say about it."""
        marks = self._marks.get(lease.service)
        mark = None if marks is None else marks.get(lease.instance_id)
        return mark if mark is None or mark.backend == lease.backend else None

    def failed(self, lease: Lease) -> Mark:
        """One more failure in a row."""
        mark = self.of(lease)
        if mark is None:
            mark = Mark(lease.backend)
            self._marks.setdefault(lease.service, {})[lease.instance_id] = mark
        mark.failures += 1
        return mark

    def succeeded(self, lease: Lease) -> None:
        """It is well again: there is nothing to say about it any more."""
        marks = self._marks.get(lease.service)
        if marks is not None and marks.pop(lease.instance_id, None) is not None and not marks:
            del self._marks[lease.service]

    def retain(self, table: RoutingTable) -> None:
        """Forget the marks of backends that `table` does not have. Costs nothing while there are none.

        With marks it looks at all leases of the services that have some: not for every table, when they come
        by the thousand.
        """
        for name in list(self._marks):
            service = table.services.get(name)
            there = {} if service is None else {lease.instance_id: lease.backend for lease in service.leases}
            kept = {key: mark for key, mark in self._marks[name].items() if there.get(key) == mark.backend}
            if kept:
                self._marks[name] = kept
            else:
                del self._marks[name]
