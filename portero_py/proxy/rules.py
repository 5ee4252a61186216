"""What follows from the policies of services in this worker: made once for each, asked by each exchange.

An exchange of a service without a policy never comes here. `Rules` is one service's, and lives as long as its
policy does; what outlives a change of the policy (counts of rate limits, known passwords) is taken over by
its successor where the part of the policy that it follows from is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portero_py.core.balancing.balancers import BY_CLIENT
from portero_py.core.policies import ServicePolicy
from portero_py.core.stickiness import Stickiness, sticky_key

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from portero_py.config.model import Config
    from portero_py.core.counters import Counters
    from portero_py.core.model import Service
    from portero_py.proxy.endpoints import Gated
    from portero_py.proxy.gates.gate import Gate
    from portero_py.wire.message import RequestHead, ResponseHead


class Rules:
    """The policy of one service, ready for its exchanges. `former` are those that it takes the place of."""

    def __init__(
        self, every: AllRules, service: str, policy: ServicePolicy, former: Rules | None = None
    ) -> None:
        self._every = every
        self.service = service
        self.policy = policy
        #: What an exchange passes, in order.
        self.gates: tuple[Gate, ...] = ()
        #: Whether the client's address says which backend.
        self.by_client = policy.balance in BY_CLIENT
        self.sticky: Stickiness | None = None
        self.renew_key()

    @property
    def body_bytes(self) -> int:
        """The most that a request's body may hold; 0: no limit."""
        own = self.policy.body_bytes
        return self._every.limits.body_bytes if own is None else own

    def renew_key(self) -> None:
        """Sign cookies with the key that there is now."""
        sticky = self.policy.sticky
        self.sticky = None if sticky is None else Stickiness(sticky, self._every.sticky_key)

    def request_head(self, exchange: Gated, head: RequestHead) -> RequestHead:
        """What the backend is to get: `head` itself, which stays as it is, or another one."""
        return head if self.sticky is None else self.sticky.request_head(head)

    def response_head(self, exchange: Gated, head: ResponseHead) -> ResponseHead:
        """What the client is to get instead of a backend's `head`, as `request_head`."""
        sticky, lease = self.sticky, exchange.lease
        if sticky is not None and lease is not None:
            asked = exchange.head
            is_secure = exchange.peer.forwarding.scheme(asked.forwarded) == b"https"
            head = sticky.response_head(head, lease, is_at_home=exchange.is_at_home, is_secure=is_secure)
        return head


class AllRules:
    """Those of all services of this worker that have a policy, and were asked for.

    `limits` and `timeouts` are the general ones; `configure` changes them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, counters: Counters, config: Config) -> None:
        self.loop = loop
        self.counters = counters
        self._rules: dict[str, Rules] = {}
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

    def of(self, service: Service) -> Rules:
        """The rules of a service that has a policy."""
        policy = service.policy
        assert policy is not None
        rules = self._rules.get(service.name)
        if rules is None or rules.policy is not policy:
            if rules is None or rules.policy != policy:
                rules = self._rules[service.name] = Rules(self, service.name, policy, rules)
            else:
                rules.policy = policy  # another object that says the same: a renewal over the feed
        return rules

    def retain(self, services: Mapping[str, Service]) -> None:
        """Forget the rules of services that are gone, or have no policy any more."""
        kept = {}
        for name, rules in self._rules.items():
            service = services.get(name)
            if service is not None and service.policy is not None:
                kept[name] = rules
        self._rules = kept
