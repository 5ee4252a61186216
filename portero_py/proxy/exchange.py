"""One request and its response: route, claim, send, relay, retry, release.

The heart of the data plane. It knows a `Downstream` and an `Upstream` (proxy/endpoints.py, where what they
may call here is said too) and never asks which HTTP version they speak. Everything happens inside event-loop
callbacks; the only wait is for a new connection.

Phases
    ROUTING -> CONNECTING -> WAITING -> RESPONDING -> DONE
    ROUTING      nothing was claimed
    CONNECTING   a lease is claimed, a connection to its backend is being made; body bytes are kept
    WAITING      the request is on its way; no byte of a final response's head was passed on
    RESPONDING   the response's head was passed on: nothing can be retried or replied any more
    DONE         released and counted; every later call is ignored

The invariants
- A claim is taken in `_try_next` and released in `_release`, nowhere else; `_release` follows from every way
  out.
- A request is sent a second time only when the backend cannot have acted on it: nothing was sent, or the
  method is idempotent, there is no body and no byte of a response came (RFC 9110, 9.2.2).
- A body byte is in one place: sent, or in `_kept_body`. What a connection refuses because it is breaking
  comes back (`body_refused`), so a request whose head was not sent yet is tried again with all of its body;
  one whose first byte was sent never is.
- A backend that fails before the head is passed on costs the client nothing while another one can serve.
  Failed connects are no retries: every lease is tried, for CONNECT_PATIENCE connect time-outs. What counts
  against MAX_RETRIES is a request that was sent.
- Nobody is left mute: a fault of our own ends the exchange at both of its ends (`broke`).
"""

from __future__ import annotations

import logging
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Final

from portero_py.errors import (
    BodyTooLarge,
    ClientGone,
    MethodRefused,
    Misdirected,
    NoBackend,
    NoSuchService,
    PorteroError,
)
from portero_py.proxy.endpoints import RequestSide
from portero_py.proxy.replies import reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portero_py.core.model import Service
    from portero_py.proxy.endpoints import Downstream, Upstream
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.proxy.upstream.pool import BackendPool, Connecting
    from portero_py.wire.message import Fields, RequestHead, ResponseHead

#: How often a request may be sent again, over all backends.
MAX_RETRIES: Final = 3
#: No other backend is tried when connecting has failed for so many connect time-outs. A refused connect takes
#: no time, so this bounds the backends that swallow packets, and how long their client waits: 12 s.
CONNECT_PATIENCE: Final = 4

_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})

_log = logging.getLogger(__name__)


class Phase(Enum):
    ROUTING = 0
    CONNECTING = 1
    WAITING = 2
    RESPONDING = 3
    DONE = 4


# Module constants: an enum member costs an attribute look-up more, several times a request.
_ROUTING, _CONNECTING, _WAITING, _RESPONDING, _DONE = Phase

#: The steps that may happen.
TRANSITIONS: Final[Mapping[Phase, frozenset[Phase]]] = {
    _ROUTING: frozenset({_CONNECTING, _WAITING, _RESPONDING, _DONE}),
    _CONNECTING: frozenset({_ROUTING, _WAITING, _RESPONDING, _DONE}),
    _WAITING: frozenset({_ROUTING, _RESPONDING, _DONE}),
    _RESPONDING: frozenset({_DONE}),
    _DONE: frozenset(),
}


class Exchange(RequestSide):
    """One request of `peer`, which came in over `downstream` with `head`."""

    # The way of the request.
    _phase = _ROUTING
    _claim: BackendPool | None = None
    _connecting: Connecting | None = None
    _excluded: set[str] | None = None  # instance ids of leases that failed
    _fresh = False  # the next try needs a new connection
    _resent = 0
    _connecting_since = 0.0  # the first of the connects that failed, or 0.0
    _body_held_up = False  # the downstream was asked to wait for a connection
    _client_behind = False  # the client reads too slowly
    _backend_behind = False  # the backend reads too slowly
    # One buffer: as a list of what a client sends in pieces of 2 bytes it would take 28 times the memory.
    _kept_body: bytearray | None = None
    _trailers: Fields | None = None

    def __init__(
        self, surroundings: Surroundings, peer: Peer, downstream: Downstream, head: RequestHead
    ) -> None:
        self._surroundings = surroundings
        self.peer = peer
        self.downstream = downstream
        self.head = head
        self.started = monotonic()
        # Not above: of a protocol, the compiled build makes no default None.
        self._upstream: Upstream | None = None
        self._request_ended = head.body_length == 0
        surroundings.counters.exchanges_in_flight += 1

    # What the downstream calls

    def start(self) -> None:
        """The request's head is complete: find a backend and send it on.

        Without a body (`body_length` 0) the request is complete with its head.
        """
        surroundings = self._surroundings
        head = self.head
        peer = self.peer
        if head.forwarded:
            self.request_id = peer.forwarding.request_id(head.forwarded) or surroundings.next_request_id()
        else:
            self.request_id = surroundings.next_request_id()
        service = surroundings.router.route(head.authority, surroundings.table)
        if service is not None:
            self.service = service.name
        if peer.certificate is not None and head.authority != peer.covered:
            if surroundings.misdirected(peer.certificate, head.authority):
                self._refuse(Misdirected("this connection presented the certificate of another host"))
                return
            peer.covered = head.authority
        if service is None:
            self._refuse(NoSuchService("no service is registered for this host"))
            return
        if head.method == b"CONNECT":
            self._refuse(MethodRefused("CONNECT is not served here"))
            return
        limit = surroundings.limits.body_bytes
        if limit and head.body_length > limit:
            self._refuse(BodyTooLarge(f"the body is over the limit of {limit} bytes"))
            return
        self._try_next(service, None, self.started)

    def request_body(self, data: bytes) -> None:
        """Some bytes of the request's body, or of the tunnel."""
        if self._phase is _DONE:
            return
        self.bytes_in += len(data)
        limit = self._surroundings.limits.body_bytes
        if limit and self.bytes_in > limit and not self.head.upgrade:
            self._refuse(BodyTooLarge(f"the body is over the limit of {limit} bytes"))
        elif self._upstream is not None:
            self._upstream.send_body(data)
        else:
            self._keep(data)

    def request_end(self, trailers: Fields | None) -> None:
        """The request is complete, or the client closed its side of the tunnel."""
        if self._phase is _DONE or (self._request_ended and not self.head.upgrade):
            return
        self._request_ended = True
        self._trailers = trailers
        if self._upstream is not None:
            self._upstream.send_end(trailers)

    def downstream_paused(self) -> None:
        """The client reads slower than the backend sends."""
        self._client_behind = True
        if self._upstream is not None:
            self._upstream.pause_body()

    def downstream_resumed(self) -> None:
        """The client caught up."""
        self._client_behind = False
        if self._upstream is not None:
            self._upstream.resume_body()

    def downstream_gone(self, error: PorteroError) -> None:
        """The client vanished or broke the protocol; the downstream does what is left to do for it."""
        if self._phase is _DONE:
            return
        self.error = error
        if self._phase is not _RESPONDING or isinstance(error, ClientGone):
            self.status = error.status
        self._give_up_upstream()
        self._finish()

    # What the upstream and the pool call

    def upstream_ready(self, upstream: Upstream) -> None:
        """A connection is ours: send what there is."""
        self._connecting = None
        self._connecting_since = 0.0
        self.upstream_started = monotonic()
        self._send(upstream)

    def connect_failed(self, error: PorteroError) -> None:
        """No connection could be made: the next backend, if there is one, and time."""
        self._connecting = None
        self._release()
        self._exclude()
        waited = monotonic() - self._connecting_since
        if waited >= CONNECT_PATIENCE * self._surroundings.timeouts.connect:
            self._refuse(error)
        else:
            self._retry(error)

    def connect_cancelled(self, error: PorteroError) -> None:
        """No connection will be made any more."""
        self._connecting = None
        self._refuse(error)

    def body_refused(self, data: bytes) -> None:
        """The connection is breaking before anything was sent on it: these bytes are for the next one."""
        self._keep(data)
        if not self._body_held_up:
            self._body_held_up = True
            self.downstream.pause_body()

    def upstream_failed(self, error: PorteroError, *, reused: bool, silent: bool, unsent: bool) -> None:
        """The connection broke.

        `reused`: it was an idle one; `silent`: no byte of a response had come; `unsent`: no byte of the
        request had been sent.
        """
        self._upstream = None
        self._backend_behind = False
        self._release()
        if self._phase is _RESPONDING:
            self.error = error
            self.downstream.abort(error)
            self._finish()
            return
        if not silent or not (unsent or self._is_repeatable()):
            self._refuse(error)
            return
        if not unsent:
            if self._resent >= MAX_RETRIES:
                self._refuse(error)
                return
            self._resent += 1
        if reused:
            # It was stale, which says nothing about the backend: the same one again, over a new connection.
            self._fresh = True
        else:
            self._exclude()
        self._retry(error)

    def upstream_timed_out(self, error: PorteroError) -> None:
        """The backend took too long; it may be at work still, so nothing is retried."""
        self._upstream = None
        self.error = error
        self._release()
        if self._phase is _RESPONDING:
            self.downstream.abort(error)
            self._finish()
        else:
            self._refuse(error)

    def upstream_paused(self) -> None:
        """The backend reads slower than the client sends."""
        self._backend_behind = True
        self.downstream.pause_body()

    def upstream_resumed(self) -> None:
        """The backend caught up."""
        self._backend_behind = False
        self.downstream.resume_body()

    def response_informational(self, head: ResponseHead) -> None:
        """A 1xx response, never a 101."""
        self.downstream.send_informational(head)

    def response_head(self, head: ResponseHead) -> None:
        """The final response's head."""
        self._phase = _RESPONDING
        self.status = self.upstream_status = head.status
        self.upstream_seconds = monotonic() - self.upstream_started
        self.downstream.send_head(head)
        if head.upgrade:
            self.downstream.start_tunnel()

    def response(self, head: ResponseHead, body: bytes, now: float) -> None:
        """A whole final response at once, at time `now`; the upstream has taken care of its connection."""
        self._phase = _RESPONDING
        self.status = self.upstream_status = head.status
        self.upstream_seconds = now - self.upstream_started
        self.bytes_out = len(body)
        self._upstream = None
        self._release()
        self.downstream.send_response(head, body)
        self._finish()

    def response_body(self, data: bytes) -> None:
        """Some bytes of the response's body, or of the tunnel."""
        self.bytes_out += len(data)
        self.downstream.send_body(data)

    def response_end(self, trailers: Fields | None) -> None:
        """The response is complete; the upstream has taken care of its connection."""
        self._upstream = None
        self._release()
        self.downstream.send_end(trailers)
        self._finish()

    def flush(self) -> None:
        """All that was read from the backend has been passed on."""
        self.downstream.flush()

    def tunnel_half_closed(self) -> bool:
        """The backend has closed its side of the tunnel; False when the client cannot be told so."""
        return self.downstream.half_close()

    def broke(self) -> None:
        """The last resort of whoever was calling when something of our own raised: call it in the handler.

        Whatever the exchange was doing, it is logged, counted and over, and neither end waits for it.
        """
        request_id = self.request_id.decode("latin-1")
        _log.exception("request %s: a fault of portero's own", request_id)
        for _ in range(2):
            if self._phase is not _DONE:
                try:
                    self._refuse(PorteroError("a fault of portero's own: see the log"))
                except Exception:  # then the other way: what could not be answered is cut off
                    _log.exception("request %s: its client could not be told", request_id)
        self._finish()

    # Private

    def _try_next(self, service: Service, error: PorteroError | None, now: float) -> None:
        """Claim a backend and send the request over an idle connection, or start to make one."""
        surroundings = self._surroundings
        lease = surroundings.balancers.pick(service, now, self._excluded or (), self.head)
        if lease is None:
            self._refuse(error or NoBackend("no backend can take the request now"))
            return
        head = self.head
        self.lease = lease
        self._claim = pool = surroundings.pools.of(lease, head.authority)
        pool.claims += 1
        if not self._fresh:
            upstream = pool.take(now, retriable=head.body_length == 0 and head.method in _IDEMPOTENT)
            if upstream is not None:
                self.upstream_started = now
                self._send(upstream)
                return
        self._phase = _CONNECTING
        if not self._connecting_since:
            self._connecting_since = now
        if head.body_length != 0:
            self._body_held_up = True
            self.downstream.pause_body()
        self._connecting = pool.connect(self)

    def _send(self, upstream: Upstream) -> None:
        head = self.head
        self._phase = _WAITING
        self._upstream = upstream
        forwarded = self.peer.forwarding.fields(head.authority, head.forwarded)
        upstream.send_head(self, head, forwarded, self.request_id)
        if self._client_behind:
            upstream.pause_body()  # nobody will say it again
        if head.body_length == 0:
            return
        if self._kept_body:
            kept, self._kept_body = self._kept_body, None
            upstream.send_body(bytes(kept))
        if self._request_ended:
            upstream.send_end(self._trailers)
        if self._body_held_up:
            self._body_held_up = False
            if not self._backend_behind:
                self.downstream.resume_body()

    def _is_repeatable(self) -> bool:
        """Say whether the request may reach a backend twice without harm (RFC 9110, 9.2.2)."""
        return self.head.body_length == 0 and self.head.method in _IDEMPOTENT

    def _keep(self, data: bytes) -> None:
        """Keep body bytes for the connection to come; flow control says how many there can be."""
        if self._kept_body is None:
            self._kept_body = bytearray(data)
        else:
            self._kept_body += data

    def _exclude(self) -> None:
        """Do not try this lease again."""
        if self.lease is not None:
            if self._excluded is None:
                self._excluded = set()
            self._excluded.add(self.lease.instance_id)

    def _retry(self, error: PorteroError) -> None:
        surroundings = self._surroundings
        service = surroundings.router.route(self.head.authority, surroundings.table)
        if service is None:
            self._refuse(error)
            return
        self.retries += 1
        surroundings.counters.retries[self.service] += 1
        self._phase = _ROUTING
        self._try_next(service, error, monotonic())

    def _refuse(self, error: PorteroError) -> None:
        """Answer with the reply that `error` means, or abort a response that has begun."""
        self.error = error
        self._give_up_upstream()
        downstream = self.downstream
        if self._phase is _RESPONDING:
            downstream.abort(error)
        else:
            self.status = error.status
            head, body = reply(error, self.head, self.request_id)
            self._phase = _RESPONDING
            self.bytes_out = len(body)
            downstream.send_response(head, body)
        self._finish()

    def _give_up_upstream(self) -> None:
        if self._connecting is not None:
            self._connecting.give_up()
            self._connecting = None
        if self._upstream is not None:
            upstream, self._upstream = self._upstream, None
            upstream.abort()
        self._release()

    def _release(self) -> None:
        """Give the claim back: the one place that does."""
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.claims -= 1

    def _finish(self) -> None:
        """Count and log, once."""
        if self._phase is _DONE:
            return
        self._phase = _DONE
        self._surroundings.exchange_done(self)
