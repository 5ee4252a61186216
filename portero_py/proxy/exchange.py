"""One request and its response: route, claim, send, relay, retry, release.

The heart of the data plane. It knows a `Downstream` and an `Upstream` (proxy/endpoints.py, where what they
may call here is said too) and never asks which HTTP version they speak. Everything happens inside event-loop
callbacks; the only wait is for a new connection.

Phases
    ROUTING -> CONNECTING -> WAITING -> RESPONDING -> DONE
    ROUTING -> QUEUED -> ROUTING
    ROUTING -> ASKING -> ROUTING
    ROUTING      nothing was claimed
    ASKING       a gate of its service has not made up its mind; no body is read
    QUEUED       it waits for a backend with room, or for a paused service; no body is read
    CONNECTING   a lease is claimed, a connection to its backend is being made; body bytes are kept
    WAITING      the request is on its way; no byte of a final response's head was passed on
    RESPONDING   the response's head was passed on: nothing can be retried or replied any more
    DONE         released and counted; every later call is ignored

The invariants
- A claim is taken in `_try_next` and released in `_release`, nowhere else; `_release` follows from every way
  out. So it is with a limited backend's slot (`_pick_scarce`), and with the place in a queue (`_wait`).
- Whoever comes while others wait for the same service waits behind them.
- A request whose cookie names a backend (`core/stickiness`) goes there while it may, in each try anew; the
  answer says whether its client is to have another cookie.
- A request is sent a second time only when the backend cannot have acted on it: nothing was sent, or the
  method is idempotent, there is no body and no byte of a response came (RFC 9110, 9.2.2).
- A body byte is in one place: sent, or in `_kept_body`. What a connection refuses because it is breaking
  comes back (`body_refused`), so a request whose head was not sent yet is tried again with all of its body;
  one whose first byte was sent never is.
- What becomes of a try is told once (`outcomes`): a failure before the head, or an answer. What the client
  did, what we ran out of and a stale connection say nothing about the backend; nor does what ends in the
  middle of a response, which may be its client's idleness. A trial ends with its claim, with a verdict or
  without.
- Who waits for a backend that has become DOWN, while nothing of a response came, is moved to another one if
  the request may be sent again and anybody else is not DOWN. That is a retry (`moved`), counted against
  nothing: it happens once for each time that a backend falls (`backends_fell`).
- A backend that fails before the head is passed on costs the client nothing while another one can serve.
  Failed connects are no retries: every lease is tried, for CONNECT_PATIENCE connect time-outs. What counts
  against MAX_RETRIES, or the service's own `retries`, is a request that was sent, and against its service's
  budget one that a backend may have begun. Time in a queue counts for none of it. With `retries` 0 nothing
  is sent twice for whatever reason, so an idle connection is not risked that may be stale.
- Nobody is left mute: a fault of our own ends the exchange at both of its ends (`broke`).
"""

from __future__ import annotations

import logging
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Final

from portero_py.core.health import Failure
from portero_py.core.model import LeaseState
from portero_py.core.queue import Turn
from portero_py.errors import (
    AmbiguousPath,
    BodyTooLarge,
    ClientGone,
    ConnectTimeout,
    MethodRefused,
    Misdirected,
    NoBackend,
    NoSuchService,
    OutOfBuffers,
    OutOfDescriptors,
    PorteroError,
    QueueFull,
    ServiceHalted,
    Unconnectable,
    UpstreamTimeout,
)
from portero_py.proxy.endpoints import RequestSide
from portero_py.proxy.replies import reply
from portero_py.proxy.routing import redirect, stripped
from portero_py.proxy.rules import MAX_RETRIES
from portero_py.proxy.upstream.rooms import NONE
from portero_py.wire.message import request_with

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portero_py.core.health import Mark
    from portero_py.core.model import Lease, Service
    from portero_py.core.routes import Route
    from portero_py.proxy.endpoints import Downstream, Upstream
    from portero_py.proxy.gates.gate import Asking
    from portero_py.proxy.peer import Peer
    from portero_py.proxy.rules import Rules
    from portero_py.proxy.surroundings import Surroundings
    from portero_py.proxy.upstream.pool import BackendPool, Connecting
    from portero_py.wire.field_changes import Changes
    from portero_py.wire.message import Fields, RequestHead, ResponseHead

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
    QUEUED = 5
    ASKING = 6


# Module constants: an enum member costs an attribute look-up more, several times a request.
_ROUTING, _CONNECTING, _WAITING, _RESPONDING, _DONE, _QUEUED, _ASKING = Phase

_PROMPT, _UNREACHABLE, _HANGS = Failure

_DOWN: Final = LeaseState.DOWN

#: The steps that may happen.
TRANSITIONS: Final[Mapping[Phase, frozenset[Phase]]] = {
    _ROUTING: frozenset({_ASKING, _QUEUED, _CONNECTING, _WAITING, _RESPONDING, _DONE}),
    _QUEUED: frozenset({_ROUTING}),
    _ASKING: frozenset({_ROUTING}),
    _CONNECTING: frozenset({_ROUTING, _WAITING, _RESPONDING, _DONE}),
    _WAITING: frozenset({_ROUTING, _RESPONDING, _DONE}),
    _RESPONDING: frozenset({_DONE}),
    _DONE: frozenset(),
}


class Exchange(RequestSide):
    """One request of `peer`, which came in over `downstream` with `head`."""

    # The way of the request.
    _phase = _ROUTING
    _route: Route | None = None  # that led here, if one did
    _asking: Asking | None = None
    _gates_passed = 0
    _outgoing: RequestHead | None = None  # what the backend gets instead of `head`
    _claim: BackendPool | None = None
    _slot = NONE  # of a limited backend that is claimed
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
        # Not above: each exchange looks at it, and a default of the class is found last.
        self._trial: Mark | None = None  # of the backend that is ejected, and that this exchange is to try
        # Nor this one: of a protocol, the compiled build makes no default None.
        self._upstream: Upstream | None = None
        self._rules: Rules | None = None  # of its service's policy
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
        table = surroundings.table
        route = None
        if table.routes.routes:
            try:
                route = surroundings.router.find_route(head.authority, head.target, table)
            except AmbiguousPath as error:
                self._refuse(error)
                return
            self._route = route
        if route is None:
            service = surroundings.router.route(head.authority, table)
        else:
            service = table.services.get(route.service)
        if service is not None:
            self.service = service.name
        if peer.certificate is not None and head.authority != peer.covered:
            if surroundings.misdirected(peer.certificate, head.authority):
                self._refuse(Misdirected("this connection presented the certificate of another host"))
                return
            peer.covered = head.authority
        if route is not None and route.redirect and head.method != b"CONNECT":
            self.answer(*redirect(route, head, self.request_id))
            return
        if service is None:
            self._refuse(NoSuchService("no service is registered for this host"))
            return
        if head.method == b"CONNECT":
            self._refuse(MethodRefused("CONNECT is not served here"))
            return
        if service.policy is not None or route is not None:
            self._enter(service, self.started)
            return
        limit = surroundings.limits.body_bytes
        if limit and head.body_length > limit:
            self._refuse(BodyTooLarge(f"the body is over the limit of {limit} bytes"))
        else:
            self._try_next(service, None, self.started)

    def request_body(self, data: bytes) -> None:
        """Some bytes of the request's body, or of the tunnel."""
        if self._phase is _DONE:
            return
        self.bytes_in += len(data)
        rules = self._rules
        limit = self._surroundings.limits.body_bytes if rules is None else rules.body_bytes
        if limit and self.bytes_in > limit and not self.head.upgrade:
            self._refuse(BodyTooLarge(f"the body is over the limit of {limit} bytes"))
        elif self._upstream is not None:
            self._upstream.send_body(data)
        else:
            self._keep(data)
            if self._phase is _QUEUED and not self._surroundings.queues.grew(self, len(data)):
                self._refuse(QueueFull("the bodies of the requests that wait are too much"))

    def request_end(self, trailers: Fields | None) -> None:
        """The request is complete, or the client closed its side of the tunnel."""
        if self._phase is _DONE or (self._request_ended and not self.head.upgrade):
            return
        self._request_ended = True
        self._trailers = trailers
        if self._upstream is not None:
            self._upstream.send_end(trailers)
        elif self._phase is _QUEUED or self._phase is _ASKING:
            # There is no body left that could come, and who does not read does not hear a client leave.
            self._body_held_up = False
            self.downstream.resume_body()

    @property
    def body_idle(self) -> float:
        """For how many seconds the client may stand still in a body."""
        rules = self._rules
        return (self._surroundings.patience.general if rules is None else rules.patience).body_idle

    @property
    def is_queued(self) -> bool:
        """Whether it waits for its turn: a client that closes its side then has given up."""
        return self._phase is _QUEUED

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

    # What the gates call

    def bare_fields(self) -> Fields:
        """The request's fields as an application knows them: without what in its cookies is portero's own."""
        rules, head = self._rules, self.head
        if rules is None or rules.sticky is None:
            return head.fields
        return rules.sticky.request_head(head).fields

    def gate_opened(self, changes: Changes | None = None) -> None:
        """It may go on: through the gates behind this one, as a new request would."""
        self._asked()
        service = self._service_now()
        if service is None:
            self._refuse(NoSuchService("no service is registered for this host any more"))
            return
        if service.name != self.service:
            self._enter(service, monotonic())
            return
        if changes is not None:
            outgoing = self.head if self._outgoing is None else self._outgoing
            self._outgoing = request_with(outgoing, changes.of(outgoing.fields))
        self._pass_gates(service, monotonic())

    def gate_closed(self, error: PorteroError) -> None:
        """It may not."""
        self._asked()
        self._refuse(error)

    def answer(self, head: ResponseHead, body: bytes, error: PorteroError | None = None) -> None:
        """This is the response, whole."""
        self._asked()
        self._give_up_upstream()
        self.error = error
        self._respond(head, body)

    # What the queue calls

    def turn_came(self) -> Turn:
        """There may be room: go on if so. As a new request would, if the table says something else now."""
        service = self._service_now()
        if service is None:
            self._refuse(NoSuchService("no service is registered for this host any more"))
            return Turn.GONE
        if service.name != self.service:
            self._release()
            self._enter(service, monotonic())
            return Turn.GONE  # of this queue; it may be in another one
        if not service.is_scarce:
            self._release()
            self._try_next(service, None, monotonic())
            return Turn.GONE
        self._try_next(service, None, monotonic())
        if self._phase is not _QUEUED:
            return Turn.GONE
        return Turn.PASSED if self._excluded else Turn.WAITS

    def waited_in_vain(self, error: PorteroError) -> None:
        """There will be no room in time: it is over."""
        self._refuse(error)

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
        assert self._claim is not None
        patience = CONNECT_PATIENCE * self._claim.patience.connect
        if not isinstance(error, (OutOfDescriptors, Unconnectable)):
            self._went_wrong(error, _UNREACHABLE if isinstance(error, ConnectTimeout) else _PROMPT)
        self._release()
        self._exclude()
        waited = monotonic() - self._connecting_since
        if waited >= patience:
            self._refuse(error)
        else:
            self._retry(error, error.reason)

    def connect_cancelled(self, error: PorteroError) -> None:
        """No connection will be made any more."""
        self._connecting = None
        self._refuse(error)

    def backends_fell(self, fallen: Mapping[tuple[str, str], Lease]) -> None:
        """These are DOWN now, by service and instance id: go to another one instead of waiting in vain."""
        lease, upstream = self.lease, self._upstream
        if lease is None or lease.state is _DOWN:  # there was nobody better, or it was moved
            return
        down = fallen.get((lease.service, lease.instance_id))
        if down is None or down.backend != lease.backend:
            return
        if self._phase is _WAITING:
            if upstream is None or not self._is_repeatable() or not upstream.is_silent():
                return
        elif self._phase is not _CONNECTING:
            return
        service = self._service_now()
        if service is None or not self._has_another(service, lease, monotonic()):
            return
        if self._connecting is not None:
            self._connecting.give_up()
            self._connecting = None
        if upstream is not None:
            self._upstream = None
            upstream.abort()
        self._release()
        self._exclude()
        self._retry(UpstreamTimeout(f"backend {lease.backend.address} is down"), "moved")

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
        stale = reused and silent
        if self._phase is not _RESPONDING and not stale:
            self._went_wrong(error, _PROMPT)
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
            outcomes, over = self._surroundings.outcomes, self._resent >= self._retries()
            if over or not (stale or outcomes.may_repeat(self.service, monotonic())):
                self._refuse(error)
                return
            self._resent += 1
        if stale:
            # It says nothing about the backend: the same one again, over a new connection.
            self._fresh = True
        else:
            self._exclude()
        self._retry(error, "stale" if stale else error.reason)

    def upstream_timed_out(self, error: PorteroError) -> None:
        """The backend took too long; it may be at work still, so nothing is retried."""
        self._upstream = None
        self.error = error
        if self._phase is not _RESPONDING:
            self._went_wrong(error, _HANGS)
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
        now = monotonic()
        self._phase = _RESPONDING
        self.status = self.upstream_status = head.status
        self.upstream_seconds = now - self.upstream_started
        if head.status >= 500 or self._surroundings.marks:
            self._was_answered(head.status, now)
        if self._rules is not None:
            head = self._rules.response_head(self, head)
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
        if head.status >= 500 or self._surroundings.marks:
            self._was_answered(head.status, now)
        if self._rules is not None:
            head = self._rules.response_head(self, head)
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

    # What the budget of buffered bytes calls

    def held_bytes(self) -> int:
        """How much of the request's body waits for a connection."""
        return 0 if self._kept_body is None else len(self._kept_body)

    def kill(self) -> None:
        """There is no room for it."""
        if self._kept_body is not None and self._phase is not _DONE:
            self._refuse(OutOfBuffers("there is no room for the body while there is no connection"))

    # Private

    def _service_now(self) -> Service | None:
        """The service that the request is for, as the table is by now."""
        surroundings, route = self._surroundings, self._route
        if route is None:
            return surroundings.router.route(self.head.authority, surroundings.table)
        return surroundings.table.services.get(route.service)

    def _enter(self, service: Service, now: float) -> None:
        """Come to a service, by its rules and through all of its gates: to another one than at first, too."""
        surroundings, head, route = self._surroundings, self.head, self._route
        self.service = service.name
        self._rules = rules = None if service.policy is None else surroundings.rules.of(service)
        self._gates_passed = 0
        self._outgoing = None
        self._excluded = None  # instance ids are names within a service
        if route is not None and route.strip_path:
            self._outgoing = stripped(head, route.path)
        limit = surroundings.limits.body_bytes if rules is None else rules.body_bytes
        if limit and (head.body_length > limit or self.bytes_in > limit):
            self._refuse(BodyTooLarge(f"the body is over the limit of {limit} bytes"))
        elif rules is not None:
            self._pass_gates(service, now)
        else:
            self._try_next(service, None, now)

    def _asked(self) -> None:
        """The gate has answered, if one was asked."""
        if self._asking is not None:
            self._asking = None
            self._phase = _ROUTING

    def _pass_gates(self, service: Service, now: float) -> None:
        """Go through the gates that are left, then to a backend."""
        rules = self._rules
        assert rules is not None
        gates = rules.gates
        while self._gates_passed < len(gates):
            gate = gates[self._gates_passed]
            self._gates_passed += 1
            try:
                asking = gate.admit(self, now)
            except PorteroError as error:
                self._refuse(error)
                return
            if asking is not None:
                self._asking = asking
                self._phase = _ASKING
                if not self._request_ended:
                    self._body_held_up = True
                    self.downstream.pause_body()
                return
        self._outgoing = rules.request_head(self, self.head if self._outgoing is None else self._outgoing)
        self._try_next(service, None, now)

    def _try_next(self, service: Service, error: PorteroError | None, now: float) -> None:
        """Claim a backend and send the request over an idle connection, or start to make one."""
        surroundings = self._surroundings
        if service.is_scarce:
            lease = self._pick_scarce(service, error, now)
            if lease is None:
                return
        else:
            if self._rules is None:
                lease = surroundings.balancers.pick(
                    service, now, self._excluded or (), self.head, error is not None
                )
            else:
                lease = self._pick(service, now, error is not None)
            if lease is None:
                self._refuse(error or NoBackend("no backend can take the request now"))
                return
        head = self.head
        self.lease = lease
        self._claim = pool = surroundings.pools.of(lease, head.authority)
        pool.claims += 1
        if surroundings.ejected:
            self._trial = surroundings.health.begin_trial(lease, now)
        self.upstream_started = now
        if not self._fresh:
            upstream = pool.take(
                now,
                retriable=head.body_length == 0
                and head.method in _IDEMPOTENT
                and (self._rules is None or self._rules.retries > 0),
            )
            if upstream is not None:
                self._send(upstream)
                return
        self._phase = _CONNECTING
        if not self._connecting_since:
            self._connecting_since = now
        if head.body_length != 0:
            self._body_held_up = True
            self.downstream.pause_body()
        self._connecting = pool.connect(self)

    def _pick(self, service: Service, now: float, retry: bool) -> Lease | None:
        """Pick by the service's policy: its client's home (`core/stickiness`), if it has one, or another."""
        surroundings, rules = self._surroundings, self._rules
        balancers = surroundings.balancers
        excluded = self._excluded or ()
        client = ""
        home = None
        if rules is not None:
            if rules.sticky is not None and rules.service == service.name:
                home = rules.sticky.home(self.head, service)
                self.is_at_home = home is not None and balancers.may_stay(service, home, now, excluded, retry)
                if self.is_at_home and home is not None and surroundings.pools.has_room(home):
                    return home
            if rules.by_client:
                client = self.peer.client(self.head.forwarded)
        lease = balancers.pick(service, now, excluded, self.head, retry, client)
        if lease is home and home is not None:
            self.is_at_home = True  # others went before it, and none of them could take it
        return lease

    def _pick_scarce(self, service: Service, error: PorteroError | None, now: float) -> Lease | None:
        """Pick for a service that not everybody may go on to; None: it waits in the queue, or was refused."""
        surroundings = self._surroundings
        halt = service.halt
        queued = self._phase is _QUEUED
        if halt is None and (queued or service.name not in surroundings.queues):
            excluded = self._excluded or ()
            retry = bool(excluded)
            lease = self._pick(service, now, retry)
            tries = len(service.leases)
            while lease is not None and lease.max_in_flight:
                self._slot = surroundings.pools.take_slot(lease)
                if self._slot != NONE:
                    self.lease = lease
                    surroundings.pools.of(lease, self.head.authority).is_limited = True
                    break
                # Another worker was faster: that was the backend's last slot.
                tries -= 1
                if not tries:
                    lease = None
                    break
                lease = self._pick(service, now, retry)
            if lease is not None:
                if queued:
                    self._leave_queue(now)
                return lease
            if not surroundings.balancers.would_serve(service, now, excluded):
                self._refuse(error or NoBackend("no backend can take the request now"))
                return None
        if halt is not None and halt.seconds is None:
            self._refuse(error or ServiceHalted(halt.message or "the service is stopped"))
        elif not queued:
            self._wait(service, error, now)
        return None

    def _wait(self, service: Service, error: PorteroError | None, now: float) -> None:
        """Join the queue of `service`."""
        head = self.head
        self.service = service.name  # of a retry it may be another one than at first
        size = len(head.target) + len(head.authority)
        for name, value in head.fields:
            size += len(name) + len(value)
        if self._kept_body is not None:
            size += len(self._kept_body)
        try:
            self._surroundings.queues.join(self, service, now, size, failed=bool(self._excluded))
        except NoBackend as refusal:
            self._refuse(error or refusal)
            return
        self._phase = _QUEUED
        if not self._request_ended:
            self._body_held_up = True
            self.downstream.pause_body()
        elif self._body_held_up:
            self._body_held_up = False
            self.downstream.resume_body()

    def _leave_queue(self, now: float) -> None:
        """Give the place in the queue up: the one place that does."""
        self._phase = _ROUTING
        waited = self._surroundings.queues.leave(self, now)
        if self._connecting_since:
            self._connecting_since += waited

    def _send(self, upstream: Upstream) -> None:
        head = self.head if self._outgoing is None else self._outgoing
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
            self._surroundings.budget.drops(self)
            upstream.send_body(bytes(kept))
        if self._request_ended:
            upstream.send_end(self._trailers)
        if self._body_held_up:
            self._body_held_up = False
            if not self._backend_behind:
                self.downstream.resume_body()

    def _is_repeatable(self) -> bool:
        """Say whether the request may reach a backend twice: without harm (RFC 9110, 9.2.2), and at all."""
        return self.head.body_length == 0 and self.head.method in _IDEMPOTENT and self._retries() > 0

    def _retries(self) -> int:
        """How often the request may be sent again."""
        return MAX_RETRIES if self._rules is None else self._rules.retries

    def _has_another(self, service: Service, lease: Lease, now: float) -> bool:
        """Say whether anybody else than `lease` may serve, at once or after a while in the queue."""
        surroundings = self._surroundings
        if service.halt is not None:
            return False
        for other in service.leases:
            if (
                other.state is not _DOWN
                and now < other.serves_until
                and other.instance_id != lease.instance_id
                and (self._excluded is None or other.instance_id not in self._excluded)
                and (surroundings.queues.patience(service) > 0 or surroundings.pools.has_room(other))
            ):
                return True
        return False

    def _keep(self, data: bytes) -> None:
        """Keep body bytes for the connection to come; flow control says how many there can be."""
        if self._kept_body is None:
            self._kept_body = bytearray(data)
        else:
            self._kept_body += data
        self._surroundings.budget.holds(self, len(self._kept_body))

    def _exclude(self) -> None:
        """Do not try this lease again."""
        if self.lease is not None:
            if self._excluded is None:
                self._excluded = set()
            self._excluded.add(self.lease.instance_id)

    def _went_wrong(self, error: PorteroError, failure: Failure) -> None:
        """The try has failed, and it was the backend's failure."""
        surroundings = self._surroundings
        trial, self._trial = self._trial, None
        surroundings.outcomes.failed(self, surroundings.table, failure, error, trial, monotonic())

    def _was_answered(self, status: int, now: float) -> None:
        """The backend has answered, whatever it may be."""
        surroundings = self._surroundings
        if status >= 500 or self.service in surroundings.marks:
            trial, self._trial = self._trial, None
            surroundings.outcomes.answered(self, surroundings.table, status, trial, now)

    def _retry(self, error: PorteroError, reason: str) -> None:
        service = self._service_now()
        if service is None:
            self._refuse(error)
            return
        self.retries += 1
        self._surroundings.counters.retries[self.service, reason] += 1
        self._phase = _ROUTING
        if service.name != self.service:
            self._enter(service, monotonic())
        else:
            self._try_next(service, error, monotonic())

    def _refuse(self, error: PorteroError) -> None:
        """Answer with the reply that `error` means, or abort a response that has begun."""
        self.error = error
        self._give_up_upstream()
        downstream = self.downstream
        if self._phase is _RESPONDING:
            downstream.abort(error)
        else:
            self._respond(*reply(error, self.head, self.request_id))
            return
        self._finish()

    def _respond(self, head: ResponseHead, body: bytes) -> None:
        """A whole response that no backend made."""
        self.status = head.status
        self._phase = _RESPONDING
        self.bytes_out = len(body)
        self.downstream.send_response(head, body)
        self._finish()

    def _give_up_upstream(self) -> None:
        if self._asking is not None:
            asking, self._asking = self._asking, None
            asking.give_up()
            self._phase = _ROUTING
        if self._kept_body is not None:
            self._kept_body = None
            self._surroundings.budget.drops(self)
        if self._connecting is not None:
            self._connecting.give_up()
            self._connecting = None
        if self._upstream is not None:
            upstream, self._upstream = self._upstream, None
            upstream.abort()
        self._release()

    def _release(self) -> None:
        """Give the claim back, or the place in the queue: the one place that does."""
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.claims -= 1
            if self._trial is not None:
                trial, self._trial = self._trial, None
                self._surroundings.health.end_trial(trial)
            if claim.is_limited:
                self._give_slot_back()
            return
        if self._slot != NONE:
            self._give_slot_back()  # something broke before there was a claim
        if self._phase is _QUEUED:
            self._leave_queue(monotonic())

    def _give_slot_back(self) -> None:
        slot, self._slot = self._slot, NONE
        lease = self.lease
        assert lease is not None
        if slot != NONE:  # it may have been sent before there was a limit
            self._surroundings.pools.give_slot_back(lease, slot)
        self._surroundings.queues.freed(lease.service)

    def _finish(self) -> None:
        """Count and log, once."""
        if self._phase is _DONE:
            return
        self._phase = _DONE
        self._surroundings.exchange_done(self)
