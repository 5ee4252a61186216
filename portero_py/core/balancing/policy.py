"""What a balancing policy is: the contract that every policy in this package keeps.

A policy chooses among the leases of one service, in one worker. It is one class in one file, and one row of
the table `POLICIES` (in `balancers`), which gives it its name.

The rules
- An object serves one service, always the same by name. Turns, credit and whatever else a policy remembers
  are its own: no two services and no two workers share them. `start` is another number in each worker, so
  that they do not all begin with the same lease.
- `pick` returns one of the service's leases that serves at `now` and is not excluded; None when there is
  none, and never for another reason. Who is excluded has failed this very exchange.
- It may decide by whatever it is given: the service and its leases (weights), the time, the request's head,
  and, from its beginning, the claims of backends and what this worker saw of them.
- It only chooses. Who asked claims the backend and releases it; marks are made by who saw the failure.
- The Service is another object after each change, renewals included. What is kept for its leases is kept
  under their instance ids and reconciled then, not in each pick.
- It is asked once a try, by every request of a service that has several leases: a pick allocates nothing, and
  looks at all leases only if choosing needs it.

A native class with an abstract method, and no Protocol: the compiled build calls it through a table of
functions instead of by name.
"""

from __future__ import annotations

from collections.abc import Collection

from portero_py.core.health import Health
from portero_py.core.model import Lease, Service
from portero_py.wire.message import RequestHead


class Claims:
    """How busy backends are, as far as this worker knows: its pools are one."""

    __slots__ = ()

    def claims_of(self, lease: Lease) -> int:
        """How many exchanges of its service hold the backend of `lease` now."""
        raise NotImplementedError

    def has_room(self, lease: Lease) -> bool:
        """Whether one exchange more may hold the backend of `lease`, by its limit."""
        raise NotImplementedError


class Policy:
    """The choice among the leases of one service. A subclass has `pick`, and a method more at most."""

    __slots__ = ("claims", "health", "start")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        self.start = start
        self.claims = claims
        self.health = health

    def pick(
        self, service: Service, now: float, excluded: Collection[str], head: RequestHead
    ) -> Lease | None:
        """The lease for the exchange of `head`; None when all are expired or `excluded` (instance ids)."""
        raise NotImplementedError
