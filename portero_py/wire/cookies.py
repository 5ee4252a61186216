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

_MARK: Final = re.compile(rb'("?)([0-9A-Za-z_-]{%d})~' % MARK_LENGTH)
#: What lets a shared cache keep a response.
_SHARED: Final = re.compile(rb"(?:public|s-maxage *= *\"?[0-9]*\"?)", re.IGNORECASE)


def cookie_value(fields: Fields, name: bytes) -> bytes:
    """Return the first value of the cookie `name`, or b""."""
    found = cookie_values(fields, name, 1)
    return found[0] if found else b""


def cookie_values(fields: Fields, name: bytes, most: int) -> list[bytes]:
    """Return the values of the cookie `name`, so many at most."""
    found = []
    for key, value in fields:
        if len(key) == 6 and name in value and key.lower() == b"cookie":
            for crumb in value.split(b";"):
                if _is_named(crumb, name):
                    found.append(crumb.partition(b"=")[2].strip())
                    if len(found) == most:
                        return found
    return found


def without_cookie(fields: Fields, name: bytes) -> Fields:
    """Return `fields` without the cookie `name`; the same list when it is not there."""
    return _changed(fields, name, is_marked=False)


def without_mark(fields: Fields, name: bytes) -> Fields:
    """Return `fields` with the cookie `name` as the application set it; the same list if it is unmarked."""
    return _changed(fields, name, is_marked=True)


def mark_of(value: bytes) -> bytes:
    """Return the mark of a cookie's value, or b""."""
    found = _MARK.match(value)
    return b"" if found is None else found[2]


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


def _changed(fields: Fields, name: bytes, *, is_marked: bool) -> Fields:
    changed: Fields | None = None
    for place, (key, value) in enumerate(fields):
        left: bytes | None = value
        if len(key) == 6 and name in value and key.lower() == b"cookie":
            left = _left_of(value, name, is_marked=is_marked)
            if left != value and changed is None:
                changed = fields[:place]
        if changed is not None and left is not None:
            changed.append((key, left))
    return fields if changed is None else changed


def _left_of(value: bytes, name: bytes, *, is_marked: bool) -> bytes | None:
    """What of a Cookie field is left; None when nothing is."""
    crumbs = value.split(b";")
    others = []
    for crumb in crumbs:
        if not _is_named(crumb, name):
            others.append(crumb)
        elif is_marked:
            others.append(_unmarked(crumb))
    if others == crumbs:
        return value
    left = b";".join(others)
    return left.strip(b" \t") if left.strip(b" \t;") else None


def _unmarked(crumb: bytes) -> bytes:
    before, _, value = crumb.partition(b"=")
    bare = value.lstrip(b" \t")
    return b"%b=%b" % (before, _MARK.sub(rb"\1", bare, count=1)) if _MARK.match(bare) else crumb
