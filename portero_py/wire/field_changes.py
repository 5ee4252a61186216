"""Header fields that an operator removes, sets and adds, on the way of a message.

Removed and set are all fields by that name, in any spelling of case; then those that are set follow, then
those that are added. What frames and routes a message is not among them: whoever reads the configuration
sees to that.

Most messages have the same fields as many others (`wire/http1` and `wire/http2` remember them, and share one
list). What came out of such a list is remembered under its identity, with the list itself, so that no other
one can be taken for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from portero_py.wire.message import Field, Fields

#: Lists whose result is remembered.
MEMO_SIZE: Final = 256


class Changes:
    """The changes of one service in one direction. `remove` holds names, `put` and `add` whole fields."""

    __slots__ = ("_added", "_gone", "_known")

    def __init__(
        self, remove: Sequence[bytes] = (), put: Sequence[Field] = (), add: Sequence[Field] = ()
    ) -> None:
        self._gone = frozenset([name.lower() for name in remove] + [name.lower() for name, _ in put])
        self._added: Fields = [*put, *add]
        self._known: dict[int, tuple[Fields, Fields]] = {}

    def __bool__(self) -> bool:
        return bool(self._gone or self._added)

    def of(self, fields: Fields) -> Fields:
        """What becomes of `fields`, which stay as they are: another list, which nobody may change."""
        known = self._known.get(id(fields))
        if known is not None:
            return known[1]
        gone = self._gone
        changed = [field for field in fields if field[0].lower() not in gone]
        changed += self._added
        if len(self._known) >= MEMO_SIZE:
            self._known.clear()
        self._known[id(fields)] = fields, changed
        return changed
