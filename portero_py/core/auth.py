"""Who may register: a shared secret, a signed token, and a brake for those who fail.

The rules
- The secret and the token are both needed; each failure is a typed error with its own status.
- Secrets are compared in constant time, by their SHA-256, so that not even the length shows.
- Tokens are JWTs signed with HS256 and nothing else: what the token itself says about its algorithm is never
  believed. `exp` is required; `nbf` is honoured with a minute of tolerance for another machine's clock.
  `now` is seconds since the epoch, given by the caller: nothing here reads a clock.
- Several keys may be valid at once, so that they can be changed without a gap. A token with a `kid` is
  checked with that key, or with the unnamed keys when no key has that name; one without is checked with all.
- No message says anything of a secret, a key or a token's content.
"""

from __future__ import annotations

import hmac
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

import jwt
import orjson

from portero_py.core.names import normalise_service_name
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

#: Seconds by which another machine's clock may be ahead: for `nbf` only.
CLOCK_TOLERANCE: Final = 60.0

#: Failures that one peer may have at once, and the seconds after which it may have one more.
FAILURE_BURST: Final = 20
FAILURE_INTERVAL: Final = 1.0
MAX_PEERS: Final = 10_000

_ALGORITHM: Final = "HS256"
_JWS: Final = jwt.PyJWS()


def check_secret(given: str | None, expected: str) -> None:
    """Raises SecretMissing or SecretWrong unless `given` is `expected`. An empty secret is never right."""
    if given is None:
        raise SecretMissing("the X-Register-Secret header is missing")
    right = hmac.compare_digest(_digest(given), _digest(expected))
    if not (right and expected):
        raise SecretWrong("the secret in X-Register-Secret is wrong")


def sign_token(
    service_name: str,
    key: str,
    kid: str,
    ttl: float,
    now: float,
    *,
    audience: str = "",
    issuer: str = "",
) -> str:
    """A token for one service, good for `ttl` seconds from `now` (seconds since the epoch).

    `kid` names the key, "" when it has no name.

    Raises ConfigError when the key cannot be used or the service cannot be called so.
    """
    claims: dict[str, Any] = {"service_name": service_name, "iat": int(now), "exp": math.ceil(now + ttl)}
    if normalise_service_name(service_name) is None:
        raise ConfigError(f"{service_name!r} is not a host name")
    if audience:
        claims["aud"] = audience
    if issuer:
        claims["iss"] = issuer
    headers = {"typ": "JWT", **({"kid": kid} if kid else {})}
    return _JWS.encode(orjson.dumps(claims), _hmac_key(key), algorithm=_ALGORITHM, headers=headers)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a good token says: its bearer may register this service (a normalised name)."""

    service: str


class TokenVerifier:
    """Checks bearer tokens against the configured keys, audience and issuer.

    `hmac_keys` are pairs (kid or "", key). Raises ConfigError when there is none or one cannot be used.
    """

    def __init__(self, hmac_keys: Iterable[tuple[str, str]], audience: str = "", issuer: str = "") -> None:
        self._keys: dict[str, list[bytes]] = {}
        for kid, key in hmac_keys:
            self._keys.setdefault(kid, []).append(_hmac_key(key))
        if not self._keys:
            raise ConfigError("no JWT HMAC key is configured")
        self._audience = audience
        self._issuer = issuer

    def verify(self, authorization: str | None, now: float) -> Claim:
        """Check an Authorization header's value at `now`, seconds since the epoch.

        Raises TokenMissing, TokenMalformed (a bad signature too), TokenAlgorithm, TokenExpired or
        TokenMismatch (wrong audience or issuer).
        """
        claims = self._signed_claims(_bearer(authorization))
        _check_times(claims, now)
        if self._audience and self._audience not in _strings(claims.get("aud")):
            raise TokenMismatch("the token is for another audience")
        if self._issuer and claims.get("iss") != self._issuer:
            raise TokenMismatch("the token comes from another issuer")
        name = claims.get("service_name")
        service = normalise_service_name(name) if isinstance(name, str) else None
        if service is None:
            raise TokenMalformed("the token names no service: the service_name claim must be a host name")
        return Claim(service)

    # Private

    def _signed_claims(self, token: str) -> dict[str, Any]:
        if not token.isascii():
            raise TokenMalformed("the bearer token is no JWT")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError as error:
            raise TokenMalformed("the bearer token is no JWT") from error
        if header.get("alg") != _ALGORITHM:
            raise TokenAlgorithm(f"the token must be signed with {_ALGORITHM}")
        for key in self._candidates(header.get("kid")):
            try:
                claims = orjson.loads(_JWS.decode(token, key, algorithms=[_ALGORITHM]))
            except jwt.InvalidSignatureError:
                continue
            except (jwt.PyJWTError, orjson.JSONDecodeError) as error:
                raise TokenMalformed("the bearer token is no JWT") from error
            if not isinstance(claims, dict):
                raise TokenMalformed("the token's claims are no JSON object")
            return claims
        raise TokenMalformed("the token's signature matches no configured key")

    def _candidates(self, kid: object) -> list[bytes]:
        if isinstance(kid, str):
            return self._keys.get(kid) or self._keys.get("", [])
        return [key for keys in self._keys.values() for key in keys]


def check_service(claim: Claim, service: str) -> None:
    """Raises TokenMismatch unless the token was issued for `service` (normalised)."""
    if claim.service != service:
        raise TokenMismatch("the token is for another service_name")


class FailureLimiter:
    """A token bucket of failed authentications per peer.

    A peer's failures fill its bucket, time empties it: `burst` at once, then one every `interval` seconds.
    Peers are IPv4 addresses and IPv6 /64 networks (one customer has a whole /64). At most `max_peers` are
    remembered; the one that failed longest ago is forgotten first.
    """

    def __init__(
        self,
        burst: int = FAILURE_BURST,
        interval: float = FAILURE_INTERVAL,
        max_peers: int = MAX_PEERS,
    ) -> None:
        self._allowance = burst * interval  # seconds of filling that fit into a bucket
        self._interval = interval
        self._max_peers = max_peers
        self._empty_at: OrderedDict[str, float] = OrderedDict()  # peer -> when its bucket is empty again

    def __len__(self) -> int:
        return len(self._empty_at)

    def check(self, peer: str, now: float) -> None:
        """Raises RateLimited when `peer` (an IP address, or any other name) has no failure left at `now`."""
        wait = self._empty_at.get(_peer_network(peer), now) + self._interval - self._allowance - now
        if wait > 1e-6:  # what floating point leaves of nothing
            raise RateLimited("too many failed authentications from this address", math.ceil(wait))

    def failed(self, peer: str, now: float) -> None:
        """Count a failure of `peer`, which `check` let through."""
        network = _peer_network(peer)
        self._empty_at[network] = max(self._empty_at.get(network, now), now) + self._interval
        self._empty_at.move_to_end(network)
        while len(self._empty_at) > self._max_peers:
            self._empty_at.popitem(last=False)


# Private


def _digest(secret: str) -> bytes:
    return sha256(_octets(secret)).digest()


def _octets(text: str) -> bytes:
    # Header values arrive decoded with surrogateescape: bytes that are no UTF-8 come back as they were.
    return text.encode("utf-8", "surrogateescape")


def _hmac_key(key: str) -> bytes:
    """The key as pyjwt takes it without a warning. HMAC pads short keys with zeros itself (RFC 2104, 2)."""
    octets = _octets(key)
    try:
        jwt.get_algorithm_by_name(_ALGORITHM).prepare_key(octets)
    except jwt.InvalidKeyError as error:
        raise ConfigError(
            "the JWT HMAC key cannot be used: it is empty, or looks like a public key or a JWK"
        ) from error
    return octets.ljust(32, b"\0")


def _bearer(authorization: str | None) -> str:
    if authorization is None:
        raise TokenMissing("the Authorization header is missing")
    scheme, _, token = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise TokenMissing("the Authorization header holds no bearer token")
    return token.strip()


def _check_times(claims: dict[str, Any], now: float) -> None:
    expires_at = claims.get("exp")
    if expires_at is None or not _is_number(expires_at):
        raise TokenMalformed("the token has no expiry: the exp claim must be a number")
    if now >= expires_at:
        raise TokenExpired("the token has expired")
    not_before = claims.get("nbf", 0)
    if not _is_number(not_before):
        raise TokenMalformed("the token's nbf claim must be a number")
    if now + CLOCK_TOLERANCE < not_before:
        raise TokenMalformed("the token is not valid yet")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _strings(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _peer_network(peer: str) -> str:
    try:
        address = ip_address(peer)
    except ValueError:
        return peer
    if not isinstance(address, IPv6Address):
        return peer
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return address.packed[:8].hex()
