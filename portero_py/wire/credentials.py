"""Names and passwords in an Authorization field (RFC 7617)."""

from __future__ import annotations

import binascii
from typing import Final

from portero_py.wire.message import Fields

#: Longest value that is looked at: no password that bcrypt looks at is longer than 72 bytes.
MAX_VALUE: Final = 1024


def basic(fields: Fields) -> tuple[bytes, bytes] | None:
    """The name and the password that a request came with; None when there are none, two, or no valid ones."""
    values = [value for name, value in fields if name.lower() == b"authorization"]
    if len(values) != 1 or len(values[0]) > MAX_VALUE:
        return None
    scheme, _, encoded = values[0].partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        decoded = binascii.a2b_base64(encoded.strip(), strict_mode=True)
    except ValueError:
        return None
    name, colon, password = decoded.partition(b":")
    return (name, password) if colon else None
