"""How long a backend, or a client in the middle of a body, is waited for.

`AllPatience.general`, which is what the configuration says, holds for services whose policy says nothing
else; each of the others has a `Patience` of its own. Both stay the same objects when their times change, so
whoever waits keeps one and sees at once what is in force: a connection to a backend asks that of its pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portero_py.core.policies import ServiceHealth, ServicePolicy, ServiceTimeouts

if TYPE_CHECKING:
    from portero_py.config.model import Config
    from portero_py.core.routing_table import RoutingTable


class Patience:
    """Seconds. `first_look` is when somebody looks at a request that waits for its response."""

    __slots__ = ("body_idle", "connect", "first_look", "upstream_head", "upstream_idle")

    def __init__(self, config: Config, policy: ServicePolicy | None = None) -> None:
        self.configure(config, policy)

    def configure(self, config: Config, policy: ServicePolicy | None = None) -> None:
        """Be what the configuration says, where the policy does not say otherwise."""
        times = config.timeouts
        own = (None if policy is None else policy.timeouts) or ServiceTimeouts()
        health = (None if policy is None else policy.health) or ServiceHealth()
        self.connect: float = times.connect if own.connect is None else own.connect
        self.upstream_head: float = times.upstream_head if own.upstream_head is None else own.upstream_head
        self.upstream_idle: float = times.upstream_idle if own.upstream_idle is None else own.upstream_idle
        self.body_idle: float = times.body_idle if own.body_idle is None else own.body_idle
        probe_seconds = config.health.timeout if health.timeout is None else health.timeout
        self.first_look: float = min(probe_seconds, self.upstream_head)


class AllPatience:
    """That of all services of this worker."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.general = Patience(config)
        self._own: dict[str, tuple[Patience, ServicePolicy]] = {}
        self._looked_at = -2  # the version of a table: of none, and "unknown" is -1

    def configure(self, config: Config) -> None:
        """Go by this configuration from now on."""
        self._config = config
        self.general.configure(config)
        for patience, policy in self._own.values():
            patience.configure(config, policy)

    def of(self, service: str, policy: ServicePolicy | None) -> Patience:
        """That of a service with this policy, or without one."""
        if policy is None or (policy.timeouts is None and policy.health is None):
            return self.general
        known = self._own.get(service)
        if known is not None and known[1] is policy:
            return known[0]
        if known is None:
            patience = Patience(self._config, policy)
        else:
            patience = known[0]
            patience.configure(self._config, policy)
        self._own[service] = (patience, policy)
        return patience

    def retain(self, table: RoutingTable) -> None:
        """Forget those of services that are gone, or have no policy any more: as `AllRules.retain`."""
        for name in table.changed if table.since == self._looked_at else list(self._own):
            service = table.services.get(name)
            if service is None or service.policy is None:
                self._own.pop(name, None)
        self._looked_at = table.version
