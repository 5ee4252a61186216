"""What is known about the client at the far end of one downstream connection.

What one connection leaves in `Peers` for another: only those from the same address find it. It is what
follows from that address, and the forwarded fields for the last host, a function of address, scheme and host.
"""

from __future__ import annotations

import ipaddress
import ssl
from typing import TYPE_CHECKING, Final

from portero_py.core.limits import client_of
from portero_py.wire.headers import Forwarding

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from portero_py.config.model import Network
    from portero_py.core.certificates import Certificate
    from portero_py.wire.message import Field

#: Addresses that are remembered, 1 KB each.
MAX_KNOWN: Final = 4096


class Peer:
    """The client's address, its TLS parameters, and how its requests are marked for the backends.

    `tls_version` is "" on a plain connection, "TLSv1.2" or "TLSv1.3" otherwise. `certificate` is the one
    that this connection presented, or None.
    """

    __slots__ = ("address", "certificate", "covered", "forwarding", "port", "sni", "tls_version")

    def __init__(self, address: str, port: int, forwarding: Forwarding) -> None:
        self.address = address
        self.port = port
        self.forwarding = forwarding
        self.sni = ""
        self.tls_version = ""
        self.certificate: Certificate | None = None
        #: The last authority that was found to be covered by the certificate.
        self.covered: bytes | None = None


class Peers:
    """Says who is at the far end of a transport.

    A client, or a proxy before many of them, makes many connections: what follows from its address is
    remembered, for 1.5 of the 40 µs that a connection with one request takes.
    """

    def __init__(self, trusted_proxies: tuple[Network, ...]) -> None:
        self._trusted_proxies = trusted_proxies
        self._known: dict[tuple[str, bytes], tuple[str, Forwarding]] = {}
        self._clients: dict[str, str] = {}

    def of(self, transport: asyncio.BaseTransport) -> Peer:
        """Return who is at the far end of one connection."""
        name = transport.get_extra_info("peername")
        host, port = name[:2] if isinstance(name, tuple) and len(name) >= 2 else ("unknown", 0)
        tls = transport.get_extra_info("ssl_object")
        key = (host, b"https" if tls is not None else b"http")
        address, forwarding = self._known.get(key) or self._learn(key)
        peer = Peer(address, port, forwarding)
        if isinstance(tls, ssl.SSLObject):
            peer.tls_version = tls.version() or ""
            peer.sni = getattr(tls, "sni", "")
            peer.certificate = getattr(tls, "certificate", None)
        return peer

    def client_of(self, transport: asyncio.BaseTransport) -> str:
        """Return whom a connection counts for (`core.limits`), "" for a proxy, who stands for many."""
        name = transport.get_extra_info("peername")
        host = name[0] if isinstance(name, tuple) and len(name) >= 2 else "unknown"
        client = self._clients.get(host)
        if client is None:
            if len(self._clients) >= MAX_KNOWN:
                self._clients.clear()
            address = host.removeprefix("::ffff:") if "." in host else host
            is_proxy = bool(self._trusted_proxies) and _is_in(address, self._trusted_proxies)
            client = self._clients[host] = "" if is_proxy else client_of(host)
        return client

    def client_behind(self, peer: Peer, received: Sequence[Field]) -> str:
        """Return the address of the client for whom a request comes; `received` are its forwarded fields.

        From a trusted proxy it is the last one in X-Forwarded-For that is none of a trusted proxy: what
        stands before it anybody may have written. "" when nobody knows.
        """
        address = peer.address
        for hop in reversed(peer.forwarding.chain(received)):
            address = _address_of(hop.decode("latin-1"))
            if not address or not _is_in(address, self._trusted_proxies):
                break
        return "" if address == "unknown" else address

    # Private

    def _learn(self, key: tuple[str, bytes]) -> tuple[str, Forwarding]:
        host, scheme = key
        # A dual-stack listener sees IPv4 clients as ::ffff:192.0.2.1.
        address = host.removeprefix("::ffff:") if "." in host else host
        trusted = bool(self._trusted_proxies) and _is_in(address, self._trusted_proxies)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        known = self._known[key] = (address, Forwarding(address.encode(), scheme, trusted=trusted))
        return known


# Private


def _address_of(hop: str) -> str:
    """The address in an entry of X-Forwarded-For, with or without port and brackets; "" for anything else."""
    text = hop
    if hop.startswith("["):
        text = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        text = hop.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return ""


def _is_in(address: str, networks: tuple[Network, ...]) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(ip.version == network.version and ip in network for network in networks)
