"""From decoded HTTP/2 header lists to heads: what is malformed is refused here, and goes no further.

RFC 9113, 8.2 and 8.3: a malformed message is a stream error. portero forwards to HTTP/1, where CR, LF, a
space in the path or a second Host is a second request, so this is stricter than the RFC where HTTP/1 needs
it: no control byte in a value but TAB, no authority beyond host and port, no fragment, schemes http and https
only.

Names and values are checked all at once: joined with LF, and every allowed byte deleted. What is left must be
exactly the separators, which also catches an LF inside a value. 0.4 µs for ten fields.
"""

from __future__ import annotations

import re
from typing import Final

from portero_py.errors import BadRequest, HeadTooLarge, TargetTooLong
from portero_py.wire.framing import request_body_length
from portero_py.wire.headers import EXPECT, FORWARDED, HOST, LENGTH, REQUEST_KINDS, TE, is_authority
from portero_py.wire.http2_hpack import CONNECTION_SPECIFIC, HeaderList
from portero_py.wire.message import CHUNKED, Fields, RequestHead


class HeadLimits:
    """What a request's head may measure: bytes of its target, of its list (RFC 9113, 6.5.2), fields."""

    __slots__ = ("list_bytes", "list_fields", "target_bytes")

    def __init__(self, target_bytes: int, list_bytes: int, list_fields: int) -> None:
        self.target_bytes = target_bytes
        self.list_bytes = list_bytes
        self.list_fields = list_fields


def read_request(received: HeaderList, limits: HeadLimits, *, ends: bool) -> RequestHead:
    """Return the head that `received` means; `ends` says that no body follows.

    Raises BadRequest when it is malformed, HeadTooLarge or TargetTooLong when it is merely too much.
    """
    pseudo: dict[bytes, bytes] = {}
    regular = len(received)
    for position, (name, value, _) in enumerate(received):
        if name[:1] != b":":
            regular = position
            break
        if name not in _PSEUDO or name in pseudo:
            raise BadRequest("unknown or repeated pseudo-header")
        pseudo[name] = value
    _check(received, regular, limits)
    kept: Fields = []
    cookies: list[bytes] = []
    lengths: list[bytes] = []
    forwarded: Fields = []
    host: bytes | None = None
    expects_continue = wants_trailers = False
    kind_of = _KINDS.get
    for name, value, _ in received[regular:]:
        kind = kind_of(name)
        if kind is None:
            kept.append((name, value))
        elif kind == _COOKIE:
            cookies.append(value)
        elif kind == LENGTH:
            lengths.append(value)
            kept.append((name, value))
        elif kind == FORWARDED:
            forwarded.append((name, value))
        elif kind == HOST:
            if host is not None:
                raise BadRequest("more than one Host field")
            host = value
        elif kind == TE:
            if value.lower() != b"trailers":
                raise BadRequest("TE is not 'trailers'")
            wants_trailers = True
        elif kind == EXPECT:
            expects_continue = value.lower() == b"100-continue"
            if not expects_continue:
                kept.append((name, value))
        elif kind == _REFUSED:
            raise BadRequest("a connection-specific field")
        # else: it ends here
    if cookies:
        kept.append((b"cookie", b"; ".join(cookies)))  # RFC 9113, 8.2.3
    method, target, authority = _control_data(pseudo, host, limits)
    body_length = request_body_length(b"2", lengths, [])
    if ends:
        if body_length:
            raise BadRequest("Content-Length announces a body that does not come")
    elif not lengths:
        body_length = CHUNKED
    head = RequestHead(method, target, authority, b"2", kept)
    head.body_length = body_length
    head.forwarded = forwarded
    head.expects_continue = expects_continue and not ends
    head.wants_trailers = wants_trailers
    return head


def read_trailers(received: HeaderList, limits: HeadLimits) -> Fields:
    """Return the trailer fields in `received`. Raises BadRequest, and HeadTooLarge over the limits."""
    _check(received, 0, limits)
    for name, _, _ in received:
        if name in _NOT_IN_TRAILERS:
            raise BadRequest("a field that no trailer may hold")
    return [(name, value) for name, value, _ in received]


# Private

_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})

_COOKIE: Final = 100
_REFUSED: Final = 101
_KINDS: Final = {**REQUEST_KINDS, b"cookie": _COOKIE, **dict.fromkeys(CONNECTION_SPECIFIC, _REFUSED)}
# As in wire/framing.py, but malformed: in HTTP/2 there is no older software that adds them.
_NOT_IN_TRAILERS: Final = CONNECTION_SPECIFIC | {b"content-length", b"host", b"te"}

_NAME_BYTES: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
_VALUE_BYTES: Final = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
# No space, control, non-ASCII byte or "#"; as in an HTTP/1 request line.
_TARGET: Final = re.compile(rb"/[\x21\x22\x24-\x7e]*")


def _check(received: HeaderList, regular: int, limits: HeadLimits) -> None:
    """Check every value, and the names from `regular` on, and the size of the whole list."""
    values = b"\n%b\n" % b"\n".join([value for _, value, _ in received])
    names = b"\n%b\n" % b"\n".join([name for name, _, _ in received[regular:]])
    if values.translate(None, _VALUE_BYTES) != b"\n" * max(len(received) + 1, 2):
        raise BadRequest("a forbidden byte in a field value")
    if b"\n " in values or b" \n" in values or b"\n\t" in values or b"\t\n" in values:
        raise BadRequest("white space around a field value")
    count = len(received) - regular
    if count and (names.translate(None, _NAME_BYTES) != b"\n" * (count + 1) or b"\n\n" in names):
        raise BadRequest("a forbidden byte in a field name")
    if len(received) > limits.list_fields:
        raise HeadTooLarge("too many header fields")
    if len(values) + len(names) + 32 * len(received) > limits.list_bytes:
        raise HeadTooLarge("the header list is too large")


def _control_data(
    pseudo: dict[bytes, bytes], host: bytes | None, limits: HeadLimits
) -> tuple[bytes, bytes, bytes]:
    """Return method, target and authority (RFC 9113, 8.3.1 and 8.5)."""
    method = pseudo.get(b":method", b"")
    if _METHOD.fullmatch(method) is None:
        raise BadRequest("no :method, or no token")
    authority = pseudo.get(b":authority")
    if authority is None:
        authority = host
    elif host is not None and host.lower() != authority.lower():
        raise BadRequest("Host does not agree with :authority")
    if authority is None or not is_authority(authority):
        raise BadRequest("no authority, or not a host name with an optional port")
    if method == b"CONNECT":
        if b":authority" not in pseudo or b":path" in pseudo or b":scheme" in pseudo:
            raise BadRequest("malformed CONNECT")
        return method, authority, authority
    if pseudo.get(b":scheme", b"").lower() not in (b"https", b"http"):
        raise BadRequest("no :scheme, or neither http nor https")
    target = pseudo.get(b":path", b"")
    if _TARGET.fullmatch(target) is None and not (target == b"*" and method == b"OPTIONS"):
        raise BadRequest("malformed :path")
    if len(target) > limits.target_bytes:
        raise TargetTooLong("the request target is too long")
    return method, target, authority
