"""Cookies on their way through: one is found, taken out or marked, and every other byte stays as it was.

A Cookie field holds `name=value` pairs, parted by semicolons (RFC 6265, 4.2.1; HTTP/2 may split it, and our
reader has joined it again). HTTP/1 clients send one field; if there are several, all are looked at. What is
no such pair is somebody else's business and passes. Names are compared as they are: they know no case.

A mark is 32 characters and `~` before a cookie's value, inside its quotes if it has some. What looks like one
is taken off on the way in, whoever made it: marks of backends that are gone are none of the application's.
"""

from __future__ import annotations

import re
from typing import Final

from portero_py.wire.message import Fields

#: Characters of a mark, base64url.
MARK_LENGTH: Final = 32

_MARK: Final = re.compile(rb'"?([0-9A-Za-z_-]{%d})~' % MARK_LENGTH)
#: What lets a shared cache keep a response.
_SHARED: Final = re.compile(rb"(?:public|s-maxage *= *\"?[0-9]*\"?)", re.IGNORECASE)


class Cookie:
    """Finds the cookie of one name in the fields of requests, and changes it there."""

    __slots__ = ("_crumb", "_marked", "_name")

    def __init__(self, name: bytes) -> None:
        crumb = rb"((?:\A|;)\s*%b\s*=" % re.escape(name)
        self._name = name
        self._crumb = re.compile(crumb + rb"([^;]*))")
        self._marked = re.compile(crumb + rb'\s*"?)[0-9A-Za-z_-]{%d}~' % MARK_LENGTH)

    def value(self, fields: Fields) -> bytes:
        """Return its first value, or b""."""
        found = self.values(fields, 1)
        return found[0] if found else b""

    def values(self, fields: Fields, most: int) -> list[bytes]:
        """Return its values, so many at most."""
        name = self._name
        found: list[bytes] = []
        for key, value in fields:
            if len(key) == 6 and name in value and key.lower() == b"cookie":
                for crumb in self._crumb.finditer(value):
                    if len(found) == most:
                        return found
                    found.append(crumb[2].strip())
        return found

    def taken_out(self, fields: Fields) -> Fields:
        """Return `fields` without it; the same list when it is not there. An empty Cookie field goes too."""
        return self._changed(fields, self._crumb, b"")

    def unmarked(self, fields: Fields) -> Fields:
        """Return `fields` with it as the application set it; the same list when it has no mark."""
        return self._changed(fields, self._marked, rb"\1")

    # Private

    def _changed(self, fields: Fields, pattern: re.Pattern[bytes], put: bytes) -> Fields:
        name = self._name
        changed: Fields | None = None
        for place, (key, value) in enumerate(fields):
            left = value
            if len(key) == 6 and name in value and key.lower() == b"cookie":
                left, count = pattern.subn(put, value)
                if count:
                    if changed is None:
                        changed = fields[:place]
                    if not put:
                        left = left.lstrip(b"; \t")
                    if not left:
                        continue
            if changed is not None:
                changed.append((key, left))
        return fields if changed is None else changed


def mark_of(value: bytes) -> bytes:
    """Return the mark of a cookie's value, or b""."""
    found = _MARK.match(value)
    return b"" if found is None else found[1]


def is_set(value: bytes, name: bytes) -> bool:
    """Say whether a Set-Cookie field of this value sets the cookie `name`."""
    return _is_named(value.partition(b";")[0], name)


def marked(value: bytes, mark: bytes) -> bytes:
    """Return the value of a Set-Cookie field with a mark before the cookie's value, if that is not empty."""
    start = value.index(b"=") + 1
    while value[start : start + 1] in (b" ", b"\t"):
        start += 1
    if value[start : start + 1] == b'"':
        start += 1
    if value[start : start + 1] in (b"", b";", b'"'):
        return value  # it is being deleted
    return b"%b%b~%b" % (value[:start], mark, value[start:])


def private(fields: Fields) -> Fields:
    """Return `fields` so that no shared cache keeps the response: it is one client's (RFC 9111, 7.3).

    A cache that finds a field for its kind goes by that alone (RFC 9213, 2.1): those go.
    """
    kept: Fields = []
    is_private = False
    for name, value in fields:
        lowered = name.lower()
        if lowered == b"cache-control":
            directives = [each.strip() for each in value.split(b",")]
            said = [each.lower() for each in directives]
            if b"no-store" in said or b"private" in said:
                is_private = True
            left = [each for each in directives if each and _SHARED.fullmatch(each) is None]
            if left:
                kept.append((name, b", ".join(left) if len(left) < len(directives) else value))
        elif not lowered.endswith(b"-cache-control") and lowered != b"surrogate-control":
            kept.append((name, value))
    if not is_private:
        kept.append((b"Cache-Control", b"private"))
    return kept


# Private


def _is_named(crumb: bytes, name: bytes) -> bool:
    key, equals, _ = crumb.partition(b"=")
    return bool(equals) and key.strip() == name
