"""Which names are looked after: those that portero was told, and those that backends brought along.

A name that a backend brought is looked after as long as its service is there, and `FORGET_SECONDS` longer:
then it is not renewed any more, and its place is free. Its files stay, and are taken up again when the
service comes back. One that is covered by what portero was told to get, a wildcard included, needs none of
its own, even before that is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Final

from portero_py.core.acme.names import Group, allowed, covered

if TYPE_CHECKING:
    from portero_py.config.model import Acme as AcmeConfig
    from portero_py.core.certificates import CertificateTable

#: How long a name that a backend brought outlives its service. When it comes back nothing is lost but the
#: renewals that were due meanwhile, and these are made up for at once.
FORGET_SECONDS: Final = 86400.0
#: Most names that backends may bring along: a CA's limits, and this machine's time, are finite.
MAX_BROUGHT: Final = 1000

_log = logging.getLogger(__name__)


class WantedNames:
    """Told and brought names. `table` is what is served now; `has_service` says whether one has a backend."""

    def __init__(
        self,
        config: AcmeConfig,
        *,
        table: Callable[[], CertificateTable],
        has_service: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._told = {name for group in config.domains for name in group}
        self._table = table
        self._has_service = has_service
        self._clock = clock
        self._brought: dict[str, float] = {}  # when each was last seen to have a backend

    @property
    def is_full(self) -> bool:
        """Whether no backend may bring another name."""
        return len(self._brought) >= MAX_BROUGHT

    def is_news(self, service: str) -> bool:
        """Whether that name may be brought along, and is not looked after yet."""
        if service in self._brought or not allowed(service, self._config.on_register):
            return False
        return not covered(service, self._told)

    def bring(self, service: str) -> None:
        """Look after that name too, from now on."""
        self._brought[service] = self._clock()

    def forget(self, busy: Container[str]) -> list[str]:
        """Give up those, none of them `busy`, whose services are gone for long; which they are."""
        now = self._clock()
        forgotten = []
        for name, seen in list(self._brought.items()):
            if self._has_service(name):
                self._brought[name] = now
            elif now - seen >= FORGET_SECONDS and name not in busy:
                del self._brought[name]
                forgotten.append(name)
                _log.info("%s has no backend any more: its certificate is not renewed from now on", name)
        return forgotten

    def groups(self) -> list[Group]:
        """The names of each certificate that is to be looked after."""
        brought = [(name,) for name in self._brought if not covered(name, self._told) and not self._has(name)]
        return [*self._config.domains, *brought]

    # Private

    def _has(self, name: str) -> bool:
        """Whether another certificate than its own covers a name that a backend brought."""
        found = self._table().find(name)
        return found is not None and found.name != name and found.not_after > self._clock()
