"""One stream of the server's side: a request that is received and the response that is sent.

A subclass says what to do with a request (the methods that raise NotImplementedError, here and in
`stream.py`). Its methods `send_*`, `pause_body` and `resume_body` are those of the proxy's `Downstream`.

Once the response is ENDING or further, the request is of no interest: its body is thrown away. A response
that is complete before the request is: END_STREAM, and the connection sees to the rest (`ended.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portero_py.wire.http2.stream import HEAD, Stream

if TYPE_CHECKING:
    from portero_py.errors import PorteroError
    from portero_py.wire.message import RequestHead, ResponseHead


class ServerStream(Stream):
    """A request, and its response."""

    __slots__ = ()

    # What the connection calls; a subclass does the work

    def on_head(self, head: RequestHead) -> None:
        """A request begins. When it has no body (`received`), `on_end` is not called."""
        raise NotImplementedError

    def on_refused(self, error: PorteroError) -> None:
        """The request's head is over a limit: answer with `error.status`; nothing else will be called."""
        raise NotImplementedError

    def on_sent(self) -> None:
        """The response was the last of the exchange."""
        if self.received:
            self._connection.forget(self, reset=False)
        else:
            self._connection.leave_early(self)

    # The response's head; its body and end are in `stream.py`

    def send_informational(self, head: ResponseHead) -> None:
        """Send a 1xx response."""
        if self.sending != HEAD:
            self._illegal("send_informational")
        output = self._output
        output.headers(self.id, output.encoder.encode_response(head.status, head.fields), 0)

    def send_response(self, head: ResponseHead, body: bytes) -> None:
        """Send a whole final response."""
        if self.sending != HEAD:
            self._illegal("send_response")
        self._send_all(self._output.encoder.encode_response(head.status, head.fields), body)

    def send_head(self, head: ResponseHead) -> None:
        """Send the head of the final response."""
        if self.sending != HEAD:
            self._illegal("send_head")
        self._send_first(self._output.encoder.encode_response(head.status, head.fields))
