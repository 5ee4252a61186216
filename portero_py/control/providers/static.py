"""Backends that are simply there: a fixed list, granted once, for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from portero_py.control.leases import Leases
from portero_py.control.providers.provider import Provider
from portero_py.core.model import Backend, LeaseRequest


class StaticBackends(Provider):
    """Pairs of a service's name, normalised (`core.names`), and a backend of it."""

    source = "static"

    def __init__(self, backends: Iterable[tuple[str, Backend]]) -> None:
        self._requests = [LeaseRequest(service, backend, ttl_seconds=None) for service, backend in backends]

    async def run(self, leases: Leases) -> None:
        """Grant them all. Raises RegistryFull when not all fit: the next attempt may find more room."""
        await leases.replace(self.source, self._requests)
        await asyncio.Event().wait()
