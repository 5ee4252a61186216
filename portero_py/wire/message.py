"""The one message vocabulary of the proxy, whatever the HTTP version on either side.

Fields are pairs of bytes, in the order received. Names keep the case in which they came (HTTP/2 names
are lower-case by definition); whoever compares them lowers them. Values carry no surrounding white
space. A head's `fields` hold end-to-end fields only: Host, the hop-by-hop fields and Transfer-Encoding
have been taken out by the parser; Content-Length stays in, once, in our own spelling, and is known to agree
with `body_length`.
One exception: a 426 must say what to upgrade to, so its `fields` have Upgrade, with the Connection that goes
before it. HTTP/2 drops both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

Field = tuple[bytes, bytes]
Fields = list[Field]

#: The body ends with a last chunk or END_STREAM: its length is not known beforehand.
CHUNKED: Final = -1
#: The body ends when the backend closes the connection (HTTP/1 responses only).
UNTIL_CLOSE: Final = -2


class RequestHead:
    """A request without its body.

    method         b"GET"; case-sensitive
    target         origin-form (b"/path?query"), or b"*" for OPTIONS
    authority      the Host field or :authority as received; b"" when an HTTP/1.0 client sent none
    version        b"1.0", b"1.1" or b"2"
    fields         see the module
    forwarded      the X-Forwarded-* and X-Request-ID fields as received: not in `fields`, because only
                   those of a trusted proxy may go on
    body_length    number of bytes, or CHUNKED
    expects_continue  the client waits for a 100 before it sends its body
    keep_alive     the client's connection may be used again (HTTP/1)
    upgrade        the protocol that the client wants to switch to (b"websocket"), or b""
    wants_trailers the client said "TE: trailers"
    lines          the lines of an HTTP/1 head behind Host, once somebody has made them

    What few requests have is a class attribute until it is set: one store less each for all the others.
    """

    forwarded: Sequence[Field] = ()
    body_length = 0
    expects_continue = False
    keep_alive = True
    upgrade = b""
    wants_trailers = False
    lines: bytes | None = None

    def __init__(
        self,
        method: bytes,
        target: bytes,
        authority: bytes,
        version: bytes,
        fields: Fields,
        body_length: int = 0,
        *,
        expects_continue: bool = False,
        forwarded: Sequence[Field] = (),
        wants_trailers: bool = False,
    ) -> None:
        self.method = method
        self.target = target
        self.authority = authority
        self.version = version
        self.fields = fields
        if body_length:
            self.body_length = body_length
        if expects_continue:
            self.expects_continue = True
        if forwarded:
            self.forwarded = forwarded
        if wants_trailers:
            self.wants_trailers = True


class ResponseHead:
    """A response without its body. Nobody changes one: heads that were parsed before are shared.

    status       100..999; RFC 9110, 15 defines those below 600, and applications send the others all the same
    phrase       the reason phrase as the backend sent it; HTTP/2 drops it
    fields       see the module
    body_length  number of bytes that follow, CHUNKED or UNTIL_CLOSE; 0 for HEAD, 204 and 304 whatever
                 Content-Length says
    upgrade      the protocol that a 101 switches to, or b""
    lines        the status line and `fields` as the lines of an HTTP/1 head, once somebody has made them
    """

    lines = b""

    def __init__(
        self, status: int, phrase: bytes, fields: Fields, body_length: int = 0, *, upgrade: bytes = b""
    ) -> None:
        self.status = status
        self.phrase = phrase
        self.fields = fields
        self.body_length = body_length
        self.upgrade = upgrade


def request_with(head: RequestHead, fields: Fields, target: bytes = b"") -> RequestHead:
    """`head`, which may be shared, with other fields and, where it is given, another target."""
    other = RequestHead(
        head.method,
        target or head.target,
        head.authority,
        head.version,
        fields,
        head.body_length,
        expects_continue=head.expects_continue,
        forwarded=head.forwarded,
        wants_trailers=head.wants_trailers,
    )
    other.keep_alive = head.keep_alive
    if head.upgrade:
        other.upgrade = head.upgrade
    return other


def response_with(head: ResponseHead, fields: Fields) -> ResponseHead:
    """`head`, which may be shared, with other fields."""
    return ResponseHead(head.status, head.phrase, fields, head.body_length, upgrade=head.upgrade)
