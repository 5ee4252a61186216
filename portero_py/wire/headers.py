"""What happens to header fields on their way through: hop-by-hop removal, Host, forwarded fields.

The rules
- Hop-by-hop fields, and those that Connection names, end here (RFC 9110, 7.6.1). Connection cannot name a
  field away that frames or routes the message.
- Host passes unchanged. Exactly one, a host name or IP literal with an optional port, nothing else:
  what routes a request must not be readable in two ways.
- X-Forwarded-For, -Proto and -Host and X-Request-ID are ours. What a client sent under these names is
  dropped, unless the client is a trusted proxy. Spellings with an underscore reach many
  applications under the same name, so they are dropped always.

`REQUEST_KINDS` and `RESPONSE_KINDS` say in one dictionary look-up a field what a name means to us: ordinary
fields, almost all, are not in them. Measured: 75 ns a field, lower-casing included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Final

from portero_py.wire.message import Field, Fields

# What a special field name means. Plain ints: an enum member costs an attribute look-up more, per field.
HOP: Final = 1  # ends here
HOST: Final = 2
LENGTH: Final = 3
CODING: Final = 4
CONNECTION: Final = 5
UPGRADE: Final = 6
EXPECT: Final = 7
TE: Final = 8
FORWARDED: Final = 9  # ours: kept from trusted proxies only
SPOOF: Final = 10  # an underscore spelling of one of these: dropped

_HOP_BY_HOP: Final = (
    b"keep-alive",
    b"proxy-connection",
    b"trailer",
    b"http2-settings",
    b"proxy-authenticate",
)
_FORWARDED: Final = (
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-forwarded-host",
    b"x-forwarded-port",
    b"x-forwarded-server",
    b"x-forwarded-prefix",
    b"x-forwarded-ssl",
    b"x-forwarded-scheme",
    b"x-real-ip",
    b"x-request-id",
    b"forwarded",
)


def underscored(name: bytes) -> list[bytes]:
    """Every spelling of `name` in which at least one dash is an underscore."""
    words = name.split(b"-")
    return [
        b"".join([word + dash for word, dash in zip(words, (*dashes, b""), strict=True)])
        for dashes in product((b"-", b"_"), repeat=len(words) - 1)
        if b"_" in dashes
    ]


def _request_kinds() -> dict[bytes, int]:
    kinds: dict[bytes, int] = {
        b"host": HOST,
        b"content-length": LENGTH,
        b"transfer-encoding": CODING,
        b"connection": CONNECTION,
        b"upgrade": UPGRADE,
        b"expect": EXPECT,
        b"te": TE,
        b"proxy-authorization": HOP,
    }
    kinds.update(dict.fromkeys(_HOP_BY_HOP, HOP))
    kinds.update(dict.fromkeys(_FORWARDED, FORWARDED))
    for name in list(kinds):
        kinds.update(dict.fromkeys(underscored(name), SPOOF))
    return kinds


REQUEST_KINDS: Final = _request_kinds()
RESPONSE_KINDS: Final = {
    b"content-length": LENGTH,
    b"transfer-encoding": CODING,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    **dict.fromkeys(_HOP_BY_HOP, HOP),
}

#: What Connection may not take out of a message.
_NOT_NOMINATED: Final = frozenset(
    {b"content-length", b"host", b"transfer-encoding", b"authorization", b"cookie"}
)

#: What `is_authority` accepts, for longer expressions. RFC 3986 allows more in a reg-name (percent-encoding,
#: sub-delims); no host name in DNS has it, and every such character has been read differently by two parties
#: somewhere.
AUTHORITY: Final = rb"(?:[0-9A-Za-z._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?"
_AUTHORITY = re.compile(AUTHORITY)


def is_authority(value: bytes) -> bool:
    """Say whether `value` is a host with an optional port, as a Host field may hold it."""
    return _AUTHORITY.fullmatch(value) is not None


def connection_options(values: list[bytes]) -> set[bytes]:
    """Return the lower-cased options of all Connection fields."""
    return {option.strip(b" \t") for option in b",".join(values).lower().split(b",")} - {b""}


def without_nominated(fields: Fields, options: set[bytes]) -> Fields:
    """Return `fields` without those that Connection names."""
    nominated = options - _NOT_NOMINATED
    return [field for field in fields if field[0].lower() not in nominated]


class Forwarded:
    """The proxy's own request fields, as pairs and as the lines of an HTTP/1 head."""

    __slots__ = ("fields", "lines")

    def __init__(self, fields: Fields, lines: bytes | None = None) -> None:
        self.fields = fields
        self.lines = b"".join([b"%b: %b\r\n" % field for field in fields]) if lines is None else lines


_NOTHING: Final = Forwarded([])


class Forwarding:
    """Makes the forwarded fields for the requests of one client connection.

    `address` is the client's IP address as text, `scheme` is b"https" or b"http". From a trusted proxy
    the fields it sent are kept, and its own address is appended to X-Forwarded-For.

    All connections from one address share it: what depends on received fields is never kept.
    """

    __slots__ = ("_address", "_authority", "_last", "_scheme", "_trusted")

    def __init__(self, address: bytes, scheme: bytes, *, trusted: bool) -> None:
        self._address = address
        self._scheme = scheme
        self._trusted = trusted
        self._authority: bytes | None = None
        self._last = _NOTHING

    def fields(self, authority: bytes, received: Sequence[Field]) -> Forwarded:
        """Return the fields for a request to `authority`; `received` are those that the client sent."""
        if received and self._trusted:
            return self._appended(authority, received)
        if authority != self._authority:
            address, scheme = self._address, self._scheme
            self._last = Forwarded(
                [
                    (b"X-Forwarded-For", address),
                    (b"X-Forwarded-Proto", scheme),
                    (b"X-Forwarded-Host", authority),
                ],
                # At once, not field by field: a client may ask for another host each time.
                b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n"
                % (address, scheme, authority),
            )
            self._authority = authority
        return self._last

    def scheme(self, received: Sequence[Field]) -> bytes:
        """Return how the client came, b"https" or b"http", as the backend is told."""
        if received and self._trusted:
            for name, value in received:
                if name.lower() == b"x-forwarded-proto":
                    return value.partition(b",")[0].strip().lower()
        return self._scheme

    def request_id(self, received: Sequence[Field]) -> bytes:
        """Return the X-Request-ID that a trusted proxy sent, or b"" when a new one is due."""
        if received and self._trusted:
            for name, value in received:
                if name.lower() == b"x-request-id" and 0 < len(value) <= 128:
                    return value
        return b""

    # Private

    def _appended(self, authority: bytes, received: Sequence[Field]) -> Forwarded:
        chain: list[bytes] = []
        fields: Fields = []
        seen: set[bytes] = set()
        for name, value in received:
            lower = name.lower()
            if lower == b"x-forwarded-for":
                chain.append(value)
            elif lower != b"x-request-id":
                seen.add(lower)
                fields.append((name, value))
        chain.append(self._address)
        fields.append((b"X-Forwarded-For", b", ".join(chain)))
        if b"x-forwarded-proto" not in seen:
            fields.append((b"X-Forwarded-Proto", self._scheme))
        if b"x-forwarded-host" not in seen:
            fields.append((b"X-Forwarded-Host", authority))
        return Forwarded(fields)
