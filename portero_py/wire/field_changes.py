"""Header fields that an operator removes, sets and adds, on the way of a message.

Removed and set are all fields by that name, in any spelling of case; then those that are set follow, then
those that are added. What frames and routes a message is not among them: whoever reads the configuration
sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence

from portero_py.wire.message import Field, Fields


class Changes:
    """The changes of one service in one direction. `remove` holds names, `put` and `add` whole fields."""

    __slots__ = ("_added", "_gone")

    def __init__(
        self, remove: Sequence[bytes] = (), put: Sequence[Field] = (), add: Sequence[Field] = ()
    ) -> None:
        self._gone = frozenset([name.lower() for name in remove] + [name.lower() for name, _ in put])
        self._added: Fields = [*put, *add]

    def __bool__(self) -> bool:
        return bool(self._gone or self._added)

    def of(self, fields: Fields) -> Fields:
        """What becomes of `fields`, which stay as they are: another list."""
        gone = self._gone
        changed = [field for field in fields if field[0].lower() not in gone]
        changed += self._added
        return changed
