"""The ACME challenges that are pending: what the control plane publishes, and the listeners answer.

An empty `Challenges` is the ordinary state: then no listener looks at anything that it would not look at
anyway. Names are normalised (`core.names`), tokens as the CA wrote them (base64url, RFC 8555, 8.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

#: The only protocol that a CA offers in a tls-alpn-01 handshake (RFC 8737, 4).
ACME_TLS: Final = "acme-tls/1"


@dataclass(frozen=True, slots=True)
class Challenges:
    """An immutable, versioned set of pending challenges. A higher `version` replaces a lower one.

    tls_alpn   host name -> (chain, key) as PEM: what a tls-alpn-01 handshake for that name is shown
    http       token -> key authorization: the body of `/.well-known/acme-challenge/<token>`
    """

    version: int = 0
    tls_alpn: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    http: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        """Whether anything is pending."""
        return bool(self.tls_alpn or self.http)
