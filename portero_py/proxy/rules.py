"""What follows from the policies of services in this worker: made once for each, asked by each exchange.

An exchange of a service without a policy never comes here. `Rules` is one service's, and lives as long as its
policy does; what outlives a change of the policy (counts of rate limits, known passwords) is taken over by
its successor where the part of the policy that it follows from is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from portero_py.core.balancing.balancers import BY_CLIENT
from portero_py.core.policies import FieldChanges, ServicePolicy
from portero_py.core.rate_limit import Buckets
from portero_py.core.stickiness import Stickiness, sticky_key
from portero_py.proxy.gates.addresses import Addresses
from portero_py.proxy.gates.basic_auth import Comparisons, Passwords
from portero_py.proxy.gates.forward_auth import Authority
from portero_py.proxy.gates.maintenance import Closed
from portero_py.proxy.gates.rate_limit import RateLimits
from portero_py.wire.field_changes import Changes
from portero_py.wire.headers import REQUEST_KINDS, RESPONSE_KINDS
from portero_py.wire.http1 import MEMO_BLOCK, MEMO_SIZE, request_lines
from portero_py.wire.message import RequestHead, ResponseHead, request_with, response_with

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portero_py.config.model import Config
    from portero_py.core.counters import Counters
    from portero_py.core.model import Service
    from portero_py.core.routing_table import RoutingTable
    from portero_py.proxy.endpoints import Gated
    from portero_py.proxy.gates.gate import Gate
    from portero_py.proxy.patience import AllPatience
    from portero_py.proxy.refusals import Refusals
    from portero_py.proxy.upstream.pool import Pools
    from portero_py.wire.message import Fields

#: How often a request may be sent again, over all backends, where nothing else was said.
MAX_RETRIES: Final = 3


class Rules:
    """The policy of one service, ready for its exchanges. `former` are those that it takes the place of."""

    def __init__(
        self, every: AllRules, service: str, policy: ServicePolicy, former: Rules | None = None
    ) -> None:
        self._every = every
        self.service = service
        self.policy = policy
        self.patience = every.patience.of(service, policy)
        #: How often a request may be sent again.
        self.retries = MAX_RETRIES if policy.retries is None else policy.retries
        gates: list[Gate] = []
        if policy.allow or policy.deny:
            gates.append(_kept(former, (policy.allow, policy.deny)) or Addresses(policy.allow, policy.deny))
        if policy.maintenance is not None:
            gates.append(Closed(policy.maintenance))
        if policy.rate_limits:
            gates.append(
                RateLimits(service, policy.rate_limits, every.buckets, every.counters, every.refusals)
            )
        if policy.basic_auth is not None:
            gates.append(_kept(former, policy.basic_auth) or Passwords(policy.basic_auth, every.comparisons))
        if policy.forward_auth is not None:
            gates.append(
                _kept(former, policy.forward_auth) or Authority(policy.forward_auth, service, every.pools)
            )
        #: What an exchange passes, in order.
        self.gates = tuple(gates)
        #: Whether the client's address says which backend.
        self.by_client = policy.balance in BY_CLIENT
        self.sticky: Stickiness | None = None
        self._number = 0  # what is remembered of heads is under it
        self.renew_key()
        self._request_changes = _changes(policy.request_headers, REQUEST_KINDS)
        self._response_changes = _changes(policy.response_headers, RESPONSE_KINDS)

    def close(self, taken_over: Sequence[Gate] = ()) -> None:
        """Exchanges that are under way may still use it, new ones do not; `taken_over` go on elsewhere."""
        for gate in self.gates:
            if isinstance(gate, Authority) and gate not in taken_over:
                gate.close()

    @property
    def body_bytes(self) -> int:
        """The most that a request's body may hold; 0: no limit."""
        own = self.policy.body_bytes
        return self._every.limits.body_bytes if own is None else own

    def renew_key(self) -> None:
        """Sign cookies with the key that there is now."""
        sticky = self.policy.sticky
        self._number = self._every.next_number()
        self.sticky = None if sticky is None else Stickiness(sticky, self._every.sticky_key)

    def request_head(self, exchange: Gated, head: RequestHead) -> RequestHead:
        """What the backend is to get: `head` itself, which stays as it is, or another one."""
        lines = head.lines
        if self._request_changes is None and self.sticky is None:
            return head
        if lines is None:
            return self._changed(head)
        # It says all that a backend is told beside the request line and Host: so does what follows from it.
        memory = self._every.request_heads
        known = memory.get((self._number, lines))
        if known is None:
            other = self._changed(head)
            known = other.fields, lines if other is head else request_lines(other)
            if len(memory) >= MEMO_SIZE:
                memory.clear()
            memory[self._number, lines] = known
        if known[1] is lines or known[1] == lines:
            return head
        other = RequestHead(
            head.method, head.target, head.authority, head.version, known[0], head.body_length
        )
        other.lines = known[1]
        return other

    def response_head(self, exchange: Gated, head: ResponseHead) -> ResponseHead:
        """What the client is to get instead of a backend's `head`, as `request_head`."""
        changes, sticky, lease = self._response_changes, self.sticky, exchange.lease
        home, is_secure = "", False
        if sticky is not None and lease is not None:
            # Some proxies name what a WebSocket's client asked for.
            is_secure = exchange.peer.forwarding.scheme(exchange.head.forwarded) in (b"https", b"wss")
            home = lease.instance_id
        elif changes is None:
            return head
        memory = self._every.response_heads
        key = (self._number, id(head), home, exchange.is_at_home, is_secure)
        known = memory.get(key)
        if known is not None:
            return known[1]
        other = head if changes is None else response_with(head, changes.of(head.fields))
        if sticky is not None and lease is not None:
            other = sticky.response_head(other, lease, is_at_home=exchange.is_at_home, is_secure=is_secure)
        if head.body_length >= 0 and _size(head.fields) <= MEMO_BLOCK:  # else no parser shares it
            if len(memory) >= MEMO_SIZE:
                memory.clear()
            memory[key] = head, other
        return other

    # Private

    def _changed(self, head: RequestHead) -> RequestHead:
        if self._request_changes is not None:
            head = request_with(head, self._request_changes.of(head.fields))
        return head if self.sticky is None else self.sticky.request_head(head)


def _kept(former: Rules | None, part: object) -> Gate | None:
    """The gate of `former` rules that was made of the same part of the policy."""
    for gate in () if former is None else former.gates:
        if (isinstance(gate, Addresses) and gate.lists == part) or (
            isinstance(gate, (Passwords, Authority)) and gate.auth == part
        ):
            return gate
    return None


def _changes(changes: FieldChanges | None, kinds: Mapping[bytes, int]) -> Changes | None:
    """Those that an operator may make: what frames and routes a message (`kinds`) is left as it is."""
    if changes is None:
        return None
    put, add = (
        [(name.encode(), _value(value)) for name, value in each if name.lower().encode() not in kinds]
        for each in (changes.set, changes.add)
    )
    gone = [name.encode() for name in changes.remove if name.lower().encode() not in kinds]
    return Changes(gone, put, add) or None


def _size(fields: Fields) -> int:
    size = 0
    for name, value in fields:
        size += len(name) + len(value)
    return size


def _value(text: str) -> bytes:
    return text.encode("utf-8")


class AllRules:
    """Those of all services of this worker that have a policy, and were asked for.

    `buckets` are those of rate limits that it has with the other workers, if there are any. `limits` and
    `timeouts` are the general ones; `configure` changes them.
    """

    def __init__(
        self,
        pools: Pools,
        counters: Counters,
        patience: AllPatience,
        refusals: Refusals,
        buckets: Buckets | None,
        config: Config,
    ) -> None:
        self.pools = pools
        self.counters = counters
        self.refusals = refusals
        self.buckets = buckets or Buckets(memoryview(bytearray(Buckets.size(1))), 1, 0)
        self.patience = patience
        # Clients and backends send the same heads again and again, which parsers share: so are those that
        # follow from them. One memory for all services, so that 10,000 of them take no more than one.
        #: By rules and the lines of a head.
        self.request_heads: dict[tuple[int, bytes], tuple[Fields, bytes]] = {}
        #: By rules and the identity of a head, which is kept alive here, and what a cookie depends on.
        self.response_heads: dict[tuple[int, int, str, bool, bool], tuple[ResponseHead, ResponseHead]] = {}
        self._made = 0
        self.comparisons = Comparisons(pools.loop.create_task)
        self._rules: dict[str, Rules] = {}
        self._looked_at = -2  # the version of a table: of none, and "unknown" is -1
        self.sticky_key = b""
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Go by this configuration from now on."""
        self.limits = config.limits
        self.timeouts = config.timeouts
        self.workers = config.workers
        registration = config.registration
        key = sticky_key(registration.secret or "".join([key for _, key in registration.hmac_keys[:1]]))
        if key != self.sticky_key:
            self.sticky_key = key
            for rules in self._rules.values():
                rules.renew_key()

    def next_number(self) -> int:
        """A number for rules: no others, before or after, have it."""
        self._made += 1
        return self._made

    def of(self, service: Service) -> Rules:
        """The rules of a service that has a policy."""
        policy = service.policy
        assert policy is not None
        rules = self._rules.get(service.name)
        if rules is None or rules.policy is not policy:
            if rules is None or rules.policy != policy:
                former = rules
                rules = self._rules[service.name] = Rules(self, service.name, policy, former)
                if former is not None:
                    former.close(rules.gates)
            else:
                rules.policy = policy  # another object that says the same: a renewal over the feed
        return rules

    def retain(self, table: RoutingTable) -> None:
        """Forget the rules of services that are gone, or have no policy any more.

        It looks at those that have changed, if that is known: all of 10,000 take 2 ms, at every renewal.
        """
        for name in table.changed if table.since == self._looked_at else list(self._rules):
            service = table.services.get(name)
            if service is None or service.policy is None:
                rules = self._rules.pop(name, None)
                if rules is not None:
                    rules.close()
        self._looked_at = table.version

    def close(self) -> None:
        """End what goes on for them."""
        for rules in self._rules.values():
            rules.close()
        self._rules = {}
        self.comparisons.close()
