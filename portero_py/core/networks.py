"""Which addresses belong to a list of networks, however long it is.

A network is kept under its length and its bits, so an address is looked up once for each length that the
list has: 10,000 networks of three lengths are three look-ups. What was asked is remembered: clients come
again. IPv4 addresses that are written as IPv6 (`::ffff:192.0.2.1`) are IPv4, on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

#: Addresses that are remembered, 150 bytes each; when there are more it begins again.
MAX_KNOWN: Final = 4096

#: ::ffff:0:0/96, the IPv4 addresses among the IPv6 ones (RFC 4291, 2.5.5.2).
_MAPPED_BITS: Final = 96


class Networks:
    """Those of `networks`, as text (`10.0.0.0/8`). Raises ValueError for what is none."""

    def __init__(self, networks: Iterable[str], max_known: int = MAX_KNOWN) -> None:
        #: Length -> the bits of that length, by version of IP.
        self._lengths: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        self._known: dict[str, bool] = {}
        self._max_known = max_known
        for text in networks:
            network = _unmapped(ip_network(text, strict=False))
            bits = int(network.network_address) >> (network.max_prefixlen - network.prefixlen)
            self._lengths[network.version].setdefault(network.prefixlen, set()).add(bits)

    def __contains__(self, address: str) -> bool:
        """Whether `address` is in any of them; what is no IP address is in none."""
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= self._max_known:
                self._known.clear()
            known = self._known[address] = self._look(address)
        return known

    # Private

    def _look(self, address: str) -> bool:
        try:
            ip = ip_address(address)
        except ValueError:
            return False
        if isinstance(ip, IPv6Address):
            ip = ip.ipv4_mapped or ip
        number, most = int(ip), ip.max_prefixlen
        return any(number >> (most - length) in bits for length, bits in self._lengths[ip.version].items())


# Private


def _unmapped(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    """The IPv4 network that an IPv6 one stands for, or itself."""
    if isinstance(network, IPv6Network) and network.prefixlen >= _MAPPED_BITS:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))
    return network
