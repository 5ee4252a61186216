"""The contract of a provider: a task that keeps one source's leases true.

The rules
- `run(leases)` grants, renews and ends leases under its `source`, and touches no others. It runs until it is
  cancelled.
- It begins by `leases.replace(source, ...)` with all that it sees: what an earlier run granted, in this
  process or in the one before, is still in force then, and what is gone meanwhile must not stay.
- The control plane owns the task, and is its last resort (`control.tasks`): a `run` that raises, or returns,
  is logged, counted under the source's name, shown by /readyz, and begun again, after pauses that grow. So
  it need not catch what it cannot do anything about.
- Leases outlive a provider that fails: better a list that is a little old than none. A source that must not
  be trusted for long without news grants leases with an end, and renews them.
- A source that no provider keeps any more has no leases after the next start.
- Instance ids have no spaces, and are unique in a service of that source. Names and addresses are normalised
  by the provider, as `api.body` does for the API: they go to the log.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from portero_py.control.leases import Leases


class Provider(ABC):
    """One source of leases."""

    #: What its leases are granted under: `static`, `docker`, ...
    source: str

    @abstractmethod
    async def run(self, leases: Leases) -> None:
        """Keep the leases of `source` true until cancelled."""
