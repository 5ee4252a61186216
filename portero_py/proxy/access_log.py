"""The access log: one line an exchange, JSON or text, written by a thread of its own.

A worker must never wait for whoever reads its log. Lines are collected during an event-loop iteration and
handed to the writer thread in one piece; when the reader is so far behind that `QUEUE_BYTES` wait, lines are
dropped, counted (`portero_access_log_dropped`) and never waited for. Cookies, authorization and query strings
of secrets do not occur: no header field is logged, and of the target only the path.

Several workers write to one descriptor, in turns: a line is never cut in two by another worker's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import threading
from collections import deque
from datetime import UTC, datetime
from time import monotonic, time
from typing import TYPE_CHECKING, Final

import orjson

if TYPE_CHECKING:
    import asyncio

    from portero_py.core.counters import Counters
    from portero_py.errors import PorteroError
    from portero_py.proxy.endpoints import Record
    from portero_py.proxy.peer import Peer

#: Most bytes that wait for the reader of the log.
QUEUE_BYTES: Final = 16 << 20

_PROTOCOLS: Final = {b"1.0": "HTTP/1.0", b"1.1": "HTTP/1.1", b"2": "HTTP/2"}


class AccessLog:
    """Writes lines to a file descriptor. `style` is "json", "text" or "off".

    `lock` is the descriptor of a file that the workers who write there lock, -1 when there is only one.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        counters: Counters,
        style: str,
        descriptor: int,
        lock: int = -1,
    ) -> None:
        self.style = style
        self.enabled = style != "off"
        self._json = style == "json"
        self._loop = loop
        self._counters = counters
        self._lines: list[bytes] = []
        self._writer = _Writer(descriptor, lock) if self.enabled else None

    def exchange(self, exchange: Record) -> None:
        """Log a finished exchange."""
        head = exchange.head
        peer = exchange.peer
        backend = exchange.backend
        error = exchange.error
        self._write(
            {
                "time": _now(),
                "client": peer.address,
                "method": head.method.decode("latin-1"),
                "host": head.authority.decode("latin-1"),
                "path": head.target.partition(b"?")[0].decode("latin-1"),
                "protocol": _PROTOCOLS[head.version],
                "status": exchange.status,
                "bytes_in": exchange.bytes_in,
                "bytes_out": exchange.bytes_out,
                "duration": round(monotonic() - exchange.started, 6),
                "service": exchange.service,
                "backend": backend.address if backend is not None else "",
                "upstream_status": exchange.upstream_status,
                "upstream_time": round(exchange.upstream_seconds, 6),
                "retries": exchange.retries,
                "request_id": exchange.request_id.decode("latin-1"),
                "tls_version": peer.tls_version,
                "sni": peer.sni,
                "reason": error.reason if error is not None else "",
                "error": str(error) if error is not None else "",
            }
        )

    def refused(self, peer: Peer, error: PorteroError, request_id: bytes, version: bytes) -> None:
        """Log bytes that did not become a request; `version` is what the connection speaks."""
        self._write(
            {
                "time": _now(),
                "client": peer.address,
                "method": "",
                "host": "",
                "path": "",
                "protocol": _PROTOCOLS[version],
                "status": error.status,
                "request_id": request_id.decode("latin-1"),
                "tls_version": peer.tls_version,
                "sni": peer.sni,
                "reason": error.reason,
                "error": str(error),
            }
        )

    def close(self) -> None:
        """Write what is left, for a second at most."""
        self._hand_over()
        if self._writer is not None:
            self._writer.close()

    # Private

    def _write(self, entry: dict[str, str | int | float]) -> None:
        if self._json:
            line = orjson.dumps(entry)
        else:
            line = " ".join(_text(value) for value in entry.values()).encode()
        if not self._lines:
            self._loop.call_later(0.05, self._hand_over)
        self._lines.append(line)

    def _hand_over(self) -> None:
        lines, self._lines = self._lines, []
        if lines and self._writer is not None:
            self._counters.access_log_dropped += self._writer.take_lost()
            lines.append(b"")
            if not self._writer.put(b"\n".join(lines)):
                self._counters.access_log_dropped += len(lines) - 1


# Private


class _Writer:
    """A thread that writes pieces to a descriptor in order."""

    def __init__(self, descriptor: int, lock: int) -> None:
        self._descriptor = descriptor
        self._lock = lock
        self._condition = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._bytes = 0
        self._closed = False
        self._lost = 0  # lines that could not be written
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def put(self, piece: bytes) -> bool:
        """Queue a piece; False when too much waits already."""
        with self._condition:
            if self._closed or self._bytes + len(piece) > QUEUE_BYTES:
                return False
            self._pieces.append(piece)
            self._bytes += len(piece)
            self._condition.notify()
        return True

    def take_lost(self) -> int:
        """Return how many lines could not be written since the last call."""
        with self._condition:
            lost, self._lost = self._lost, 0
        return lost

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._pieces and not self._closed:
                    self._condition.wait()
                if not self._pieces:
                    return None
                piece = self._pieces.popleft()
                self._bytes -= len(piece)
            if not self._write_in_turn(piece):
                return self._stop()  # the reader is gone: nobody to write to, and traffic goes on

    def _write_in_turn(self, piece: bytes) -> bool:
        """Write a piece when no other worker writes; False when there is nobody to write to."""
        if self._lock < 0:
            return self._write(memoryview(piece))
        # A pipe takes 4096 bytes in one go; longer pieces of two workers would mix. The lock is a process's
        # own: one that dies gives it back, and one that hangs is killed.
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            return self._write(memoryview(piece))
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def _write(self, view: memoryview) -> bool:
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:  # somebody else made the descriptor non-blocking
                select.select((), (self._descriptor,), ())
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.EBADF):
                    return False
                with self._condition:  # a full disk: it may have room again for the next piece
                    self._lost += view.tobytes().count(b"\n")
                break
        return True

    def _stop(self) -> None:
        with self._condition:
            self._closed = True
            self._pieces.clear()
            self._bytes = 0


def _now() -> str:
    return datetime.fromtimestamp(time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _text(value: str | float) -> str:
    if isinstance(value, str):
        if not value:
            return "-"
        if value.isprintable() and " " not in value and '"' not in value:
            return value
        return orjson.dumps(value).decode()
    return str(value)
