"""The TXT records that answer dns-01 (RFC 8555, 8.4): their names, their values, and how they are kept.

A name and the wildcard over its children are validated at the same record name, `_acme-challenge.<name>`,
each by a value of its own: values are added and removed one by one, and other values beside ours stay.

A record name may be an alias (CNAME): then the record is made where the chain of aliases ends.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from portero_py.core.acme.names import WILDCARD
from portero_py.errors import DnsFailed

PREFIX: Final = "_acme-challenge."

#: Aliases that are followed, one after the other.
MAX_ALIASES: Final = 8
#: Characters of a line of somebody else's.
MAX_LINE: Final = 500
_MAX_NAME: Final = 255


@dataclass(frozen=True, slots=True)
class TxtRecord:
    """One value at one name, which is lower-case and without a trailing dot."""

    name: str
    value: str

    @property
    def is_plain(self) -> bool:
        """Whether it is made of letters, digits, dots, hyphens and underscores only.

        An alias may lead to any name, and both become arguments of a program.
        """
        return (
            0 < len(self.name) <= _MAX_NAME
            and 0 < len(self.value) <= _MAX_NAME
            and all(c.isascii() and (c.isalnum() or c in "._-") for c in self.name + self.value)
            and not self.name.startswith("-")
        )


def record_name(host: str) -> str:
    """Where a CA asks about `host`; a wildcard is validated where its parent is (RFC 8555, 7.1.3)."""
    return f"{PREFIX}{host.removeprefix(WILDCARD)}"


def record_value(key_authorization: str) -> str:
    """What it wants to find there (RFC 8555, 8.4)."""
    return urlsafe_b64encode(sha256(key_authorization.encode()).digest()).rstrip(b"=").decode()


def end_of_aliases(name: str, alias: Callable[[str], str]) -> list[str]:
    """`name` and what it is an alias of, to the end; `alias` says what one is, "" when it is none.

    Raises DnsFailed for a circle and for too long a chain.
    """
    chain = [name]
    while found := alias(chain[-1]):
        if found in chain:
            raise DnsFailed(f"{name} is an alias that leads back to {found}: mend its CNAME records")
        chain.append(found)
        if len(chain) > MAX_ALIASES + 1:
            raise DnsFailed(f"{name} is an alias of more than {MAX_ALIASES} others, one after the other")
    return chain


def line(text: str) -> str:
    """One line of somebody else's, for the log: short, printable, without outer white space."""
    return "".join(c if c.isprintable() else " " for c in text[: MAX_LINE + 1]).strip()[:MAX_LINE]


def to_json(records: list[TxtRecord]) -> list[dict[str, str]]:
    """Plain values for a JSON file."""
    return [{"name": record.name, "value": record.value} for record in records]


def from_json(document: object) -> list[TxtRecord]:
    """What `to_json` gave, read again. Raises ValueError when it is nothing of the kind."""
    if not isinstance(document, list):
        raise ValueError("it is no list")  # noqa: TRY004 - one kind of error for whatever is wrong
    found = []
    for each in document:
        name, value = (each.get("name"), each.get("value")) if isinstance(each, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(value, str) or not TxtRecord(name, value).is_plain:
            raise ValueError("it lists something that is no record")
        found.append(TxtRecord(name, value))
    return found
