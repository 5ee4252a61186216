"""What a CA answers, made into plain values; or a typed error, for problems and for whatever is no ACME.

A reply is a stranger's: every field is checked for its type and its length before anything is done with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import requests

from portero_py.core.acme import faults
from portero_py.core.acme.names import WILDCARD
from portero_py.errors import AcmeError, BadCaReply, CaRefused, CaUnreachable

MAX_URL: Final = 2048
#: More than any order of `acme_names.MAX_NAMES` names has.
_MAX_LIST: Final = 200

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Order:
    """RFC 8555, 7.1.3. `error` is what the CA says about an order that is "invalid", or None."""

    url: str
    status: str
    authorizations: tuple[str, ...]
    finalize: str
    certificate: str
    error: AcmeError | None
    retry_after: float


@dataclass(frozen=True, slots=True)
class Challenge:
    """RFC 8555, 7.1.5. `error` is why it failed, or None."""

    kind: str
    url: str
    token: str
    status: str
    error: AcmeError | None


@dataclass(frozen=True, slots=True)
class Authorization:
    """RFC 8555, 7.1.4: what has to be shown for one name, which is a wildcard as it was ordered."""

    url: str
    name: str
    status: str
    challenges: tuple[Challenge, ...]
    retry_after: float


@dataclass(frozen=True, slots=True)
class RenewalInfo:
    """RFC 9773, 4.2: the window (epoch seconds), the CA's explanation or "", and its Retry-After."""

    start: float
    end: float
    why: str
    retry_after: float


def checked(reply: requests.Response) -> requests.Response:
    """The reply itself when it is a good one. Raises the error that it is otherwise."""
    if 200 <= reply.status_code < 300:
        return reply
    retry_after = _retry_after(reply)
    try:
        document = document_of(reply)
    except BadCaReply:
        document = {}
    problem, detail = document.get("type"), document.get("detail")
    if isinstance(problem, str) and faults.kind_of(problem):
        raise _fault(document, retry_after)
    said = f"status {reply.status_code}" + (f", {detail[:200]}" if isinstance(detail, str) else "")
    if reply.status_code in {429, 503} or reply.status_code >= 500:
        raise CaUnreachable(f"the CA cannot serve at the moment: {said}", retry_after)
    raise CaRefused(f"the CA refused: {said}", retry_after)


def _fault(
    document: Mapping[str, Any], retry_after: float = 0.0, *, of_validation: bool = False, challenge: str = ""
) -> AcmeError:
    """The error of a problem document; of several in one (RFC 8555, 6.7.1) the first counts."""
    parts = document.get("subproblems")
    if isinstance(parts, list) and parts and isinstance(parts[0], dict) and "type" in parts[0]:
        document = {**document, **parts[0]}
    problem, detail = document.get("type"), document.get("detail")
    return faults.fault(
        str(problem or ""), str(detail or ""), retry_after, of_validation=of_validation, challenge=challenge
    )


def order(url: str, reply: requests.Response) -> Order:
    """An order's document. Raises BadCaReply."""
    document = document_of(reply)
    authorizations = _list(document, "authorizations")
    if not all(isinstance(each, str) for each in authorizations):
        raise BadCaReply("the CA's order lists something that is no authorization")
    error = document.get("error")
    certificate = document.get("certificate", "")
    return Order(
        url=url,
        status=_text(document, "status"),
        authorizations=tuple(authorizations),
        finalize=_text(document, "finalize"),
        certificate=certificate if isinstance(certificate, str) else "",
        error=_fault(error, of_validation=True) if isinstance(error, dict) else None,
        retry_after=_retry_after(reply),
    )


def _challenge(document: object) -> Challenge:
    if not isinstance(document, dict):
        raise BadCaReply("the CA's authorization lists something that is no challenge")
    error, token = document.get("error"), document.get("token", "")
    kind = _text(document, "type")
    return Challenge(
        kind=kind,
        url=_text(document, "url"),
        token=token if isinstance(token, str) else "",
        status=_text(document, "status"),
        error=_fault(error, of_validation=True, challenge=kind) if isinstance(error, dict) else None,
    )


def document_of(reply: requests.Response) -> dict[str, Any]:
    """The JSON object that a reply is. Raises BadCaReply."""
    try:
        document = json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        raise BadCaReply(f"the CA's reply is no JSON (status {reply.status_code})") from error
    if not isinstance(document, dict):
        raise BadCaReply("the CA's reply is no JSON object")
    return document


def _text(document: Mapping[str, Any], name: str) -> str:
    found = document.get(name)
    if not isinstance(found, str) or len(found) > MAX_URL:
        raise BadCaReply(f"the CA's reply has no usable {name}")
    return found


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    found = document.get(name)
    if not isinstance(found, list) or len(found) > _MAX_LIST:
        raise BadCaReply(f"the CA's reply has no usable {name}")
    return found


def location(reply: requests.Response) -> str:
    """Where what was made can be found. Raises BadCaReply."""
    url = reply.headers.get("Location", "")
    if not url:
        raise BadCaReply("the CA's reply has no Location")
    return str(url)


def _retry_after(reply: requests.Response) -> float:
    """Seconds (RFC 9110, 10.2.3), 0.0 when there are none."""
    said = reply.headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    return _or_nothing(lambda: max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0), 0.0)


def _moment(said: str) -> float:
    """RFC 3339 as epoch seconds."""
    found = _or_nothing(lambda: datetime.fromisoformat(said), None)
    if found is None or found.tzinfo is None:
        raise BadCaReply("the CA's renewal window has no usable times")
    return found.timestamp()


def _or_nothing(read: Callable[[], _Found], otherwise: _Found) -> _Found:
    try:
        return read()
    except (ValueError, TypeError, OverflowError):
        return otherwise


def authorization(url: str, reply: requests.Response) -> Authorization:
    """An authorization's document. Raises BadCaReply."""
    document = document_of(reply)
    identifier = document.get("identifier")
    if not isinstance(identifier, dict):
        raise BadCaReply("an authorization of the CA is for no name")
    name = _text(identifier, "value").lower()
    if document.get("wildcard") is True:
        name = f"{WILDCARD}{name}"
    return Authorization(
        url=url,
        name=name,
        status=_text(document, "status"),
        challenges=tuple(_challenge(each) for each in _list(document, "challenges")),
        retry_after=_retry_after(reply),
    )


def renewal_info(reply: requests.Response) -> RenewalInfo:
    """A renewal window. Raises BadCaReply."""
    document = document_of(reply)
    window = document.get("suggestedWindow")
    if not isinstance(window, dict):
        raise BadCaReply("the CA's renewal information has no window")
    start, end = _moment(_text(window, "start")), _moment(_text(window, "end"))
    if end <= start:
        raise BadCaReply("the CA's renewal window ends before it begins")
    why = document.get("explanationURL", "")
    why = why if isinstance(why, str) and why.isprintable() else ""
    return RenewalInfo(start, end, why[:MAX_URL], _retry_after(reply))
