"""How fast the body of a request has to come (`limits.body_rate`).

A client that sends a byte now and then is never idle, and keeps a connection to a backend, and there often a
thread. So its body is measured, over RATE_SECONDS after RATE_SECONDS, and ended when it comes slower than the
limit in one of them. One that stands still for a while catches up within the same seconds, or is ended.

Not measured is
- the time in which the client is not read, because its backend is behind or none was found yet: the seconds
  begin anew when it is read again
- a body whose response has begun, and one of gRPC: these are conversations, in which nobody may have to say
  anything for hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from portero_py.wire.message import RequestHead

RATE_SECONDS: Final = 20.0


def is_measured(head: RequestHead) -> bool:
    """Say whether the body behind this head is an upload, and no conversation."""
    return not any(
        name.lower() == b"content-type" and value.lower().startswith(b"application/grpc")
        for name, value in head.fields
    )
