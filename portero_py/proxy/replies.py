"""The responses that portero itself writes: short text, or JSON for a client that asks for it.

What a halted service says is for the people who use it: a page for those who look at one.
"""

from __future__ import annotations

from html import escape
from http import HTTPStatus
from time import gmtime, time
from typing import Final

import orjson

from portero_py.errors import (
    ExchangeError,
    NoBackend,
    PorteroError,
    ServiceHalted,
    TooManyLogins,
    Unauthorized,
    UnderMaintenance,
)
from portero_py.wire.accept import preferred
from portero_py.wire.message import Fields, RequestHead, ResponseHead

#: The same while an operator works on a service, and has not said for how long.
MAINTENANCE_RETRY_AFTER: Final = b"60"
#: Seconds after which a client may try again when no backend can take its request: backends register and
#: renew within seconds, and a longer wait would outlive most redeployments.
RETRY_AFTER: Final = b"2"

# Addresses of backends, and what went wrong there, are for the log and not for strangers.
_OPAQUE: Final = {
    502: "the backend could not be reached, or broke off its answer, or gave none that is valid",
    504: "the backend took too long",
}
_KINDS: Final = ((b"text/plain",), (b"text/html",), (b"application/json", b"application/problem+json"))
_TEXT, _HTML, _JSON = range(len(_KINDS))
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{status} {phrase}</title>
</head>
<body>
<h1>{phrase}</h1>
<p>{detail}</p>
</body>
</html>
"""
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}

# Not strftime's, which speaks the language of the locale; and `email.utils` is a megabyte of other modules.
_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def http_date(seconds: float) -> bytes:
    """Return a Date field's value (RFC 9110, 5.6.7) for a time in epoch seconds."""
    at = gmtime(seconds)
    day, month = _DAYS[at.tm_wday], _MONTHS[at.tm_mon - 1]
    clock = f"{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"
    return f"{day}, {at.tm_mday:02} {month} {at.tm_year:04} {clock} GMT".encode()


def phrase_of(status: int) -> str:
    """Return the reason phrase of a status."""
    return _PHRASES.get(status, "Error")


def reply(error: PorteroError, head: RequestHead | None, request_id: bytes) -> tuple[ResponseHead, bytes]:
    """Return the response that tells a client about `error`; `head` is its request, if there was one.

    The text is the status, its phrase and the error's one line, or less of it when the fault is a backend's.
    The body is empty for HEAD.
    """
    detail = _OPAQUE.get(error.status) or str(error)
    phrase = phrase_of(error.status)
    kind = _kind(error, head)
    if isinstance(error, UnderMaintenance) and error.page and kind != _JSON:
        content_type = error.content_type.encode()
        body = error.page.encode()
    elif kind == _JSON:
        content_type = b"application/problem+json"
        body = orjson.dumps(
            {
                "title": phrase,
                "status": error.status,
                "detail": detail,
                "reason": error.reason,
                "request_id": request_id.decode("latin-1"),
            }
        )
    elif kind == _HTML:
        content_type = b"text/html; charset=utf-8"
        body = _PAGE.format(status=error.status, phrase=phrase, detail=escape(detail)).encode()
    else:
        content_type = b"text/plain; charset=utf-8"
        body = f"{error.status} {phrase}: {detail}\n".encode()
    fields: Fields = [
        (b"Content-Type", content_type),
        (b"Content-Length", b"%d" % len(body)),
        (b"Cache-Control", b"no-store"),
        (b"Date", http_date(time())),
        (b"X-Request-ID", request_id),
    ]
    wait = error.retry_after if isinstance(error, ExchangeError) else 0
    if wait:
        fields.append((b"Retry-After", b"%d" % wait))
    elif isinstance(error, UnderMaintenance):
        fields.append((b"Retry-After", MAINTENANCE_RETRY_AFTER))
    elif isinstance(error, (NoBackend, TooManyLogins)):
        fields.append((b"Retry-After", RETRY_AFTER))
    if isinstance(error, Unauthorized):
        realm = error.realm.replace("\\", "\\\\").replace('"', '\\"').encode()
        fields.append((b"WWW-Authenticate", b'Basic realm="%b", charset="UTF-8"' % realm))
    if error.status == 405:
        fields.append((b"Allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"))
    if head is not None and head.method == b"HEAD":
        body = b""
    return ResponseHead(error.status, phrase.encode(), fields, len(body)), body


# Private


def _kind(error: PorteroError, head: RequestHead | None) -> int:
    if head is None:
        return _TEXT
    accept = [value for name, value in head.fields if name.lower() == b"accept"]
    if isinstance(error, ServiceHalted):
        return preferred(accept, _KINDS)
    return _JSON if any(b"json" in value.lower() for value in accept) else _TEXT
