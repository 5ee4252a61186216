"""How far portero is, as /readyz says it. Apart from the pages: who forks does not load what serves them."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What /readyz tells a load balancer in front."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
