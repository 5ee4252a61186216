"""Fields that an operator removes, sets and adds."""

from __future__ import annotations

from portero_py.wire.field_changes import MEMO_SIZE, Changes
from portero_py.wire.message import Fields

FIELDS: Fields = [(b"Accept", b"*/*"), (b"x-debug", b"1"), (b"X-Env", b"test"), (b"x-env", b"again")]


def test_what_is_removed_and_set_goes_in_any_case_and_what_is_set_and_added_follows() -> None:
    changes = Changes([b"X-Debug"], [(b"X-Env", b"prod")], [(b"Accept", b"text/html")])
    before = list(FIELDS)
    assert changes.of(FIELDS) == [(b"Accept", b"*/*"), (b"X-Env", b"prod"), (b"Accept", b"text/html")]
    assert before == FIELDS


def test_a_list_that_comes_again_is_not_changed_again_and_none_is_taken_for_another() -> None:
    changes = Changes(put=[(b"A", b"1")])
    first = changes.of(FIELDS)
    assert changes.of(FIELDS) is first
    for number in range(MEMO_SIZE + 1):
        fields = [(b"B", b"%d" % number)]
        assert changes.of(fields) == [*fields, (b"A", b"1")]
    assert changes.of(FIELDS) == first


def test_no_changes_are_false() -> None:
    assert not Changes()
    assert Changes(remove=[b"A"])
    assert Changes(add=[(b"A", b"")])
