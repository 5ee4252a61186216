"""Another server says whether a request may go on, as Traefik's forwardAuth and Caddy's forward_auth ask it.

It is asked by a GET of its own, without the request's body, with the request's fields (or those that are
named) and what says which request it is about: X-Forwarded-Method, -Proto, -Host, -Uri and -For. A 2xx lets
the request go on, with those fields of the answer that are named; everything else is what the client gets,
whole: a redirect to a login, a 401, a 403.

The rules
- A field that is taken from the answer is never the client's: it is removed from the request, whether the
  answer has it or not.
- The fields that say which request it is about are ours, whatever the client sent under their names.
- An answer is bounded in time and bytes. Without one the request is refused: a server that is down lets
  nobody in.
- Its connections are kept in a pool of the gate's own, which ends with the gate.
- Strangers do not fill the log with its failures: one line in QUIET seconds.
"""

from __future__ import annotations

import logging
import math
from time import monotonic
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from portero_py.core.model import Backend
from portero_py.errors import AuthTimeout, AuthUnreachable
from portero_py.proxy.endpoints import ResponseSide
from portero_py.proxy.gates.gate import Asking, Gate
from portero_py.wire.field_changes import Changes
from portero_py.wire.headers import REQUEST_KINDS, underscored
from portero_py.wire.message import RequestHead, ResponseHead

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from portero_py.core.model import Lease
    from portero_py.core.policies import ForwardAuth
    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import Gated, Upstream
    from portero_py.proxy.upstream.pool import BackendPool, Connecting, Pools
    from portero_py.wire.message import Fields

#: The most of an answer's body that is passed on.
MOST_BYTES: Final = 256 << 10

#: Seconds between two lines in the log that one server cannot be asked.
QUIET: Final = 10.0

#: What says which request it is about, beside the forwarded fields that every backend gets.
_METHOD: Final = b"X-Forwarded-Method"
_URI: Final = b"X-Forwarded-Uri"
_OURS: Final = frozenset({b"x-forwarded-method", b"x-forwarded-uri"})
#: Fields of a request that are about its body, which is not sent, or about a part or a state of what is asked
#: for: the server that is asked would answer 304 or 412 for something of its own.
_NOT_SHOWN: Final = frozenset(
    {
        *(b"content-length", b"content-type", b"content-encoding", b"content-range"),
        *(b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"if-range", b"range"),
    }
)

_log = logging.getLogger(__name__)


class Authority(Gate):
    """The server that one service asks. `close` at its end."""

    __slots__ = (
        "_host",
        "_pool",
        "_quiet_until",
        "_replaced",
        "_shown",
        "_target",
        "_unsaid",
        "_wanted",
        "auth",
        "loop",
        "timeout",
    )

    def __init__(self, auth: ForwardAuth, service: str, pools: Pools) -> None:
        self.auth = auth
        self.loop = pools.loop
        self.timeout = auth.timeout
        url = urlsplit(auth.url)
        is_tls = url.scheme == "https"
        host = url.hostname or ""
        backend = Backend(host, url.port or (443 if is_tls else 80), use_tls=is_tls)
        self._pool = pools.apart(service, backend, host if is_tls else "")
        self._host = url.netloc.rpartition("@")[2].encode()
        self._target = ((url.path or "/") + (f"?{url.query}" if url.query else "")).encode()
        self._shown = frozenset(name.lower().encode() for name in auth.request_headers)
        names = [name.lower().encode() for name in auth.response_headers]
        # What frames or routes the request, or is ours, no other server has a say in.
        names = [name for name in names if name not in REQUEST_KINDS]
        self._wanted = frozenset(names)
        #: With underscores they reach many applications under the same name.
        self._quiet_until = -math.inf
        self._unsaid = 0
        self._replaced = [spelling for name in names for spelling in (name, *underscored(name))]

    def admit(self, exchange: Gated, now: float) -> Asking | None:
        """Ask about `exchange`."""
        question = Question(self, exchange, self._question(exchange.head, exchange.bare_fields()), now)
        # Not at once: who is asking has not heard yet that there is a question.
        self.loop.call_soon(question.begin, self._pool)
        return question.asking

    def passed_on(self, answer: ResponseHead) -> Changes | None:
        """How an answer changes the request."""
        if not self._wanted:
            return None
        return Changes(self._replaced, [each for each in answer.fields if each[0].lower() in self._wanted])

    def failed(self, error: PorteroError) -> None:
        """Say in the log that there was no answer, unless it was said just now."""
        now = monotonic()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more were left out)" if self._unsaid else ""
        self._quiet_until, self._unsaid = now + QUIET, 0
        _log.warning("%s: %s%s", self._pool.service, error, more)

    def close(self) -> None:
        """Close its connections."""
        self._pool.close_idle()

    # Private

    def _question(self, head: RequestHead, received: Fields) -> RequestHead:
        fields: Fields = []
        for name, value in received:
            lower = name.lower()
            if lower in _NOT_SHOWN or lower.replace(b"_", b"-") in _OURS:
                continue
            if not self._shown or lower in self._shown:
                fields.append((name, value))
        fields += [(_METHOD, head.method), (_URI, head.target)]
        return RequestHead(b"GET", self._target, self._host, b"1.1", fields)


class Pending(Asking):
    """What the exchange holds of a question."""

    __slots__ = ("_question",)

    def __init__(self, question: Question) -> None:
        self._question = question

    def give_up(self) -> None:
        """The exchange is over."""
        self._question.give_up()


class Question(ResponseSide):
    """One request to the server, about one exchange."""

    _connecting: Connecting | None = None
    _is_over = False
    _tries = 0
    _answer: ResponseHead | None = None

    def __init__(self, gate: Authority, about: Gated, head: RequestHead, now: float) -> None:
        self.peer = about.peer
        self.head = head
        self.started = now
        self.request_id = about.request_id
        self.asking = Pending(self)
        self._gate = gate
        self._about = about
        self._upstream: Upstream | None = None
        self._body = bytearray()
        self._timer: asyncio.TimerHandle = gate.loop.call_later(gate.timeout, self._late)

    def begin(self, pool: BackendPool) -> None:
        """Ask, over an idle connection or a new one."""
        if self._is_over:
            return
        self._pool = pool
        self._tries += 1
        try:
            upstream = pool.take(monotonic(), retriable=True) if self._tries == 1 else None
            if upstream is None:
                self._connecting = pool.connect(self)
            else:
                self._send(upstream)
        except Exception:
            self.broke()

    def give_up(self) -> None:
        """Nobody wants to know any more."""
        self._is_over = True
        self._timer.cancel()
        if self._connecting is not None:
            self._connecting.give_up()
            self._connecting = None
        if self._upstream is not None:
            upstream, self._upstream = self._upstream, None
            upstream.abort()

    # What the pool and the upstream call

    def upstream_ready(self, upstream: Upstream) -> None:
        """A connection is ours."""
        self._connecting = None
        self._send(upstream)

    def connect_failed(self, error: PorteroError) -> None:
        """There is nobody to ask."""
        self._connecting = None
        self._fail(AuthUnreachable(f"the server of forward_auth cannot be asked: {error}"))

    def connect_cancelled(self, error: PorteroError) -> None:
        """No connection will be made any more."""
        self.connect_failed(error)

    def backends_fell(self, fallen: Mapping[tuple[str, str], Lease]) -> None:
        """It is no backend."""

    def body_refused(self, data: bytes) -> None:
        """There is no body."""

    def upstream_failed(self, error: PorteroError, *, reused: bool, silent: bool, unsent: bool) -> None:
        """The connection broke: an idle one may have been stale, so a new one is tried."""
        self._upstream = None
        if reused and silent and self._tries == 1 and not self._is_over:
            self.begin(self._pool)
        else:
            self._fail(AuthUnreachable(f"the server of forward_auth gave no answer: {error}"))

    def upstream_timed_out(self, error: PorteroError) -> None:
        """It took too long."""
        self._upstream = None
        self._fail(AuthTimeout(f"the server of forward_auth took too long: {error}"))

    def upstream_paused(self) -> None:
        """The head is all that there is to send."""

    def upstream_resumed(self) -> None:
        """As `upstream_paused`."""

    def response_informational(self, head: ResponseHead) -> None:
        """Not the answer."""

    def response_head(self, head: ResponseHead) -> None:
        """The answer's head."""
        self._answer = head

    def response(self, head: ResponseHead, body: bytes, now: float) -> None:
        """The whole answer."""
        self._upstream = None
        self._answer = head
        self._body += body
        self._answered()

    def response_body(self, data: bytes) -> None:
        """Some of its body."""
        if self._is_over:
            return
        self._body += data
        if len(self._body) > MOST_BYTES:
            upstream, self._upstream = self._upstream, None
            if upstream is not None:
                upstream.abort()
            if self._answer is not None and 200 <= self._answer.status < 300:
                self._answered()
            else:
                self._fail(AuthUnreachable(f"the answer of forward_auth is over {MOST_BYTES} bytes"))

    def response_end(self, trailers: Fields | None) -> None:
        """The answer is complete."""
        self._upstream = None
        self._answered()

    def flush(self) -> None:
        """Nothing was held back."""

    def tunnel_half_closed(self) -> bool:
        """There is no tunnel."""
        return False

    def broke(self) -> None:
        """A fault of our own: the exchange goes with it."""
        if not self._is_over:
            self.give_up()
            self._about.broke()

    # Private

    def _send(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.upstream_started = monotonic()
        about = self._about
        forwarded = self.peer.forwarding.fields(about.head.authority, about.head.forwarded)
        upstream.send_head(self, self.head, forwarded, self.request_id)

    def _late(self) -> None:
        seconds = self._gate.timeout
        self._fail(AuthTimeout(f"the server of forward_auth did not answer within {seconds:g} s"))

    def _fail(self, error: PorteroError) -> None:
        if self._is_over:
            return
        self.give_up()
        self._gate.failed(error)
        try:
            self._about.gate_closed(error)
        except Exception:
            self._about.broke()

    def _answered(self) -> None:
        if self._is_over:
            return
        self.give_up()
        answer, about = self._answer, self._about
        assert answer is not None
        try:
            if 200 <= answer.status < 300:
                about.gate_opened(self._gate.passed_on(answer))
            else:
                about.answer(*_as_response(answer, bytes(self._body), about.head.method))
        except Exception:
            about.broke()


# Private


def _as_response(answer: ResponseHead, body: bytes, method: bytes) -> tuple[ResponseHead, bytes]:
    """The answer as the client gets it, whose request may have had another method."""
    fields = [field for field in answer.fields if field[0].lower() != b"content-length"]
    if answer.status not in (204, 304):
        fields.append((b"Content-Length", b"%d" % len(body)))
    if method == b"HEAD" or answer.status in (204, 304):
        body = b""
    return ResponseHead(answer.status, answer.phrase, fields, len(body)), body
