"""What is known about the client at the far end of one downstream connection.

Who asks is said in one place, `Peer.client`: whoever is at the far end, or, if that is a trusted proxy, the
client that it names. What follows from the client's address (who may come in, how often, to which backend)
follows from that.

What one connection leaves in `Peers` for another: only those from the same address find it. It is what
follows from that address, and the forwarded fields for the last host, a function of address, scheme and host.
"""

from __future__ import annotations

import ipaddress
import ssl
from typing import TYPE_CHECKING, Final

from portero_py.core.limits import client_of
from portero_py.core.networks import Networks
from portero_py.wire.headers import Forwarding

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from portero_py.config.model import Network
    from portero_py.core.certificates import Certificate
    from portero_py.wire.message import Field

#: Addresses that are remembered, 1 KB each.
MAX_KNOWN: Final = 4096
#: Bytes of a chain of proxies that is remembered: clients can make them as long as a head may be.
MAX_CHAIN: Final = 256


class Peer:
    """The client's address, its TLS parameters, and how its requests are marked for the backends.

    `tls_version` is "" on a plain connection, "TLSv1.2" or "TLSv1.3" otherwise. `certificate` is the one
    that this connection presented, or None.
    """

    __slots__ = ("_proxies", "address", "certificate", "covered", "forwarding", "port", "sni", "tls_version")

    def __init__(
        self, address: str, port: int, forwarding: Forwarding, proxies: Proxies | None = None
    ) -> None:
        self._proxies = proxies  # those that are trusted, if this is one
        self.address = address
        self.port = port
        self.forwarding = forwarding
        self.sni = ""
        self.tls_version = ""
        self.certificate: Certificate | None = None
        #: The last authority that was found to be covered by the certificate.
        self.covered: bytes | None = None

    def client(self, received: Sequence[Field]) -> str:
        """The address of whoever makes a request with these forwarded fields (`RequestHead.forwarded`)."""
        if self._proxies is None or not received:
            return self.address
        return self._proxies.client_of(self.address, received)


class Proxies:
    """The proxies whose word about their clients counts.

    Each proxy appends to X-Forwarded-For whom it has it from. So it is read from its end: the first one who
    is no trusted proxy is the client, and what stands before him is what he says himself. An entry that is no
    address ends it too: then it is the proxy that wrote it.
    """

    def __init__(self, networks: tuple[Network, ...]) -> None:
        self._networks = Networks([str(network) for network in networks])
        self._named: dict[tuple[str, bytes], str] = {}

    def __contains__(self, address: str) -> bool:
        return address in self._networks

    def client_of(self, address: str, received: Sequence[Field]) -> str:
        """The client for whom the trusted proxy at `address` asks."""
        chain = b",".join([value for name, value in received if name.lower() == b"x-forwarded-for"])
        if not chain:
            return address
        if len(chain) > MAX_CHAIN:
            return self._read(address, chain)
        client = self._named.get((address, chain))
        if client is None:
            if len(self._named) >= MAX_KNOWN:
                self._named.clear()
            client = self._named[address, chain] = self._read(address, chain)
        return client

    # Private

    def _read(self, address: str, chain: bytes) -> str:
        for entry in reversed(chain.split(b",")):
            ip = _ip(entry.strip().decode("latin-1"))
            if ip is None:
                break
            address = str(ip)
            if address not in self._networks:
                break
        return address


class Peers:
    """Says who is at the far end of a transport.

    A client, or a proxy before many of them, makes many connections: what follows from its address is
    remembered, for 1.5 of the 40 µs that a connection with one request takes.
    """

    def __init__(self, trusted_proxies: tuple[Network, ...]) -> None:
        self._proxies = Proxies(trusted_proxies)
        self._known: dict[tuple[str, bytes], tuple[str, Forwarding, Proxies | None]] = {}
        self._clients: dict[str, str] = {}

    def of(self, transport: asyncio.BaseTransport) -> Peer:
        """Return who is at the far end of one connection."""
        name = transport.get_extra_info("peername")
        host, port = name[:2] if isinstance(name, tuple) and len(name) >= 2 else ("unknown", 0)
        tls = transport.get_extra_info("ssl_object")
        key = (host, b"https" if tls is not None else b"http")
        address, forwarding, proxies = self._known.get(key) or self._learn(key)
        peer = Peer(address, port, forwarding, proxies)
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
            client = self._clients[host] = "" if address in self._proxies else client_of(host)
        return client

    # Private

    def _learn(self, key: tuple[str, bytes]) -> tuple[str, Forwarding, Proxies | None]:
        host, scheme = key
        # A dual-stack listener sees IPv4 clients as ::ffff:192.0.2.1.
        address = host.removeprefix("::ffff:") if "." in host else host
        trusted = address in self._proxies
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        forwarding = Forwarding(address.encode(), scheme, trusted=trusted)
        known = self._known[key] = (address, forwarding, self._proxies if trusted else None)
        return known


# Private


def _ip(entry: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in an entry of X-Forwarded-For; some proxies append the port (`[::1]:80`)."""
    if entry.startswith("["):
        entry = entry[1:].partition("]")[0]
    elif entry.count(":") == 1:
        entry = entry.partition(":")[0]
    try:
        ip = ipaddress.ip_address(entry)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip
