"""Secret, token and brake together: may this request to the registration API go on?

The rules
- The secret comes first, then the token; the first that fails names the error.
- Failures are counted per peer. A peer that has used them up gets `RateLimited` for every further failure.
- Right credentials pass all the same: a broken agent must not keep its neighbours behind one address from
  renewing their leases. That costs no safety, because a peer past its limit learns nothing of either half
  (answer and work are the same for each wrong pair), so it would have to guess both at once.
- Reading needs the secret only, so there the limit holds for right and wrong alike.
"""

from __future__ import annotations

from portero_py.core.auth import Claim, FailureLimiter, TokenVerifier, check_secret
from portero_py.errors import AuthError, RateLimited


class Admission:
    """Decides on credentials. `now` is any steady clock's, `wall_now` seconds since the epoch."""

    def __init__(self, secret: str, verifier: TokenVerifier, limiter: FailureLimiter | None = None) -> None:
        self._secret = secret
        self._verifier = verifier
        self._limiter = FailureLimiter() if limiter is None else limiter

    def to_register(
        self, peer: str, secret: str | None, authorization: str | None, *, now: float, wall_now: float
    ) -> Claim:
        """What a request with these header values may register. Raises AuthError (see `core.auth`)."""
        failure: AuthError | None = None
        try:
            check_secret(secret, self._secret)
        except AuthError as error:
            failure = error
        try:
            claim = self._verifier.verify(authorization, wall_now)
        except AuthError as error:
            failure = failure or error
        if failure is None:
            return claim
        raise self._counted(failure, peer, now)

    def to_read(self, peer: str, secret: str | None, *, now: float) -> None:
        """Return when a request with this header may read the registry. Raises AuthError."""
        self._limiter.check(peer, now)
        try:
            check_secret(secret, self._secret)
        except AuthError as error:
            raise self._counted(error, peer, now) from None

    # Private

    def _counted(self, failure: AuthError, peer: str, now: float) -> AuthError:
        """Count a failure; returns what to raise for it."""
        try:
            self._limiter.check(peer, now)
        except RateLimited as limited:
            return limited
        self._limiter.failed(peer, now)
        return failure
