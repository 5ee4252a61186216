"""The order of the checks, and who is braked."""

from __future__ import annotations

from hashlib import sha256

import pytest

from portero_py.core.admission import Admission
from portero_py.core.auth import Claim, FailureLimiter, TokenVerifier, sign_token
from portero_py.errors import (
    AuthError,
    RateLimited,
    SecretMissing,
    SecretWrong,
    TokenAlgorithm,
    TokenMalformed,
    TokenMissing,
)

KEY = sha256(b"key").hexdigest()
WALL = 1_700_000_000.0
GOOD = "Bearer " + sign_token("app.example", KEY, "", 60, WALL)
UNSIGNED = "Bearer eyJhbGciOiJub25lIn0.e30."


def admission(burst: int = 100) -> Admission:
    return Admission("sesame", TokenVerifier([("", KEY)]), FailureLimiter(burst=burst, interval=10.0))


def ask(
    gate: Admission, secret: str | None, authorization: str | None, peer: str = "192.0.2.7", now: float = 0.0
) -> Claim:
    return gate.to_register(peer, secret, authorization, now=now, wall_now=WALL)


def test_the_right_secret_and_a_good_token_pass() -> None:
    assert ask(admission(), "sesame", GOOD) == Claim("app.example")


@pytest.mark.parametrize(
    ("secret", "authorization", "error"),
    [
        (None, None, SecretMissing),
        (None, GOOD, SecretMissing),
        ("wrong", GOOD, SecretWrong),
        ("wrong", UNSIGNED, SecretWrong),
        ("sesame", None, TokenMissing),
        ("sesame", UNSIGNED, TokenAlgorithm),
        ("sesame", "Bearer x", TokenMalformed),
    ],
)
def test_the_first_check_that_fails_names_the_error(
    secret: str | None, authorization: str | None, error: type[AuthError]
) -> None:
    with pytest.raises(error):
        ask(admission(), secret, authorization)


def test_past_the_limit_every_wrong_pair_gets_the_same_answer() -> None:
    gate = admission(burst=1)
    with pytest.raises(SecretWrong):
        ask(gate, "wrong", GOOD)
    for secret, authorization in ((None, None), ("wrong", GOOD), ("sesame", "Bearer x"), ("sesame", None)):
        with pytest.raises(RateLimited) as caught:
            ask(gate, secret, authorization, now=3.0)
        assert caught.value.retry_after == 7
    with pytest.raises(SecretWrong):  # what was refused was not counted
        ask(gate, "wrong", GOOD, now=10.0)


def test_a_broken_neighbour_does_not_lock_out_who_has_the_right_credentials() -> None:
    gate = admission(burst=1)
    with pytest.raises(SecretWrong):
        ask(gate, "wrong", GOOD)
    assert ask(gate, "sesame", GOOD) == Claim("app.example")


def test_another_peer_is_not_braked() -> None:
    gate = admission(burst=1)
    for peer in ("192.0.2.7", "192.0.2.8"):
        with pytest.raises(SecretWrong):
            ask(gate, "wrong", GOOD, peer)


def test_reading_needs_the_secret_only_and_is_braked_for_all() -> None:
    gate = admission(burst=2)
    gate.to_read("192.0.2.7", "sesame", now=0.0)
    with pytest.raises(SecretMissing):
        gate.to_read("192.0.2.7", None, now=0.0)
    with pytest.raises(SecretWrong):
        gate.to_read("192.0.2.7", "wrong", now=0.0)
    with pytest.raises(RateLimited):
        gate.to_read("192.0.2.7", "sesame", now=0.0)
    gate.to_read("192.0.2.8", "sesame", now=0.0)
    gate.to_read("192.0.2.7", "sesame", now=10.0)
