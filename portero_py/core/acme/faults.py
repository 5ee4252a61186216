"""What a CA complains of (RFC 8555, 6.7), in plain words, with what to do about it."""

from __future__ import annotations

from typing import Final

from portero_py.core.acme.schedule import DNS_01
from portero_py.errors import (
    AcmeError,
    AlreadyReplaced,
    CaRateLimited,
    CaRefused,
    OrderLost,
    ValidationFailed,
)

_PREFIX: Final = "urn:ietf:params:acme:error:"

#: Most of what is passed on of a CA's own words.
MAX_DETAIL: Final = 400

#: Problems of a validation: what was found when the CA came to look.
_OF_VALIDATION: Final = {
    "connection": "the CA could not connect: is the name's address this machine, and the port open to all?",
    "dns": "the CA could not look the name up: does it have an A or AAAA record that leads here?",
    "unknownHost": "the CA could not look the name up: does it have an A or AAAA record that leads here?",
    "dnssec": "the name's DNSSEC records are broken: mend them at the DNS provider",
    "tls": "the CA reached port 443, but not this server: what else ends TLS for this name?",
    "incorrectResponse": "another server answered: does every A and AAAA record of the name lead here?",
    "unauthorized": "another server answered: does every A and AAAA record of the name lead here?",
}
#: The same where the CA looked for a TXT record.
_OF_DNS: Final = {
    "dns": "the CA could not look the TXT record up: do all servers of the zone answer everybody?",
    "unauthorized": "the CA did not find the TXT record: do all servers of the zone have it?",
    "incorrectResponse": "the CA did not find the TXT record: do all servers of the zone have it?",
}
_OTHERS: Final = {
    "caa": "the name's CAA record forbids this CA: add the CA to it, or remove the record",
    "rejectedIdentifier": "the CA does not sign this name: it is on its list of refusals, or no public name",
    "unsupportedIdentifier": "the CA does not sign names of this kind",
    "externalAccountRequired": "the CA must know the account: set --acme-eab-kid and --acme-eab-hmac-file",
    "accountDoesNotExist": "the CA does not know the account any more: a new one is made",
    "unauthorized": "the CA does not let this account do that",
    "invalidContact": "the CA does not take the e-mail address: see --acme-email",
    "unsupportedContact": "the CA does not take the e-mail address: see --acme-email",
    "userActionRequired": "the CA's terms have changed: read them at the address it gives",
    "badRevocationReason": "the CA does not take this reason",
    "alreadyRevoked": "it was revoked before",
    "serverInternal": "the CA has a fault: it is tried again",
}


def kind_of(problem: str) -> str:
    """The last word of a problem's type, "" when it is none of ACME's."""
    return problem.removeprefix(_PREFIX) if problem.startswith(_PREFIX) else ""


def fault(
    problem: str,
    detail: str,
    retry_after: float = 0.0,
    *,
    of_validation: bool = False,
    challenge: str = "",
) -> AcmeError:
    """The error for a problem document: its `type`, its `detail`, and the reply's Retry-After in seconds.

    `of_validation`: it is in a challenge or an order, and not the answer to a request; some words mean
    something else there. `challenge` is the type of the challenge.
    """
    kind = kind_of(problem)
    said = "".join(c if c.isprintable() else " " for c in detail)[:MAX_DETAIL].strip() or kind or "no reason"
    if kind == "rateLimited":
        return CaRateLimited(f"the CA's rate limit is reached ({said})", retry_after)
    if kind == "alreadyReplaced":
        return AlreadyReplaced(f"the CA says that the certificate was replaced already ({said})", retry_after)
    if of_validation and kind in _OF_VALIDATION:
        meaning = (_OF_DNS if challenge == DNS_01 else _OF_VALIDATION).get(kind) or _OF_VALIDATION[kind]
        return ValidationFailed(f"validation failed: {meaning} ({said})", retry_after)
    advice = _OTHERS.get(kind)
    words = f"{advice} ({said})" if advice else f"the CA refused: {said}"
    return CaRefused(words, retry_after, kind)


def lost(said: str) -> OrderLost:
    """The error for an order that the CA does not know, or has ended."""
    return OrderLost(f"the CA has given the order up ({said[:MAX_DETAIL]}): a new one is made")
