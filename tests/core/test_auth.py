"""Who may register, and who has to wait."""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

import jwt
import pytest

from portero_py.core.auth import (
    CLOCK_TOLERANCE,
    Claim,
    FailureLimiter,
    TokenVerifier,
    check_secret,
    check_service,
    sign_token,
)
from portero_py.errors import (
    ConfigError,
    RateLimited,
    SecretMissing,
    SecretWrong,
    TokenAlgorithm,
    TokenExpired,
    TokenMalformed,
    TokenMismatch,
    TokenMissing,
)

NOW = 1_700_000_000.0
KEY = "k" * 32
OTHER_KEY = "o" * 32


def bearer(claims: object, key: str = KEY, **header: Any) -> str:
    """A well-signed token by RFC 7515's book, whatever it says."""
    header = {"alg": "HS256", **header}
    parts = [base64url(json.dumps(part).encode()) for part in (header, claims)]
    signature = hmac.digest(key.encode(), ".".join(parts).encode(), "sha256")
    return "Bearer " + ".".join([*parts, base64url(signature)])


def base64url(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def claims(**more: Any) -> dict[str, Any]:
    return {"service_name": "app.example", "exp": NOW + 60, **more}


# The secret


def test_the_right_secret_is_right() -> None:
    check_secret("s\u00e9same", "s\u00e9same")
    check_secret("\udcff", "\udcff")  # a header whose bytes were no UTF-8


def test_a_missing_secret_is_another_error_than_a_wrong_one() -> None:
    with pytest.raises(SecretMissing):
        check_secret(None, "sesame")
    for wrong in ("", "sesam", "sesame ", "Sesame"):
        with pytest.raises(SecretWrong):
            check_secret(wrong, "sesame")


def test_an_empty_secret_lets_nobody_in() -> None:
    with pytest.raises(SecretWrong):
        check_secret("", "")


# Tokens


def test_a_signed_token_proves_its_service_until_it_expires() -> None:
    verifier = TokenVerifier([("", KEY)])
    token = sign_token("App.Example", KEY, "", 60, NOW)
    assert verifier.verify(f"Bearer {token}", NOW + 59) == Claim("app.example")
    assert verifier.verify(f"  bearer   {token} ", NOW) == Claim("app.example")
    with pytest.raises(TokenExpired):
        verifier.verify(f"Bearer {token}", NOW + 60)


def test_a_token_is_an_ordinary_jwt() -> None:
    token = sign_token("app.example", KEY, "2024", 60, NOW, audience="edge", issuer="deploy")
    assert jwt.get_unverified_header(token) == {"alg": "HS256", "typ": "JWT", "kid": "2024"}
    read = jwt.decode(
        token, KEY, algorithms=["HS256"], audience="edge", issuer="deploy", options={"verify_exp": False}
    )
    assert read == {
        "service_name": "app.example",
        "iat": int(NOW),
        "exp": int(NOW) + 60,
        "aud": "edge",
        "iss": "deploy",
    }
    assert "kid" not in jwt.get_unverified_header(sign_token("app.example", KEY, "", 60, NOW))


def test_a_short_key_signs_as_any_library_would() -> None:
    token = sign_token("app.example", "short", "", 60, NOW)
    key_of_the_others = "short" + "\0" * 27  # RFC 2104: the same key
    jwt.decode(token, key_of_the_others, algorithms=["HS256"], options={"verify_exp": False})
    assert TokenVerifier([("", "short")]).verify(f"Bearer {token}", NOW) == Claim("app.example")


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer  ", "Basic YTpi", "token"])
def test_no_bearer_token_is_a_missing_token(authorization: str | None) -> None:
    with pytest.raises(TokenMissing):
        TokenVerifier([("", KEY)]).verify(authorization, NOW)


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer x",
        "Bearer a.b.c",
        "Bearer \u00e9.\u00e9.\u00e9",
        "Bearer \udcff.x.y",
        bearer(claims()) + "x",
        bearer(claims(), OTHER_KEY),
        bearer(claims(), kid=7),
        bearer([]),
        bearer("text"),
        bearer({"service_name": "app.example"}),
        bearer(claims(exp=None)),
        bearer(claims(exp="tomorrow")),
        bearer(claims(exp=True)),
        bearer(claims(nbf="now")),
        bearer(claims(nbf=NOW + CLOCK_TOLERANCE + 1)),
        bearer({"exp": NOW + 60}),
        bearer(claims(service_name=None)),
        bearer(claims(service_name="not a name")),
        bearer(claims(service_name=["app.example"])),
        bearer(claims(), crit=["b64"], b64=False),
    ],
)
def test_a_token_that_proves_nothing_is_malformed(authorization: str) -> None:
    with pytest.raises(TokenMalformed):
        TokenVerifier([("", KEY)]).verify(authorization, NOW)


def test_a_payload_that_is_no_json_is_malformed() -> None:
    token = jwt.PyJWS().encode(b"\xff{", KEY, algorithm="HS256")
    with pytest.raises(TokenMalformed):
        TokenVerifier([("", KEY)]).verify(f"Bearer {token}", NOW)


def test_broken_base64_in_the_payload_is_malformed() -> None:
    head, _, signature = sign_token("app.example", KEY, "", 60, NOW).split(".")
    with pytest.raises(TokenMalformed):
        TokenVerifier([("", KEY)]).verify(f"Bearer {head}.a.{signature}", NOW)


def test_a_required_feature_that_nobody_knows_makes_a_token_malformed() -> None:
    with pytest.raises(TokenMalformed):
        TokenVerifier([("", KEY)]).verify(bearer(claims(), crit=["new"], new=1), NOW)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512", "RS256", "none", "", "hs256", None, 256])
def test_only_hs256_is_believed(algorithm: str) -> None:
    with pytest.raises(TokenAlgorithm):
        TokenVerifier([("", KEY)]).verify(bearer(claims(), alg=algorithm), NOW)


def test_a_token_without_any_algorithm_is_refused() -> None:
    header = base64url(b'{"typ":"JWT"}')
    with pytest.raises(TokenAlgorithm):
        TokenVerifier([("", KEY)]).verify(f"Bearer {header}.e30.AAAA", NOW)


def test_a_clock_that_is_a_little_ahead_is_forgiven_for_the_start_only() -> None:
    verifier = TokenVerifier([("", KEY)])
    assert verifier.verify(bearer(claims(nbf=NOW + CLOCK_TOLERANCE)), NOW) == Claim("app.example")
    with pytest.raises(TokenExpired):
        verifier.verify(bearer(claims(exp=NOW - 0.5)), NOW)


def test_audience_and_issuer_count_when_they_are_configured() -> None:
    verifier = TokenVerifier([("", KEY)], audience="edge", issuer="deploy")
    for audience in ("edge", ["other", "edge"]):
        assert verifier.verify(bearer(claims(aud=audience, iss="deploy")), NOW) == Claim("app.example")
    wrong: list[dict[str, Any]] = [
        {},
        {"aud": "other", "iss": "deploy"},
        {"aud": [], "iss": "deploy"},
        {"aud": "edge"},
    ]
    wrong.append({"aud": "edge", "iss": "somebody"})
    for some in wrong:
        with pytest.raises(TokenMismatch):
            verifier.verify(bearer(claims(**some)), NOW)
    assert TokenVerifier([("", KEY)]).verify(bearer(claims(aud="x", iss="y")), NOW) == Claim("app.example")


def test_keys_are_chosen_by_their_name_while_they_are_changed() -> None:
    verifier = TokenVerifier([("old", KEY), ("new", OTHER_KEY)])
    for kid, key in (("old", KEY), ("new", OTHER_KEY), ("", KEY), ("", OTHER_KEY)):
        token = sign_token("app.example", key, kid, 60, NOW)
        assert verifier.verify(f"Bearer {token}", NOW) == Claim("app.example")
    for kid, key in (("old", OTHER_KEY), ("unknown", KEY)):
        token = sign_token("app.example", key, kid, 60, NOW)
        with pytest.raises(TokenMalformed):
            verifier.verify(f"Bearer {token}", NOW)


def test_an_unnamed_key_takes_tokens_whatever_their_kid() -> None:
    token = sign_token("app.example", KEY, "somebody's own", 60, NOW)
    assert TokenVerifier([("", OTHER_KEY), ("", KEY)]).verify(f"Bearer {token}", NOW) == Claim("app.example")


def test_a_token_serves_its_own_service_only() -> None:
    check_service(Claim("app.example"), "app.example")
    with pytest.raises(TokenMismatch):
        check_service(Claim("app.example"), "other.example")


@pytest.mark.parametrize("key", ["", "-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----"])
def test_what_cannot_be_a_secret_key_is_refused_at_start(key: str) -> None:
    with pytest.raises(ConfigError):
        TokenVerifier([("", key)])
    with pytest.raises(ConfigError):
        sign_token("app.example", key, "", 60, NOW)


def test_a_verifier_without_keys_cannot_be_made() -> None:
    with pytest.raises(ConfigError):
        TokenVerifier([])


def test_no_token_is_signed_for_what_is_no_name() -> None:
    with pytest.raises(ConfigError):
        sign_token("not a name", KEY, "", 60, NOW)


# The brake


def fail(limiter: FailureLimiter, peer: str, now: float) -> None:
    limiter.check(peer, now)
    limiter.failed(peer, now)


def test_a_peer_may_fail_some_times_at_once_and_then_now_and_then() -> None:
    limiter = FailureLimiter(burst=3, interval=10.0)
    for _ in range(3):
        fail(limiter, "192.0.2.7", 100.0)
    with pytest.raises(RateLimited) as caught:
        limiter.check("192.0.2.7", 100.0)
    assert caught.value.retry_after == 10
    with pytest.raises(RateLimited) as caught:
        limiter.check("192.0.2.7", 105.5)
    assert caught.value.retry_after == 5
    fail(limiter, "192.0.2.7", 110.0)
    with pytest.raises(RateLimited):
        limiter.check("192.0.2.7", 110.0)
    for _ in range(3):  # long afterwards all is forgiven
        fail(limiter, "192.0.2.7", 1000.0)


def test_peers_do_not_pay_for_each_other() -> None:
    limiter = FailureLimiter(burst=1, interval=10.0)
    fail(limiter, "192.0.2.7", 0.0)
    fail(limiter, "192.0.2.8", 0.0)
    fail(limiter, "a unix socket", 0.0)
    fail(limiter, "2001:db8:0:1::1", 0.0)
    fail(limiter, "2001:db8:0:2::1", 0.0)


def test_one_network_or_one_host_by_two_spellings_is_one_peer() -> None:
    limiter = FailureLimiter(burst=1, interval=10.0)
    fail(limiter, "2001:db8::1", 0.0)
    fail(limiter, "::ffff:192.0.2.7", 0.0)
    for same in ("2001:db8::ffff:1", "192.0.2.7"):
        with pytest.raises(RateLimited):
            limiter.check(same, 0.0)


def test_only_so_many_peers_are_remembered() -> None:
    limiter = FailureLimiter(burst=1, interval=10.0, max_peers=2)
    for peer in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
        fail(limiter, peer, 0.0)
    assert len(limiter) == 2
    limiter.check("192.0.2.1", 0.0)
    with pytest.raises(RateLimited):
        limiter.check("192.0.2.2", 0.0)
