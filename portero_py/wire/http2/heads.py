"""From decoded HTTP/2 header lists to heads: what is malformed is refused here, and goes no further.

RFC 9113, 8.2 and 8.3: a malformed message is a stream error. portero forwards to HTTP/1, where CR, LF, a
space in the path or a second Host is a second request, so this is stricter than the RFC where HTTP/1 needs
it: no control byte in a value but TAB, no authority beyond host and port, no fragment, schemes http and https
only.

Names and values are checked all at once: joined with LF, and every allowed byte deleted. What is left must be
exactly the separators, which also catches an LF inside a value. What regular fields mean is kept for the
next request of the connection, which mostly has the same ones and another path
(whole core: 8 instead of 12 µs a request). No other connection finds it.
"""

from __future__ import annotations

import re
from typing import Final, Generic, TypeVar

from portero_py.errors import BadRequest, HeadTooLarge, TargetTooLong
from portero_py.wire.framing import may_trail, request_body_length
from portero_py.wire.headers import EXPECT, FORWARDED, HOST, LENGTH, REQUEST_KINDS, TE, is_authority
from portero_py.wire.http2.hpack import CONNECTION_SPECIFIC, HeaderList
from portero_py.wire.message import CHUNKED, Fields, RequestHead

#: RequestHead or ResponseHead.
Head = TypeVar("Head")


class HeadLimits:
    """What a head may measure: bytes of its target, of its list (RFC 9113, 6.5.2), fields."""

    __slots__ = ("list_bytes", "list_fields", "target_bytes")

    def __init__(self, target_bytes: int, list_bytes: int, list_fields: int) -> None:
        self.target_bytes = target_bytes
        self.list_bytes = list_bytes
        self.list_fields = list_fields


class HeadReader(Generic[Head]):
    """Reads the heads of one connection, those of requests or those of responses."""

    __slots__ = ()

    def read(self, received: HeaderList, *, ends: bool) -> Head:
        """Return the head that `received` means; `ends` says that no body follows. Nobody may change it.

        Raises WireError.
        """
        raise NotImplementedError


class RequestReader(HeadReader[RequestHead]):
    """Reads the request heads of one connection."""

    __slots__ = ("_authority", "_last", "_limits", "_regular")

    def __init__(self, limits: HeadLimits) -> None:
        self._limits = limits
        # of the last good request
        self._authority: bytes | None = None
        self._last: HeaderList = []
        self._regular = _Regular([])

    def read(self, received: HeaderList, *, ends: bool) -> RequestHead:
        """Return the head that `received` means; `ends` says that no body follows. Nobody may change it.

        Raises BadRequest when it is malformed, HeadTooLarge or TargetTooLong when it is merely too much.
        """
        pseudo: dict[bytes, bytes] = {}
        for name, value, _ in received:
            if name not in _PSEUDO:
                break
            if name in pseudo:
                raise BadRequest("a repeated pseudo-header")
            pseudo[name] = value
        fields = received[len(pseudo) :]
        if fields == self._last:
            regular = self._regular
        else:
            regular = _Regular(fields)
            self._regular = regular
            self._last = fields
        method, target, authority = self._control_data(pseudo, regular.host)
        limits = self._limits
        if len(target) > limits.target_bytes:
            raise TargetTooLong("the request target is too long")
        if len(received) > limits.list_fields:
            raise HeadTooLarge("too many header fields")
        if regular.size + len(target) + len(authority) > limits.list_bytes:
            raise HeadTooLarge("the header list is too large")
        head = RequestHead(method, target, authority, b"2", regular.kept)
        if ends:
            if regular.length > 0:
                raise BadRequest("Content-Length announces a body that does not come")
        else:
            head.body_length = regular.length
            head.expects_continue = regular.expects_continue
        if regular.forwarded:
            head.forwarded = regular.forwarded
        if regular.wants_trailers:
            head.wants_trailers = True
        return head

    # Private

    def _control_data(self, pseudo: dict[bytes, bytes], host: bytes | None) -> tuple[bytes, bytes, bytes]:
        """Return method, target and authority (RFC 9113, 8.3.1 and 8.5)."""
        method = pseudo.get(b":method", b"")
        if method not in _METHODS and _METHOD.fullmatch(method) is None:
            raise BadRequest("no :method, or no token")
        authority = pseudo.get(b":authority", host)
        if authority is None or (authority != self._authority and not is_authority(authority)):
            raise BadRequest("no authority, or not a host name with an optional port")
        if host is not None and host.lower() != authority.lower():
            raise BadRequest("Host does not agree with :authority")
        self._authority = authority
        if method == b"CONNECT":
            if b":authority" not in pseudo or b":path" in pseudo or b":scheme" in pseudo:
                raise BadRequest("malformed CONNECT")
            return method, authority, authority
        if pseudo.get(b":scheme", b"").lower() not in (b"https", b"http"):
            raise BadRequest("no :scheme, or neither http nor https")
        target = pseudo.get(b":path", b"")
        if _TARGET.fullmatch(target) is None and not (target == b"*" and method == b"OPTIONS"):
            raise BadRequest("malformed :path")
        return method, target, authority


def read_trailers(received: HeaderList, limits: HeadLimits) -> Fields:
    """Return the trailer fields that may be passed on. Raises BadRequest or HeadTooLarge."""
    size = _checked_size(received)
    if size > limits.list_bytes or len(received) > limits.list_fields:
        raise HeadTooLarge("the trailers are too large")
    for name, _, _ in received:
        if name in _FRAMING:
            raise BadRequest("a field that frames or routes in the trailers")
    return [(name, value) for name, value, _ in received if may_trail(name)]


# Private

_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
_METHODS: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"})

_COOKIE: Final = 100
_REFUSED: Final = 101
_KINDS: Final = {**REQUEST_KINDS, b"cookie": _COOKIE, **dict.fromkeys(CONNECTION_SPECIFIC, _REFUSED)}
# In HTTP/1 these are dropped from trailers; no honest HTTP/2 client puts them there.
_FRAMING: Final = CONNECTION_SPECIFIC | {b"content-length", b"host", b"te"}

_NAME_BYTES: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
_VALUE_BYTES: Final = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
# No space, control, non-ASCII byte or "#"; as in an HTTP/1 request line.
_TARGET: Final = re.compile(rb"/[\x21\x22\x24-\x7e]*")
#: What RFC 9113, 6.5.2 adds for each field, here for the pseudo-headers and their names together.
_PSEUDO_SIZE: Final = 4 * 32 + len(b":method:scheme:authority:pathGEThttps")


class _Regular:
    """What the fields behind the pseudo-headers mean. Raises BadRequest."""

    __slots__ = ("expects_continue", "forwarded", "host", "kept", "length", "size", "wants_trailers")

    def __init__(self, fields: HeaderList) -> None:
        self.size = _checked_size(fields) + _PSEUDO_SIZE
        self.kept: Fields = []
        self.forwarded: Fields = []
        self.host: bytes | None = None
        self.expects_continue = False
        self.wants_trailers = False
        cookies: list[bytes] = []
        lengths: list[bytes] = []
        kept = self.kept
        kind_of = _KINDS.get
        for name, value, _ in fields:
            kind = kind_of(name)
            if kind is None:
                kept.append((name, value))
            elif kind == _COOKIE:
                cookies.append(value)
            elif kind == LENGTH:
                lengths.append(value)
                kept.append((name, value.lstrip(b"0") or b"0"))  # if it is a number: see below
            elif kind == FORWARDED:
                self.forwarded.append((name, value))
            elif kind == HOST:
                if self.host is not None:
                    raise BadRequest("more than one Host field")
                self.host = value
            elif kind == TE:
                if value.lower() != b"trailers":
                    raise BadRequest("TE is not 'trailers'")
                self.wants_trailers = True
            elif kind == EXPECT:
                self.expects_continue = value.lower() == b"100-continue"
                if not self.expects_continue:
                    kept.append((name, value))
            elif kind == _REFUSED:
                raise BadRequest("a connection-specific field")
            # else: it ends here
        if cookies:
            kept.append((b"cookie", b"; ".join(cookies)))  # RFC 9113, 8.2.3
        self.length = request_body_length(b"2", lengths, []) if lengths else CHUNKED


def _checked_size(fields: HeaderList) -> int:
    """Check every name and value; return the size of the list (RFC 9113, 6.5.2). Raises BadRequest."""
    count = len(fields)
    if not count:
        return 0
    separators = b"\n" * (count + 1)
    names = b"\n%b\n" % b"\n".join([name for name, _, _ in fields])
    values = b"\n%b\n" % b"\n".join([value for _, value, _ in fields])
    if names.translate(None, _NAME_BYTES) != separators or b"\n\n" in names:
        raise BadRequest("a forbidden byte in a field name")
    if values.translate(None, _VALUE_BYTES) != separators:
        raise BadRequest("a forbidden byte in a field value")
    if b"\n " in values or b" \n" in values or b"\n\t" in values or b"\t\n" in values:
        raise BadRequest("white space around a field value")
    return len(names) + len(values) + 30 * count - 2
