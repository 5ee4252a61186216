"""Which names ACME may be asked for, and which go onto one certificate.

A *group* is the names of one certificate; its first name is the folder's. A wildcard is one of them as it is
written (`*.a.example`); only dns-01 validates it, and no CA takes it together with a name that it covers.
Public CAs sign neither IP addresses by default nor names without a dot.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Final

from portero_py.core.names import normalise_service_name, wildcard_over
from portero_py.errors import ConfigError

Group = tuple[str, ...]

#: What a wildcard begins with.
WILDCARD: Final = "*."

#: Let's Encrypt's limit; others have similar ones.
MAX_NAMES: Final = 100

#: Letters, digits and inner hyphens, two labels at least (RFC 1123, 2.1); the last label is no number.
_NAME: Final = re.compile(r"(?:(?!-)[a-z0-9-]{1,63}(?<!-)\.)+(?!-)(?![0-9]+$)[a-z0-9-]{2,63}(?<!-)")


def certifiable(name: str) -> bool:
    """Whether a CA could certify a normalised host name."""
    return _NAME.fullmatch(name) is not None


def orderable(name: str) -> bool:
    """Whether a certificate may list it: a host name, or a wildcard over host names."""
    return certifiable(name.removeprefix(WILDCARD))


def has_wildcard(names: Iterable[str]) -> bool:
    """Whether one of them can be validated by dns-01 only."""
    return any(name.startswith(WILDCARD) for name in names)


def read_group(text: str) -> Group:
    """`"a.example,www.a.example"` as a group. Raises ConfigError with the rest of a sentence."""
    group = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name = normalise_service_name(part) or ""
        if not orderable(name):
            raise ConfigError(f'"{part[:80]}" is no host name that a CA could certify')
        group.append(name)
    if not group:
        raise ConfigError("a host name is needed")
    if len(group) > MAX_NAMES:
        raise ConfigError(f"one certificate holds at most {MAX_NAMES} names")
    for name in group:
        if wildcard_over(name) in group and not name.startswith(WILDCARD):
            raise ConfigError(
                f'"{name}" is covered by "{wildcard_over(name)}" in the same certificate: drop it'
            )
    return tuple(dict.fromkeys(group))


def read_pattern(text: str) -> str:
    """A name, or `*.` and a name for exactly one label in place of the star. Raises ConfigError."""
    pattern = normalise_service_name(text.strip()) or ""
    if not orderable(pattern):
        raise ConfigError(f'"{text[:80]}" is no pattern: use a host name, or *. in front of one')
    return pattern


def allowed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a service's name may bring a certificate along: it can have one, and a pattern matches it."""
    return certifiable(name) and any(pattern in (name, wildcard_over(name)) for pattern in patterns)


def overlapping(groups: Iterable[Group]) -> str:
    """A name that two groups hold, or ""."""
    seen: set[str] = set()
    for group in groups:
        for name in group:
            if name in seen:
                return name
            seen.add(name)
    return ""


def covered(name: str, listed: Container[str]) -> bool:
    """Whether it, or a wildcard over it, is listed."""
    return name in listed or wildcard_over(name) in listed
