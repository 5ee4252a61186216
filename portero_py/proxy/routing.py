"""What a route does to a request beside naming its service: another target, or a redirect.

A redirect never leaves the place that its author wrote: what `$uri` stands for begins with one slash, so that
a request for `//elsewhere` is no host name in the answer.
"""

from __future__ import annotations

from time import time
from typing import TYPE_CHECKING, Final

from portero_py.proxy.replies import http_date, phrase_of
from portero_py.wire.message import RequestHead, ResponseHead, request_with

if TYPE_CHECKING:
    from portero_py.core.routes import Route

#: Tells a backend what was stripped.
PREFIX: Final = b"X-Forwarded-Prefix"


def stripped(head: RequestHead, path: str) -> RequestHead:
    """`head`, whose target begins with `path`, as the backend gets it: without that."""
    prefix = path.encode().rstrip(b"/")
    rest = head.target[len(prefix) :]
    return request_with(head, [*head.fields, (PREFIX, prefix)], rest if rest[:1] == b"/" else b"/" + rest)


def redirect(route: Route, head: RequestHead, request_id: bytes) -> tuple[ResponseHead, bytes]:
    """The response of a route that redirects."""
    uri = b"/" + head.target.lstrip(b"/") if head.target != b"*" else b"/"
    location = route.redirect.encode().replace(b"$uri", uri)
    if location[0] == 0x2F:
        # "//" and "/\\", which is the same to browsers, begin another host's name, and a client chose it.
        location = b"/" + location.lstrip(b"/\\")
    phrase = phrase_of(route.status)
    body = f"{route.status} {phrase}\n".encode()
    fields = [
        (b"Location", location),
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Date", http_date(time())),
        (b"X-Request-ID", request_id),
    ]
    if head.method == b"HEAD":
        body = b""
    return ResponseHead(route.status, phrase.encode(), fields, len(body)), body
