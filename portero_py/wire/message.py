"""The one message vocabulary of the proxy, whatever the HTTP version on either side.

Fields are pairs of bytes, in the order received. Names keep the case in which they came (HTTP/2 names
are lower-case by definition); whoever compares them lowers them. Values carry no surrounding white
space. A head's `fields` hold end-to-end fields only: Host, the hop-by-hop fields and Transfer-Encoding
have been taken out by the parser; Content-Length stays in and is known to agree with `body_length`.
"""

from __future__ import annotations

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
    body_length    number of bytes, or CHUNKED
    expects_continue  the client waits for a 100 before it sends its body
    upgrade        the protocol that the client wants to switch to (b"websocket"), or b""
    wants_trailers the client said "TE: trailers"
    """

    __slots__ = (
        "authority",
        "body_length",
        "expects_continue",
        "fields",
        "method",
        "target",
        "upgrade",
        "version",
        "wants_trailers",
    )

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
        upgrade: bytes = b"",
        wants_trailers: bool = False,
    ) -> None:
        self.method = method
        self.target = target
        self.authority = authority
        self.version = version
        self.fields = fields
        self.body_length = body_length
        self.expects_continue = expects_continue
        self.upgrade = upgrade
        self.wants_trailers = wants_trailers


class ResponseHead:
    """A response without its body.

    status       100..599
    phrase       the reason phrase as the backend sent it; HTTP/2 drops it
    fields       see the module
    body_length  number of bytes that follow, CHUNKED or UNTIL_CLOSE; 0 for HEAD, 204 and 304 whatever
                 Content-Length says
    upgrade      the protocol that a 101 switches to, or b""
    """

    __slots__ = ("body_length", "fields", "phrase", "status", "upgrade")

    def __init__(
        self, status: int, phrase: bytes, fields: Fields, body_length: int = 0, *, upgrade: bytes = b""
    ) -> None:
        self.status = status
        self.phrase = phrase
        self.fields = fields
        self.body_length = body_length
        self.upgrade = upgrade
