"""The set of pending challenges."""

from __future__ import annotations

from portero_py.core.challenges import Challenges


def test_an_empty_set_is_false() -> None:
    assert not Challenges(7)
    assert Challenges(1, {"a.example": (b"chain", b"key")})
    assert Challenges(1, http={"token": "token.thumbprint"})


def test_no_key_is_shown() -> None:
    assert "secret" not in repr(Challenges(1, {"a.example": (b"chain", b"secret")}, {"t": "secret"}))
