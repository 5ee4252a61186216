"""What kind of answer a client likes best: its Accept fields (RFC 9110, 12.5.1) against what is offered.

Of two kinds that it likes as much, the one that it named itself goes before one that only a wildcard covers,
and the one that it named first before the other. Where it says nothing of either, the first offer is it.
Who accepts nothing that is offered gets the first offer too: an answer that it did not want says more than
none (RFC 9110, 12.4.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

#: Ranges that are looked at: no client names more, and nobody shall have us sort thousands.
MAX_RANGES: Final = 32


def preferred(accept: Iterable[bytes], offers: Sequence[Sequence[bytes]]) -> int:
    """The index of the offer that a client with these values of Accept likes best.

    An offer has one or more lower-case media types that mean the same to us, `b"text/html"` say.
    """
    ranges = _ranges(accept)
    best, liked = 0, (0.0, 0, 0)
    for index, names in enumerate(offers):
        like = max(_like(name, ranges) for name in names)
        if like > liked:
            best, liked = index, like
    return best


# Private


def _ranges(accept: Iterable[bytes]) -> list[tuple[bytes, float]]:
    """Media range and quality, in the client's order; what cannot be read is left out."""
    found = []
    for part in b",".join(accept).split(b",", MAX_RANGES)[:MAX_RANGES]:
        name, *parameters = (piece.strip().lower() for piece in part.split(b";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith(b"q="):
                quality = _quality(parameter[2:])
        if name:
            found.append((name, quality))
    return found


def _quality(value: bytes) -> float:
    """Between 0 and 1; 0 for what is no number."""
    try:
        quality = float(value)
    except ValueError:
        return 0.0
    return quality if 0.0 <= quality <= 1.0 else 0.0


def _like(name: bytes, ranges: list[tuple[bytes, float]]) -> tuple[float, int, int]:
    """How much a media type is liked: quality, closeness of the range that says so, its place."""
    family = name[: name.index(b"/")] + b"/*"
    closest, found = 0, (0.0, 0, 0)
    for place, (each, quality) in enumerate(ranges):
        closeness = 3 if each == name else 2 if each == family else 1 if each == b"*/*" else 0
        if closeness > closest:
            closest, found = closeness, (quality, closeness, -place)
    return found if found[0] else (0.0, 0, 0)
