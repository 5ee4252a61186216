"""What follows from the policies of services in this worker: made once for each, asked by each exchange.

An exchange of a service without a policy never comes here. `Rules` is one service's, and lives as long as its
policy does; what outlives a change of the policy (counts of rate limits, known passwords) is taken over by
its successor where the part of the policy that it follows from is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from portero_py.core.policies import ServicePolicy

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from portero_py.config.model import Config
    from portero_py.core.counters import Counters
    from portero_py.core.model import Service
    from portero_py.proxy.endpoints import Gated
    from portero_py.proxy.gates.gate import Gate
    from portero_py.proxy.patience import AllPatience
    from portero_py.wire.message import RequestHead, ResponseHead

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
        #: What an exchange passes, in order.
        self.gates: tuple[Gate, ...] = ()

    @property
    def body_bytes(self) -> int:
        """The most that a request's body may hold; 0: no limit."""
        own = self.policy.body_bytes
        return self._every.limits.body_bytes if own is None else own

    def request_head(self, exchange: Gated, head: RequestHead) -> RequestHead:
        """What the backend is to get: `head` itself, which stays as it is, or another one."""
        return head

    def response_head(self, exchange: Gated, head: ResponseHead) -> ResponseHead:
        """What the client is to get instead of a backend's `head`, as `request_head`."""
        return head


class AllRules:
    """Those of all services of this worker that have a policy, and were asked for.

    `limits` and `timeouts` are the general ones; `configure` changes them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, counters: Counters, patience: AllPatience, config: Config
    ) -> None:
        self.loop = loop
        self.counters = counters
        self.patience = patience
        self.configure(config)
        self._rules: dict[str, Rules] = {}

    def configure(self, config: Config) -> None:
        """Go by this configuration from now on."""
        self.limits = config.limits
        self.timeouts = config.timeouts
        self.workers = config.workers

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
