"""What a balancing policy is: the contract that every policy in this package keeps.

A policy chooses among the leases of one service, in one worker. It is one class in one file, and one row of
the table `POLICIES` (in `balancers`), which gives it its name.

The rules
- An object serves one service, always the same by name. Turns, credit and whatever else a policy remembers
  are its own: no two services and no two workers share them. `start` is another number in each worker, so
  that they do not all begin with the same lease.
- `pick` returns one of the service's leases that serves at `now` and is not `passed` over; None when there
  is none, and never for another reason. Who is passed over has failed this very exchange, or others go
  before him (`choice`): a policy does not ask why, nor does it look at states, limits and ejections itself.
- `passed` answers for instance ids, and looks each one up when it is asked: ask it only about who else would
  be picked.
- A retry has a turn of its own. What first tries remember (turns, credit) it leaves alone: else whoever is
  well loses a turn for each failure of another, and the broken one gets more first tries for being broken.
- It may decide by whatever it is given: the service and its leases (weights), the time, the request's head,
  its client, and, from its beginning, the claims of backends and what this worker saw of them.
- Weights are those of `weights`, which grow while a backend warms up. As long as nobody does, and that is to
  be seen at a glance, a policy looks at no clock for it.
- It only chooses. Who asked claims the backend and releases it; marks are made by who saw the failure.
- The Service is another object after each change, renewals included. What is kept for its leases is kept
  under their instance ids and reconciled then, not in each pick.
- It is asked once a try, by every request of a service that has several leases: a pick allocates nothing, and
  looks at all leases only if choosing needs it.

A native class with an abstract method, and no Protocol: the compiled build calls it through a table of
functions instead of by name.
"""

from __future__ import annotations

from collections.abc import Container

from portero_py.core.balancing.weights import Weights
from portero_py.core.health import Health
from portero_py.core.model import Lease, Service
from portero_py.core.policies import ServicePolicy
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
    """The choice among the leases of one service. A subclass has `pick`, and a method more at most.

    `terms` are those that it was made by, the service's own or None: for `Balancers`, which made it.
    """

    __slots__ = ("claims", "health", "start", "terms", "weights")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        self.start = start
        self.claims = claims
        self.health = health
        self.terms: ServicePolicy | None = None
        self.weights = Weights(health)

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        """The lease for the exchange of `head`; None when all are expired or `passed` over (instance ids).

        `retry`: a backend has failed this exchange already. `client` is the address of the client, or "" when
        nobody knows it or the service's policy does not ask for it (`BY_CLIENT` in `balancers`).
        """
        raise NotImplementedError

    def expect_return(self, now: float) -> None:
        """Somebody is ejected: when he comes back, he warms up."""
        if not self.weights.is_warming:
            self.weights.look(now)
