"""What is known about the client at the far end of one downstream connection."""

from __future__ import annotations

import ipaddress
import ssl
from typing import TYPE_CHECKING

from portero_py.wire.headers import Forwarding

if TYPE_CHECKING:
    import asyncio

    from portero_py.config import Network
    from portero_py.core.certificates import Certificate


class Client:
    """The client's address, its TLS parameters, and how its requests are marked for the backends.

    `tls_version` is "" on a plain connection, "TLSv1.2" or "TLSv1.3" otherwise. `certificate` is the one
    that this connection presented, or None.
    """

    __slots__ = ("address", "certificate", "covered", "forwarding", "port", "sni", "tls_version")

    def __init__(self, transport: asyncio.BaseTransport, trusted_proxies: tuple[Network, ...]) -> None:
        self.address, self.port = _peer(transport)
        self.sni = ""
        self.tls_version = ""
        self.certificate: Certificate | None = None
        #: The last authority that was found to be covered by the certificate.
        self.covered: bytes | None = None
        tls = transport.get_extra_info("ssl_object")
        if isinstance(tls, ssl.SSLObject):
            self.tls_version = tls.version() or ""
            self.sni = getattr(tls, "sni", "")
            self.certificate = getattr(tls, "certificate", None)
        self.forwarding = Forwarding(
            self.address.encode(),
            b"https" if self.tls_version else b"http",
            trusted=bool(trusted_proxies) and _is_in(self.address, trusted_proxies),
        )


# Private


def _peer(transport: asyncio.BaseTransport) -> tuple[str, int]:
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple) or len(peer) < 2:
        return "unknown", 0  # the client was gone before we looked
    host = str(peer[0])
    # A dual-stack listener sees IPv4 clients as ::ffff:192.0.2.1.
    return host.removeprefix("::ffff:") if "." in host else host, int(peer[1])


def _is_in(address: str, networks: tuple[Network, ...]) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(ip.version == network.version and ip in network for network in networks)
