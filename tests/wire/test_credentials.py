"""Names and passwords in an Authorization field."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.wire.credentials import MAX_VALUE, basic


def encoded(text: bytes) -> bytes:
    return b"Basic " + base64.b64encode(text)


def test_name_and_password_are_split_at_the_first_colon() -> None:
    assert basic([(b"authorization", encoded(b"ann:a:b"))]) == (b"ann", b"a:b")
    assert basic([(b"Authorization", b"bAsIc  " + base64.b64encode(b":"))]) == (b"", b"")
    assert basic([(b"Accept", b"*/*"), (b"AUTHORIZATION", encoded("ånn:pässword".encode()))]) == (
        "ånn".encode(),
        "pässword".encode(),
    )


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [b"Basic"],
        [b"Basic !!!"],
        [b"Bearer abc"],
        [encoded(b"no colon")],
        [encoded(b"ann:x") + b"junk!"],
        [encoded(b"ann:x"), encoded(b"ann:x")],
        [encoded(b"ann:" + b"x" * MAX_VALUE)],
    ],
)
def test_anything_else_is_none(values: list[bytes]) -> None:
    assert basic([(b"Authorization", value) for value in values]) is None


@given(st.binary(max_size=64))
def test_no_value_raises(value: bytes) -> None:
    found = basic([(b"Authorization", b"Basic " + value)])
    assert found is None or len(found) == 2
