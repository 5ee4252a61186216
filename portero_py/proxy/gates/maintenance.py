"""A service that is being worked on: everybody gets the same page."""

from __future__ import annotations

from portero_py.core.policies import Maintenance
from portero_py.errors import UnderMaintenance
from portero_py.proxy.endpoints import Gated
from portero_py.proxy.gates.gate import Asking, Gate


class Closed(Gate):
    """Lets nobody in."""

    __slots__ = ("_maintenance",)

    def __init__(self, maintenance: Maintenance) -> None:
        self._maintenance = maintenance

    def admit(self, exchange: Gated, now: float) -> Asking | None:
        """Raise `UnderMaintenance`, for whoever it is."""
        maintenance = self._maintenance
        # Another one each time: an exception that is raised again keeps the frames of the times before.
        raise UnderMaintenance(
            "the service is being worked on",
            maintenance.page,
            maintenance.content_type,
            maintenance.retry_after,
        )
