"""The TLS side of a connection to a backend: which context, and is it the right backend?

A backend that pinned its certificate when it registered (an authenticated request) is verified by that
pin, and by nothing else: it may be self-signed, and its names and dates do not matter. The others are
verified against a CA and the host name when `upstream_tls_verify` is on; off, as in Portero, they are
encrypted but not verified.
"""

from __future__ import annotations

import hashlib
import ssl
from typing import TYPE_CHECKING

from portero_py.errors import ConfigError, UpstreamTlsFailed

if TYPE_CHECKING:
    import asyncio

    from portero_py.config.model import Proxy
    from portero_py.core.model import Backend


class UpstreamTls:
    """The client contexts of a process. Raises ConfigError when the CA file cannot be used.

    Give `server_hostname` (the name in Host, without port) to the connection: it becomes the SNI, and the
    name that a verified certificate has to cover.
    """

    def __init__(self, proxy: Proxy) -> None:
        self._unverified = _context()
        self._unverified.check_hostname = False
        self._unverified.verify_mode = ssl.CERT_NONE
        self._verified = _verifying(proxy.upstream_ca_file) if proxy.upstream_tls_verify else None

    def context(self, backend: Backend) -> ssl.SSLContext:
        """Return the context to connect to `backend` with."""
        if backend.tls_fingerprint or self._verified is None:
            return self._unverified
        return self._verified

    def check_pin(self, backend: Backend, transport: asyncio.BaseTransport) -> None:
        """Compare what `backend` presented with what it pinned: after the handshake, before any byte is sent.

        Raises UpstreamTlsFailed when they differ. Without a pin there is nothing to compare.
        """
        expected = backend.tls_fingerprint
        if not expected:
            return
        tls = transport.get_extra_info("ssl_object")
        presented = tls.getpeercert(binary_form=True) if tls is not None else None
        if not presented:
            raise UpstreamTlsFailed(f"backend {backend.address} pinned {expected} but presented none")
        seen = hashlib.sha256(presented).hexdigest()
        if seen != expected:
            raise UpstreamTlsFailed(f"backend {backend.address} pinned {expected} but presented {seen}")


# Private


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context


def _verifying(ca_file: str) -> ssl.SSLContext:
    context = _context()  # PROTOCOL_TLS_CLIENT: CERT_REQUIRED and check_hostname
    if not ca_file:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return context
    try:
        context.load_verify_locations(cafile=ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"--upstream-ca-file {ca_file}: no usable PEM certificates in it") from error
    except OSError as error:
        raise ConfigError(f"--upstream-ca-file {ca_file}: {error.strerror}") from error
    return context
