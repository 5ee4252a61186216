"""Round robin: whose turn it is.

The turns go over a queue, not over an index: an index into a list that changes gives somebody two turns.
Whoever is picked goes to the back; who joins joins at the back; who leaves just leaves; who renews keeps his
place, also at a new address. So among those who stay the order never changes, and in any round everybody has
one turn.

With unequal weights: the smooth weighted round robin of nginx. Each pick every backend gains its weight in
credit, the richest is picked and pays the sum of all. Weights 5, 1, 1 give A A B A C A A. That looks at each
lease; with equal weights a pick looks at one.

Credit is worth what one turn costs, the sum of all weights. So when weights change, or somebody joins or
leaves, it is converted: who was owed half a turn is owed half a turn under the new weights too. Kept as it
is, credit from large weights would starve somebody for hundreds of picks; forgotten at every change, small
weights would never have a turn in a fleet that changes all the time.

While somebody warms up (`weights`) the turns are weighted, by weights that grow. Afterwards, with equal ones,
the queue goes on where it was.

The queue is reconciled when the Service object is another one than last time (the registry makes a new one
at every change), never by comparing. Ended, draining and passed over ones lose the turn that they would
have had. They are passed over by instance id, whose hash is at hand; that of a Backend is made anew each
time.

Retries have turns of their own, a second queue over the same leases, from the first retry on. With one queue
for both, of two backends of which one refuses all, the other's turn is always used up by a retry: the broken
one got 90% of the first tries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container

from portero_py.core.balancing.policy import Claims, Policy
from portero_py.core.health import Health
from portero_py.core.model import Lease, Service
from portero_py.wire.message import RequestHead


class RoundRobin(Policy):
    """The turns of one service in one worker. `start` shifts the first round."""

    __slots__ = ("_credit", "_queue", "_retries", "_service", "_uneven", "_weighted")

    def __init__(self, start: int, claims: Claims, health: Health) -> None:
        super().__init__(start, claims, health)
        self._service: Service | None = None
        self._queue: deque[Lease] = deque()
        self._uneven = False  # by the weights that they have
        self._weighted = False  # or by those that somebody has until he is warm
        self._credit: dict[str, float] = {}  # instance id -> credit; weighted only
        self._retries: RoundRobin | None = None

    def pick(
        self,
        service: Service,
        now: float,
        passed: Container[str],
        head: RequestHead,
        retry: bool,
        client: str = "",
    ) -> Lease | None:
        """The lease whose turn it is, whatever is asked for; see `Policy.pick`."""
        if retry:
            if self._retries is None:
                self._retries = RoundRobin(self.start, self.claims, self.health)
            return self._retries.pick(service, now, passed, head, False)
        if service is not self._service:
            self._reconcile(service, now)
        if self._weighted:
            if self.weights.is_warming and now >= self.weights.look_at:
                self.weights.look(now)
                self._weigh()
            if self._weighted:
                return self._pick_weighted(now, passed)
        queue = self._queue
        for _ in range(len(queue)):
            lease = queue[0]
            queue.rotate(-1)
            if now < lease.serves_until and (not passed or lease.instance_id not in passed):
                return lease
        return None

    def expect_return(self, now: float) -> None:
        """See `Policy.expect_return`: the turns are weighted until then."""
        super().expect_return(now)
        self._weigh()
        if self._retries is not None:
            self._retries.expect_return(now)

    # Private

    def _pick_weighted(self, now: float, passed: Container[str]) -> Lease | None:
        weights, credit = self.weights, self._credit
        warming = weights.is_warming
        best: Lease | None = None
        total = 0.0
        for lease in self._queue:
            if now < lease.serves_until and lease.instance_id not in passed:
                weight = weights.of(lease, now) if warming else float(lease.weight)
                total += weight
                credit[lease.instance_id] += weight
                if best is None or credit[lease.instance_id] > credit[best.instance_id]:
                    best = lease
        if best is not None:
            credit[best.instance_id] -= total
        return best

    def _reconcile(self, service: Service, now: float) -> None:
        former = self._queue
        now_held = {lease.instance_id: lease for lease in service.leases}
        queue = deque(now_held.pop(lease.instance_id) for lease in former if lease.instance_id in now_held)
        queue.extend(now_held.values())
        if self._service is None and queue:
            queue.rotate(-(self.start % len(queue)))
        self._service = service
        self._queue = queue
        self._uneven = len({lease.weight for lease in queue}) > 1
        self.weights.follow(service, now)
        if self._weighted:
            self._convert_credit(_total(former))
        self._weigh()

    def _weigh(self) -> None:
        """Go by weights, or by turns only."""
        weighted = self._uneven or self.weights.is_warming
        if weighted and not self._weighted:
            self._credit = dict.fromkeys([lease.instance_id for lease in self._queue], 0.0)
        elif not weighted:
            self._credit = {}
        self._weighted = weighted

    def _convert_credit(self, former_total: int) -> None:
        """A turn cost `former_total`; now it costs what the weights in the queue say."""
        credit = self._credit
        total = _total(self._queue)
        # Unchanged it stays exact: most new Service objects come from renewals.
        rate = 1.0 if total == former_total else total / (former_total or 1)
        self._credit = {lease.instance_id: credit.get(lease.instance_id, 0.0) * rate for lease in self._queue}


def _total(queue: deque[Lease]) -> int:
    return sum([lease.weight for lease in queue])
