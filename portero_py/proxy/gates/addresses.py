"""Which addresses a service is for: all but those of `deny`, or of them those of `allow` only.

The address is that of whoever asks (`peer.client`), behind trusted proxies too.
"""

from __future__ import annotations

from portero_py.core.networks import Networks
from portero_py.errors import AddressRefused
from portero_py.proxy.endpoints import Gated
from portero_py.proxy.gates.gate import Asking, Gate


class Addresses(Gate):
    """The lists of one service; without an `allow` everybody is allowed."""

    __slots__ = ("_allowed", "_denied", "lists")

    def __init__(self, allow: tuple[str, ...], deny: tuple[str, ...]) -> None:
        #: What it was made of.
        self.lists = (allow, deny)
        self._allowed = Networks(allow) if allow else None
        self._denied = Networks(deny) if deny else None

    def admit(self, exchange: Gated, now: float) -> Asking | None:
        """Raise `AddressRefused` for whom the service is not for."""
        client = exchange.peer.client(exchange.head.forwarded)
        if self._denied is not None and client in self._denied:
            raise AddressRefused("the service is not for your address")
        if self._allowed is not None and client not in self._allowed:
            raise AddressRefused("the service is not for your address")
        return None
