"""Fields that an operator removes, sets and adds."""

from __future__ import annotations

from portero_py.wire.field_changes import Changes
from portero_py.wire.message import Fields

FIELDS: Fields = [(b"Accept", b"*/*"), (b"x-debug", b"1"), (b"X-Env", b"test"), (b"x-env", b"again")]


def test_what_is_removed_and_set_goes_in_any_case_and_what_is_set_and_added_follows() -> None:
    changes = Changes([b"X-Debug"], [(b"X-Env", b"prod")], [(b"Accept", b"text/html")])
    before = list(FIELDS)
    assert changes.of(FIELDS) == [(b"Accept", b"*/*"), (b"X-Env", b"prod"), (b"Accept", b"text/html")]
    assert before == FIELDS


def test_no_changes_are_false() -> None:
    assert not Changes()
    assert Changes(remove=[b"A"])
    assert Changes(add=[(b"A", b"")])
