"""Which names ACME may be asked for, and which go onto one certificate.

A *group* is the names of one certificate; its first name is the folder's. Wildcards need dns-01, which
portero does not speak, and public CAs sign neither IP addresses by default nor names without a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from portero_py.core.names import normalise_service_name, wildcard_over
from portero_py.errors import ConfigError

Group = tuple[str, ...]

#: Let's Encrypt's limit; others have similar ones.
MAX_NAMES: Final = 100

#: Letters, digits and inner hyphens, two labels at least (RFC 1123, 2.1); the last label is no number.
_NAME: Final = re.compile(r"(?:(?!-)[a-z0-9-]{1,63}(?<!-)\.)+(?!-)(?![0-9]+$)[a-z0-9-]{2,63}(?<!-)")


def certifiable(name: str) -> bool:
    """Whether a CA could certify a normalised name by a challenge that portero answers."""
    return _NAME.fullmatch(name) is not None


def read_group(text: str) -> Group:
    """`"a.example,www.a.example"` as a group. Raises ConfigError with the rest of a sentence."""
    group = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name = normalise_service_name(part) or ""
        if name.startswith("*."):
            raise ConfigError(f'"{name}" is a wildcard: it needs the dns-01 challenge, which is not here')
        if not certifiable(name):
            raise ConfigError(f'"{part[:80]}" is no host name that a CA could certify')
        group.append(name)
    if not group:
        raise ConfigError("a host name is needed")
    if len(group) > MAX_NAMES:
        raise ConfigError(f"one certificate holds at most {MAX_NAMES} names")
    return tuple(dict.fromkeys(group))


def read_pattern(text: str) -> str:
    """A name, or `*.` and a name for exactly one label in place of the star. Raises ConfigError."""
    pattern = normalise_service_name(text.strip()) or ""
    if not certifiable(pattern.removeprefix("*.")):
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
