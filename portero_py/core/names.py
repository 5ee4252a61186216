"""Host names: how a client's Host is read, and which names a service may have.

Two names are the same service when they are equal after normalisation: case folded, port and one trailing
dot stripped, an IPv6 literal without brackets and in its shortest spelling (RFC 5952).

What is accepted is narrower than RFC 3986's reg-name, on purpose: letters, digits, hyphen and underscore
(container names have them), labels of 1 to 63 and names of at most 253 characters. Everything else
(percent-encoding, non-ASCII, `*` from a client) names nothing that could be registered, so it is no host at
all. Names beyond ASCII are registered in their `xn--` form.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address
from typing import Final

MAX_NAME: Final = 253

_MAX_AUTHORITY: Final = MAX_NAME + len(".:65535")
_MAX_PORT: Final = 65535
_NAME: Final = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*", re.ASCII)
_PORT: Final = re.compile(r"[0-9]{0,5}", re.ASCII)
_WILDCARD: Final = "*."


def normalise_host(authority: bytes | str) -> str | None:
    """The name in a Host field or `:authority`: `b"App.Example.:8443"` is `"app.example"`.

    Returns None when it is no valid host: empty, with white space, user information, non-ASCII characters,
    a bad port, unbalanced or missing brackets. (RFC 9110, 7.2; RFC 3986, 3.2.2: an empty port is allowed.)
    """
    if len(authority) > _MAX_AUTHORITY:
        return None
    if isinstance(authority, bytes):
        # Latin-1 never fails, and what it makes of non-ASCII bytes is no name.
        authority = authority.decode("latin-1")
    if authority.startswith("["):
        literal, bracket, port = authority[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return None
        return _ipv6(literal) if _is_port(port[1:]) else None
    name, _, port = authority.partition(":")
    return _name(name) if _is_port(port) else None


def normalise_service_name(name: str) -> str | None:
    """The name of a service as the routing table has it, or None when no service can be called so.

    Host names, IPv4 and IPv6 literals (with or without brackets), and wildcards (`*.example.com`: exactly
    one label in place of the star). No port.
    """
    if name.startswith("["):
        return _ipv6(name[1:-1]) if name.endswith("]") else None
    if ":" in name:
        return _ipv6(name)
    if name.startswith(_WILDCARD):
        parent = _name(name.removeprefix(_WILDCARD))
        return f"{_WILDCARD}{parent}" if parent and len(parent) <= MAX_NAME - len(_WILDCARD) else None
    return _name(name)


def wildcard_over(name: str) -> str:
    """The wildcard that covers a normalised name: `"a.example"` -> `"*.example"`; "" when none can.

    As in certificates (RFC 6125, 6.4.3), HAProxy maps and Caddy, the star stands for exactly one label.
    """
    _, dot, parent = name.partition(".")
    return f"{_WILDCARD}{parent}" if dot else ""


# Private


def _name(name: str) -> str | None:
    # str.lower() would fold some non-ASCII letters into ASCII ones (the Kelvin sign into "k").
    if not name.isascii():
        return None
    name = name.removesuffix(".").lower()
    return name if len(name) <= MAX_NAME and _NAME.fullmatch(name) else None


def _ipv6(literal: str) -> str | None:
    # A zone id means something on one machine only: it is no part of a name (RFC 3986 has none).
    if "%" in literal:
        return None
    try:
        return str(IPv6Address(literal))
    except AddressValueError:
        return None


def _is_port(port: str) -> bool:
    return _PORT.fullmatch(port) is not None and int(port or "0") <= _MAX_PORT
