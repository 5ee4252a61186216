"""The contract of a gate: it lets a request into its service, or not, before any backend is chosen.

The rules
- A gate belongs to one service in one worker, and is made of its part of the service's policy (`rules`). When
  the policy changes, a gate whose part did not goes on with what it remembers.
- `admit` returns None to let the exchange go on, or raises a PorteroError, which is the answer.
- Who cannot say so at once returns an `Asking`. The exchange waits then, reads no more of the body, and calls
  `give_up` when it has ended otherwise; if it has not, `gate_opened`, `gate_closed` or `answer` is called
  exactly once, never from within `admit`.
- What a gate remembers of clients is bounded.
"""

from __future__ import annotations

from portero_py.proxy.endpoints import Gated


class Asking:
    """An answer that is still to come."""

    __slots__ = ()

    def give_up(self) -> None:
        """The exchange is over: it is not to be called any more."""
        raise NotImplementedError


class Gate:
    """Between the client and the service."""

    __slots__ = ()

    def admit(self, exchange: Gated, now: float) -> Asking | None:
        """Let `exchange` go on (None), or say later. Raises PorteroError to turn it away."""
        raise NotImplementedError
