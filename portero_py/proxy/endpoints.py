"""The two ends of an exchange, whatever HTTP version they speak.

An exchange stands between one `Downstream` (the client's side) and one `Upstream` (the backend's side).
Each end calls the exchange when bytes come in, and the exchange calls the other end. All of it happens in
event-loop callbacks: nothing here awaits.

Who calls what (`x` is the exchange)
- Downstream -> exchange: `x.start()` once the head is complete, then `x.request_body(data)` any number of
  times and `x.request_end(trailers)` exactly once (not needed when the head's `body_length` is 0);
  `x.downstream_paused()` / `x.downstream_resumed()` when the client reads slower than the backend sends;
  `x.downstream_gone(error)` when the client vanished or broke the protocol. After that call, or after the
  exchange called `send_end` or `abort`, neither side calls the other again for this exchange.
- Exchange -> downstream: `send_informational*`, then `send_response`, or `send_head`, `send_body*`,
  `send_end`; or `abort` at any time.
- Exchange -> upstream: `send_head`, `send_body*`, `send_end`; or `abort`.
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
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from portero_py.wire.message import Fields, RequestHead, ResponseHead

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.proxy.exchange import Exchange
    from portero_py.wire.headers import Forwarded


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
        self, exchange: Exchange, head: RequestHead, forwarded: Forwarded, request_id: bytes
    ) -> None:
        """Begin `exchange`: send the request's head with the proxy's own fields added.

        Without a body (`body_length` 0) that is the whole request, and no `send_end` follows.
        """

    def send_body(self, data: bytes) -> None:
        """Send body bytes; `data` is never empty."""

    def send_end(self, trailers: Fields | None) -> None:
        """The request is complete."""

    def abort(self) -> None:
        """Give the exchange up. A connection that cannot be reused is closed."""

    def pause_body(self) -> None:
        """Stop delivering the response's body."""

    def resume_body(self) -> None:
        """Deliver the response's body again."""

    def start_tunnel(self) -> None:
        """The backend switched protocols: from now on all bytes in either direction are body bytes."""
