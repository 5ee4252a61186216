"""The two ends of an exchange, whatever HTTP version they speak, and the two faces that it shows them.

An exchange stands between one `Downstream` (the client's side) and one `Upstream` (the backend's side).
Each end calls the exchange when bytes come in, and the exchange calls the other end. All of it happens in
event-loop callbacks: nothing here awaits. The downstream makes the exchange and calls its `RequestSide`;
the upstream, and the pool that looks for one, know it as `ResponseSide`.

Who calls what (`x` is the exchange)
- Downstream -> exchange: `x.start()` once the head is complete, then `x.request_body(data)` any number of
  times and `x.request_end(trailers)` exactly once (not needed when the head's `body_length` is 0);
  `x.downstream_paused()` / `x.downstream_resumed()` when the client reads slower than the backend sends;
  `x.downstream_gone(error)` when the client vanished or broke the protocol. After that call, or after the
  exchange called `send_end` or `abort`, neither side calls the other again for this exchange.
- Exchange -> downstream: `send_informational*`, then `send_response`, or `send_head`, `send_body*`,
  `send_end`; or `abort` at any time.
- Exchange -> upstream: `send_head`, `send_body*`, `send_end`; or `abort`; `is_silent` at any time.
- Gates -> exchange: `x.gate_opened()`, or `x.gate_closed(error)`, or `x.answer(head, body)`.
- Queues -> exchange: `x.turn_came()`, again and again, or `x.waited_in_vain(error)`.
- Pool -> exchange: `x.upstream_ready(upstream)`, `x.connect_failed(error)` or `x.connect_cancelled(error)`.
- Moves -> exchange: `x.backends_fell(fallen)`, at any time.
- Upstream -> exchange: `x.body_refused(data)` for what comes while the connection breaks and nothing was sent
  on it yet; `x.response_informational(head)*`, then `x.response(head, body, now)` when all of it
  is at hand, else `x.response_head(head)`, `x.response_body(data)*`, `x.response_end(trailers)`; or
  `x.upstream_failed(error, ...)` or `x.upstream_timed_out(error)`; `x.upstream_paused()` /
  `x.upstream_resumed()`.
- In a tunnel each side ends by itself. The client's: `x.request_end(None)`, which is `send_end` upstream. The
  backend's: `x.tunnel_half_closed()`, which is `half_close` downstream; the exchange is over
  (`x.response_end(None)`) when the client has ended too, or at once when it cannot be told.

Backpressure: `pause_*` asks an end to stop delivering as soon as it can. What it has already read it may
still deliver; it must not read more from its socket (HTTP/1) or give back flow-control window (HTTP/2).

The faces are classes, one above the other (`Record`, `Waiting`, `Gated`, `ResponseSide`, `RequestSide`), and
none is a `typing.Protocol`: the compiled build calls a method of a class by its place and that of a protocol
by its name, and a compiled class has one base. So by its type a downstream could call what is the upstream's
to call; it has no reason to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from portero_py.wire.message import Fields, RequestHead, ResponseHead

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portero_py.core.model import Backend, Lease
    from portero_py.core.queue import Turn
    from portero_py.errors import PorteroError
    from portero_py.proxy.peer import Peer
    from portero_py.wire.field_changes import Changes
    from portero_py.wire.headers import Forwarded


class Record:
    """What is known of an exchange, for the log, the counters and its two ends.

    Class attributes are the state before anything happened: few exchanges set them all.
    """

    peer: Peer
    head: RequestHead
    started: float  # seconds of the monotonic clock
    request_id = b""
    service = ""
    lease: Lease | None = None  # the last one that was tried
    status = 0
    upstream_status = 0
    upstream_started = 0.0
    upstream_seconds = 0.0
    retries = 0
    is_at_home = False  # the client's cookie is to stay as it is (`core/stickiness`)
    bytes_in = 0
    bytes_out = 0
    error: PorteroError | None = None

    @property
    def backend(self) -> Backend | None:
        """The backend that was tried last."""
        return None if self.lease is None else self.lease.backend


class Waiting(Record):
    """The exchange, as the queue sees it in which it waits."""

    def turn_came(self) -> Turn:
        """There may be room: go on if so."""
        raise NotImplementedError

    def waited_in_vain(self, error: PorteroError) -> None:
        """There will be no room in time: it is over."""
        raise NotImplementedError

    def broke(self) -> None:
        """The last resort of whoever was calling when something of our own raised: call it in the handler.

        Whatever the exchange was doing, it is logged, counted and over, and neither end waits for it.
        """
        raise NotImplementedError


class Gated(Waiting):
    """The exchange, as the gates of its service see it (`gates/gate`)."""

    def bare_fields(self) -> Fields:
        """The request's fields as an application knows them: without what in its cookies is portero's own."""
        return self.head.fields

    def gate_opened(self, changes: Changes | None = None) -> None:
        """It may go on, to a backend with `changes`."""
        raise NotImplementedError

    def gate_closed(self, error: PorteroError) -> None:
        """It may not."""
        raise NotImplementedError

    def answer(self, head: ResponseHead, body: bytes, error: PorteroError | None = None) -> None:
        """This is the response, whole. With `error` it is counted as that."""
        raise NotImplementedError


class ResponseSide(Gated):
    """The exchange, as the upstream and the pool see it."""

    def upstream_ready(self, upstream: Upstream) -> None:
        """A connection is ours: send what there is."""
        raise NotImplementedError

    def connect_failed(self, error: PorteroError) -> None:
        """No connection could be made: the next backend, if there is one, and time."""
        raise NotImplementedError

    def connect_cancelled(self, error: PorteroError) -> None:
        """No connection will be made any more."""
        raise NotImplementedError

    def backends_fell(self, fallen: Mapping[tuple[str, str], Lease]) -> None:
        """These are DOWN now, by service and instance id: go to another one instead of waiting in vain."""
        raise NotImplementedError

    def body_refused(self, data: bytes) -> None:
        """The connection is breaking before anything was sent on it: these bytes are for the next one."""
        raise NotImplementedError

    def upstream_failed(self, error: PorteroError, *, reused: bool, silent: bool, unsent: bool) -> None:
        """The connection broke.

        `reused`: it was an idle one; `silent`: no byte of a response had come; `unsent`: no byte of the
        request had been sent.
        """
        raise NotImplementedError

    def upstream_timed_out(self, error: PorteroError) -> None:
        """The backend took too long; it may be at work still, so nothing is retried."""
        raise NotImplementedError

    def upstream_paused(self) -> None:
        """The backend reads slower than the client sends."""
        raise NotImplementedError

    def upstream_resumed(self) -> None:
        """The backend caught up."""
        raise NotImplementedError

    def response_informational(self, head: ResponseHead) -> None:
        """A 1xx response, never a 101."""
        raise NotImplementedError

    def response_head(self, head: ResponseHead) -> None:
        """The final response's head."""
        raise NotImplementedError

    def response(self, head: ResponseHead, body: bytes, now: float) -> None:
        """A whole final response at once, at time `now`; the upstream has taken care of its connection."""
        raise NotImplementedError

    def response_body(self, data: bytes) -> None:
        """Some bytes of the response's body, or of the tunnel."""
        raise NotImplementedError

    def response_end(self, trailers: Fields | None) -> None:
        """The response is complete; the upstream has taken care of its connection."""
        raise NotImplementedError

    def flush(self) -> None:
        """All that was read from the backend has been passed on."""
        raise NotImplementedError

    def tunnel_half_closed(self) -> bool:
        """The backend has closed its side of the tunnel; False when the client cannot be told so."""
        raise NotImplementedError


class RequestSide(ResponseSide):
    """The exchange, as the downstream sees it."""

    @property
    def body_idle(self) -> float:
        """For how many seconds the client may stand still in a body; known when the exchange has begun."""
        raise NotImplementedError

    @property
    def is_queued(self) -> bool:
        """Whether it waits for its turn: a client that closes its side then has given up."""
        return False

    def start(self) -> None:
        """The request's head is complete: find a backend and send it on.

        Without a body (`body_length` 0) the request is complete with its head.
        """
        raise NotImplementedError

    def request_body(self, data: bytes) -> None:
        """Some bytes of the request's body, or of the tunnel."""
        raise NotImplementedError

    def request_end(self, trailers: Fields | None) -> None:
        """The request is complete, or the client closed its side of the tunnel."""
        raise NotImplementedError

    def downstream_paused(self) -> None:
        """The client reads slower than the backend sends."""
        raise NotImplementedError

    def downstream_resumed(self) -> None:
        """The client caught up."""
        raise NotImplementedError

    def downstream_gone(self, error: PorteroError) -> None:
        """The client vanished or broke the protocol; the downstream does what is left to do for it."""
        raise NotImplementedError


class Downstream(Protocol):
    """The client's side of one exchange: an HTTP/1 connection's current request, or an HTTP/2 stream."""

    def send_informational(self, head: ResponseHead) -> None:
        """Pass a 1xx response on at once (never a 101: that is `send_head`)."""

    def send_response(self, head: ResponseHead, body: bytes) -> None:
        """Send a whole final response at once; the exchange is over for this end."""

    def send_head(self, head: ResponseHead) -> None:
        """Send the final response's head. It may wait for the first body bytes, or for `flush`."""

    def send_body(self, data: bytes) -> None:
        """Send body bytes; `data` is never empty."""

    def send_end(self, trailers: Fields | None) -> None:
        """The response is complete. The exchange is over for this end."""

    def flush(self) -> None:
        """Nothing more comes right now: let out what `send_head` and `send_body` may have held back."""

    def abort(self, error: PorteroError) -> None:
        """The response cannot be completed: make sure that the client notices, and give the exchange up."""

    def pause_body(self) -> None:
        """Stop delivering the request's body."""

    def resume_body(self) -> None:
        """Deliver the request's body again."""

    def start_tunnel(self) -> None:
        """A 101 was sent: from now on all bytes in either direction are body bytes."""

    def half_close(self) -> bool:
        """The backend's side of the tunnel has ended: tell the client, whose side goes on.

        False when this cannot be said; nothing was done then.
        """


class Upstream(Protocol):
    """The backend's side of one exchange."""

    def send_head(
        self, exchange: ResponseSide, head: RequestHead, forwarded: Forwarded, request_id: bytes
    ) -> None:
        """Begin `exchange`: send the request's head with the proxy's own fields added.

        Without a body (`body_length` 0) that is the whole request, and no `send_end` follows.
        """

    def send_body(self, data: bytes) -> None:
        """Send body bytes; `data` is never empty."""

    def send_end(self, trailers: Fields | None) -> None:
        """The request is complete."""

    def is_silent(self) -> bool:
        """Say whether no byte of a response has come, not even of an informational one."""

    def abort(self) -> None:
        """Give the exchange up. A connection that cannot be reused is closed."""

    def pause_body(self) -> None:
        """Stop delivering the response's body."""

    def resume_body(self) -> None:
        """Deliver the response's body again."""

    def start_tunnel(self) -> None:
        """The backend switched protocols: from now on all bytes in either direction are body bytes."""
