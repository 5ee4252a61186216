"""HTTP/1 heads: bytes to RequestHead and ResponseHead, and back.

A shell collects bytes until it has a complete head (`find_head`) and has it parsed whole. This file knows the
grammar of a start line and of a field line and decides what a head means; bodies are framed by
`wire/framing.py`.

One parser of each kind serves all connections of a worker. What can one peer leave there that another gets?
- By the parsing nothing: a head is matched from its first byte to its last by expressions that keep no state.
  (llhttp, which parsed here before, keeps some: after a 1xx that promised a body it took the beginning of the
  next head, another backend's, for that body.)
- In the memory, heads. One is found only by a peer that sends the very same bytes, and it is a function of
  these bytes and of nothing else. Nobody changes a head that was parsed. Of a request's start line and of
  Host nothing is remembered: see `RequestParser`.
- No room: the memory is bounded and starts again when it is full. A peer that never repeats itself makes the
  others' heads be parsed again, for 3 to 7 µs each.

The traps
- No bare CR or LF anywhere, no obs-fold, no white space before a colon: RFC 9112, 2.2, 5.1 and 5.2, on the
  strict side.
- White space around a value is no part of it (RFC 9110, 5.5); Content-Length and Transfer-Encoding are no
  exception. Of these two, and of the version, what goes on is our own spelling and never what came.
- The expressions are possessive (++, *+): a peer chooses the text, and what does not match has to fail in
  linear time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from portero_py.errors import (
    BadRequest,
    BadResponse,
    HeadTooLarge,
    Http2Preface,
    TargetTooLong,
    VersionRefused,
    WireError,
)
from portero_py.wire.framing import request_body_length, response_body_length, response_content_length
from portero_py.wire.headers import (
    AUTHORITY,
    CODING,
    CONNECTION,
    EXPECT,
    FORWARDED,
    HOST,
    LENGTH,
    REQUEST_KINDS,
    RESPONSE_KINDS,
    TE,
    UPGRADE,
    Forwarded,
    connection_options,
    is_authority,
    without_nominated,
)
from portero_py.wire.message import CHUNKED, UNTIL_CLOSE, Field, Fields, RequestHead, ResponseHead

#: The part of HTTP/2's preface that looks like an HTTP/1 head (RFC 9113, 3.4).
PREFACE_HEAD: Final = b"PRI * HTTP/2.0\r\n\r\n"

# The request line, and Host if that is the first field, in its usual spelling, valid and not folded (what is
# remembered does not say).
_METHOD_AND_TARGET: Final = rb"([A-Za-z][!#$%&'*+\-.^_`|~0-9A-Za-z]{0,31}) ([\x21\x22\x24-\x7e]+) "
_REQUEST_START = re.compile(
    _METHOD_AND_TARGET + rb"HTTP/(1\.[0-9])\r\n(?:[Hh]ost: (" + AUTHORITY + rb")\r\n(?![ \t]))?"
)
_OTHER_VERSION = re.compile(_METHOD_AND_TARGET + rb"HTTP/[2-9]\.[0-9]\r\n")
_STATUS_LINE = re.compile(rb"HTTP/(1\.[0-9]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*+))?\r\n")
# A field line with the LF before it and without the one behind it. The second expression takes those with
# white space behind the value too, which hardly anybody sends.
_NAME_AND_VALUE: Final = rb"\n([!#$%&'*+\-.^_`|~0-9A-Za-z]++):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)"
_FIELD = re.compile(_NAME_AND_VALUE + rb"(?<![ \t])\r(?=\n)")
_PADDED_FIELD = re.compile(_NAME_AND_VALUE + rb"\r(?=\n)")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE)
# Protocols that an upgrade may not lead to: a backend that switched to them would see requests that never
# passed the checks here (h2c smuggling).
_NO_UPGRADE: Final = (b"h2c", b"h2", b"http/", b"tls/")


def find_head(buffer: bytes, request_line_limit: int, limit: int, error: type[WireError]) -> int:
    """Return the length of the head at the beginning of `buffer`, or 0 while it is not complete.

    Raises HeadTooLarge or TargetTooLong over the limits, and `error` at once for what can never become
    a head.
    """
    end = buffer.find(b"\r\n\r\n")
    if end >= 0:
        if end > limit:
            raise _too_large(buffer, request_line_limit)
        return end + 4
    if len(buffer) > limit:
        raise _too_large(buffer, request_line_limit)
    if buffer.find(b"\r\n") < 0 and len(buffer) > request_line_limit:
        raise TargetTooLong("the request line is too long")
    # A head with bare line feeds would never end here: say so now and not at the time-out.
    if buffer.count(b"\n") != buffer.count(b"\r\n") or not buffer[:1].isalpha():
        raise error("not an HTTP/1 head")
    return 0


class RequestParser:
    """Turns complete request heads into RequestHead. One for all connections of a worker.

    Clients repeat themselves: on one connection mostly the request line differs, and among thousands of hosts
    little more than Host, which nearly all clients send first. The fields of an HTTP/1.1 head that were
    parsed, checked and found good are remembered under their exact bytes: of 6 µs that saves 4.

    There are two memories, and a head is looked up in one of them only. `_known` has what came behind a valid
    Host line, without that line: no Host is in there, because two are refused. `_known_whole` has all
    fields of the heads that begin in another way: one Host is in there, because none is refused. If they
    were one, a head with two Hosts, or with none, would find its fields in it.
    """

    def __init__(self, request_line_limit: int, field_limit: int) -> None:
        self._request_line_limit = request_line_limit
        self._field_limit = field_limit
        self._known: dict[bytes, RequestHead] = {}
        self._known_whole: dict[bytes, RequestHead] = {}

    def parse(self, raw: bytes) -> RequestHead:
        """Parse one complete head, blank line included. Raises a WireError."""
        start = _REQUEST_START.match(raw)
        if start is None or start.end(3) > self._request_line_limit:
            raise _bad_request_line(raw, self._request_line_limit)
        method, target, version, host = start.groups()
        block = raw[start.end() :]
        memory = self._known_whole if host is None else self._known
        known = memory.get(block)
        if known is not None and target[0] == 0x2F and version == b"1.1" and method != b"CONNECT":
            authority = known.authority if host is None else host
            head = RequestHead(method, target, authority, version, known.fields, known.body_length)
            head.lines = known.lines
            if not known.keep_alive:
                head.keep_alive = False
            return head
        fields = _fields(raw, start.end(3) + 2, BadRequest)
        if len(fields) > self._field_limit:
            raise HeadTooLarge("too many header fields")
        if version != b"1.0":
            version = b"1.1"  # RFC 9110, 2.5: a higher minor version is the highest that we know
        head = _request_head(method, target, version, fields)
        if len(block) <= MEMO_BLOCK and version == b"1.1" and target[0] == 0x2F and _is_plain(head):
            if len(memory) >= MEMO_SIZE:
                memory.clear()
            head.lines = request_lines(head)
            memory[block] = head
        return head


class ResponseParser:
    """Turns complete response heads into ResponseHead. One for all connections of a worker.

    A busy backend sends the same head many times a second; it is remembered whole, for as long as its Date.
    """

    def __init__(self, field_limit: int) -> None:
        self._field_limit = field_limit
        self._known: dict[bytes, tuple[ResponseHead, bool]] = {}

    def parse(self, raw: bytes, method: bytes) -> tuple[ResponseHead, bool]:
        """Parse one complete head that answers a `method` request.

        Returns the head and whether the connection may be used again after the response. Raises BadResponse.
        """
        known = self._known.get(raw)
        if known is not None and method != b"HEAD":
            return known
        line = _STATUS_LINE.match(raw)
        if line is None:
            raise BadResponse("malformed status line")
        version, code, phrase = line.groups()
        status = int(code)
        fields = _fields(raw, line.end(), BadResponse)
        if len(fields) > self._field_limit:
            raise BadResponse("too many header fields")
        if version != b"1.0":
            version = b"1.1"
        head, reusable = _response_head(method, version, status, phrase or b"", fields)
        if head.body_length >= 0 and status >= 200 and len(raw) <= MEMO_BLOCK and method != b"HEAD":
            if len(self._known) >= MEMO_SIZE:
                self._known.clear()
            self._known[raw] = head, reusable
        return head, reusable


def request_bytes(head: RequestHead, forwarded: Forwarded, request_id: bytes) -> bytes:
    """Return the head of a request to a backend."""
    lines = head.lines
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%bX-Request-ID: %b\r\n\r\n" % (
        head.method,
        head.target,
        head.authority,
        request_lines(head) if lines is None else lines,
        forwarded.lines,
        request_id,
    )


def request_lines(head: RequestHead) -> bytes:
    """Return the lines of a request's head behind Host, without the proxy's own."""
    lines = [b"%b: %b\r\n" % field for field in head.fields]
    if head.body_length == CHUNKED:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if head.expects_continue:
        lines.append(b"Expect: 100-continue\r\n")
    if head.upgrade:
        lines.append(b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade)
    elif head.wants_trailers:
        lines.append(b"TE: trailers\r\nConnection: TE\r\n")
    return b"".join(lines)


def response_bytes(head: ResponseHead, extra: bytes, body: bytes = b"") -> bytes:
    """Return the head of a response to a client, and what there is of its body behind it.

    `extra` holds the connection's own field lines.
    """
    lines = head.lines
    if not lines:
        parts = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.phrase)]
        parts += [b"%b: %b\r\n" % field for field in head.fields]
        head.lines = lines = b"".join(parts)
    return b"%b%b\r\n%b" % (lines, extra, body)


# Private

#: Longest head that is remembered, and how many are.
MEMO_BLOCK: Final = 2048
MEMO_SIZE: Final = 1024

_USUAL_OPTIONS: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te"})


def _fields(raw: bytes, start: int, error: type[WireError]) -> Fields:
    """Return the fields of a complete head, whose first field line begins at `start`. Raises `error`.

    Each match takes a line whole and the LF before it; so when there are as many as there are lines, nothing
    lies between them. Measured: 2.2 µs for the 11 fields of a browser, where llhttp took 2.4.
    """
    lines = raw.count(b"\n", start) - 1
    fields: Fields = _FIELD.findall(raw, start - 1)
    if len(fields) != lines:
        fields = [(name, value.rstrip(b" \t")) for name, value in _PADDED_FIELD.findall(raw, start - 1)]
        if len(fields) != lines:
            raise error("malformed head: a line that is no header field")
    return fields


def _request_head(method: bytes, target: bytes, version: bytes, fields: list[Field]) -> RequestHead:
    kept: Fields = []
    hosts: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    connection: list[bytes] = []
    upgrades: list[bytes] = []
    forwarded: Fields = []
    expects_continue = wants_trailers = False
    kind_of = REQUEST_KINDS.get
    for field in fields:
        kind = kind_of(field[0].lower())
        if kind is None:
            kept.append(field)
        elif kind == HOST:
            hosts.append(field[1])
        elif kind == CONNECTION:
            connection.append(field[1])
        elif kind == LENGTH:
            lengths.append(field[1])
            kept.append((b"Content-Length", field[1].lstrip(b"0") or b"0"))  # if it is a number: see below
        elif kind == CODING:
            codings.append(field[1])
        elif kind == FORWARDED:
            forwarded.append(field)
        elif kind == UPGRADE:
            upgrades.append(field[1])
        elif kind == EXPECT:
            if field[1].lower() == b"100-continue":
                expects_continue = version == b"1.1"
            else:
                kept.append(field)
        elif kind == TE:
            wants_trailers = b"trailers" in field[1].lower()
        # else HOP or SPOOF: dropped
    authority, target = _authority(method, target, version, hosts)
    length = request_body_length(version, lengths, codings)
    head = RequestHead(method, target, authority, version, kept)
    head.body_length = length
    head.expects_continue = expects_continue and length != 0
    head.forwarded = forwarded
    head.wants_trailers = wants_trailers
    head.keep_alive = version == b"1.1"
    if connection:
        options = connection_options(connection)
        head.keep_alive = b"close" not in options and (version == b"1.1" or b"keep-alive" in options)
        if not options <= _USUAL_OPTIONS:
            head.fields = without_nominated(kept, options)
        if b"upgrade" in options and version == b"1.1" and length == 0:
            head.upgrade = _upgrade(upgrades)
    return head


def _is_plain(head: RequestHead) -> bool:
    """Say whether a head may be remembered: no forwarded fields, no wishes, no body but one of known length.

    A length may be: its one field is among the bytes under which the head is remembered, and
    `request_body_length` looks at nothing else but the version, which is the same for all.
    """
    return not (
        head.body_length == CHUNKED
        or head.expects_continue
        or head.forwarded
        or head.upgrade
        or head.wants_trailers
        or head.method == b"CONNECT"
    )


def _response_head(
    method: bytes, version: bytes, status: int, phrase: bytes, fields: list[Field]
) -> tuple[ResponseHead, bool]:
    kept: Fields = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    connection: list[bytes] = []
    upgrade = b""
    place = 0  # of Content-Length
    kind_of = RESPONSE_KINDS.get
    for field in fields:
        kind = kind_of(field[0].lower())
        if kind is None:
            kept.append(field)
        elif kind == LENGTH:
            if not lengths:
                place = len(kept)
                kept.append(field)
            lengths.append(field[1])
        elif kind == CONNECTION:
            connection.append(field[1])
        elif kind == CODING:
            codings.append(field[1])
        elif kind == UPGRADE:
            upgrade = field[1]
    content_length = response_content_length(lengths) if lengths else UNTIL_CLOSE
    length = response_body_length(method, status, version, content_length, codings)
    if lengths:
        kept[place] = (b"Content-Length", b"%d" % content_length)
        if status < 200 or status == 204:
            # RFC 9110, 8.6: no Content-Length here, and clients disagree on what one would mean.
            del kept[place]
    reusable = version == b"1.1"
    if connection:
        options = connection_options(connection)
        reusable = b"close" not in options and (reusable or b"keep-alive" in options)
        if not options <= _USUAL_OPTIONS:
            kept = without_nominated(kept, options)
    if status == 426 and upgrade:
        kept = [*kept, (b"Connection", b"upgrade"), (b"Upgrade", upgrade)]  # RFC 9110, 15.5.22
    if status != 101:
        upgrade = b""
    elif not upgrade or b"upgrade" not in connection_options(connection):
        raise BadResponse("a 101 that does not say what it switches to")  # RFC 9110, 15.2.2 and 7.8
    head = ResponseHead(status, phrase, kept, length, upgrade=upgrade)
    return head, reusable and length != UNTIL_CLOSE


def _authority(method: bytes, target: bytes, version: bytes, hosts: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return the authority and the target in origin-form (RFC 9112, 3.2). Raises BadRequest."""
    if len(hosts) > 1:
        raise BadRequest("more than one Host field")
    if not hosts and version == b"1.1":
        raise BadRequest("no Host field")
    host = hosts[0] if hosts else b""
    if hosts and not is_authority(host):
        raise BadRequest("the Host field is not a host name with an optional port")
    if target[0] == 0x2F:  # "/"
        return host, target
    if method == b"CONNECT":
        if not is_authority(target):
            raise BadRequest("malformed authority-form")
        return host, target
    if target == b"*":
        if method != b"OPTIONS":
            raise BadRequest("the asterisk-form is for OPTIONS only")
        return host, target
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise BadRequest("malformed request target")
    authority, rest = match.groups()
    if not is_authority(authority):
        raise BadRequest("malformed authority in the request target")
    # RFC 9112, 3.2.2 lets the target win over Host; which of the two another party believed nobody knows.
    if hosts and authority.lower() != host.lower():
        raise BadRequest("Host does not agree with the request target")
    if not rest:
        rest = b"*" if method == b"OPTIONS" else b"/"
    elif rest[0] == 0x3F:  # "?"
        rest = b"/" + rest
    return authority, rest


def _upgrade(values: list[bytes]) -> bytes:
    """Return the protocol to upgrade to, or b"" when it is not passed on."""
    if len(values) != 1:
        return b""
    wanted = values[0].lower()
    if b"," in wanted or wanted.startswith(_NO_UPGRADE):
        return b""
    return values[0]


def _bad_request_line(raw: bytes, limit: int) -> WireError:
    if raw.find(b"\r\n") > limit:
        return TargetTooLong("the request line is too long")
    if raw == PREFACE_HEAD:
        return Http2Preface("HTTP/2 on an HTTP/1 connection")
    if _OTHER_VERSION.match(raw):
        return VersionRefused("a request line with a version of HTTP other than 1.0 and 1.1")
    return BadRequest("malformed request line")


def _too_large(buffer: bytes, request_line_limit: int) -> WireError:
    line_end = buffer.find(b"\r\n")
    if line_end < 0 or line_end > request_line_limit:
        return TargetTooLong("the request line is too long")
    return HeadTooLarge("the head is too large")
