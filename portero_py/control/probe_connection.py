"""One probe on the wire: a connection of its own, one question, and what came of it.

The rules
- All of it has `seconds`: connection, TLS handshake, answer.
- The answer's head decides, by the rules that traffic is read by (`wire.http1`): what a client would not get
  is no success. Its body is not read. Redirects are not followed: they are no 2xx.
- A backend that speaks TLS is verified as for traffic: `BackendTls` gives the contexts and looks at the pin.
- Host is the service. That of a wildcard is `probe` under it: a name that it covers, and its certificate too.
- A time-out that comes late is none of the backend's: this process did not run, and the answer may be here.

Which protocol is chosen in `_question`: another one than HTTP/1 is another branch there.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from typing import Final, Protocol, cast

import portero_py
from portero_py.core.model import Backend, Lease
from portero_py.core.probing import Kind, Probe, Result
from portero_py.errors import BadResponse, ConfigError, UpstreamTlsFailed, WireError
from portero_py.wire.http1 import ResponseParser, find_head

#: The longest head of an answer, bytes, and the most fields in it.
MAX_HEAD: Final = 32 * 1024
MAX_FIELDS: Final = 100

#: The most answers below 200 before the one that counts.
MAX_INFORMATIONAL: Final = 8

#: The part of its time that a time-out may be late.
LATE: Final = 0.5

# What a system call says when it is this machine that has no more of something.
_OUR_OWN: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_USER_AGENT: Final = f"portero-py-probe/{portero_py.__version__}".encode()


class BackendTls(Protocol):
    """How backends that speak TLS are connected to: `proxy.upstream.tls`, which is the data plane's."""

    def context(self, backend: Backend) -> ssl.SSLContext:
        """The context to connect with."""

    def check_pin(self, backend: Backend, transport: asyncio.BaseTransport) -> None:
        """Raises UpstreamTlsFailed when it presented another certificate than it pinned."""


class Asker:
    """Asks backends. `scheme` is what their clients speak: many answer a redirect to who does not.

    `tls` is called when the first backend speaks TLS. It raises ConfigError when it has nothing to verify by.
    """

    def __init__(self, tls: Callable[[], BackendTls], scheme: str) -> None:
        self._make_tls = tls
        self._tls: BackendTls | None = None
        self._scheme = scheme.encode()
        self._parser = ResponseParser(MAX_FIELDS)

    async def ask(self, probe: Probe, seconds: float) -> tuple[Result, str]:
        """What came of a probe, and in words what went wrong.

        It raises nothing that a backend can bring about.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = _Answer(loop, self._parser)
        try:
            async with asyncio.timeout(seconds):
                await self._connect(loop, probe.lease, answer)
                if probe.kind is Kind.CONNECT:
                    return Result.OK, ""
                status = await answer.to(_question(probe, self._scheme))
        except TimeoutError as error:
            if error.errno is not None:  # the kernel gave up before us
                return Result.TIMEOUT, f"no connection: {error.strerror}"
            if loop.time() - began > seconds * (1 + LATE):
                return Result.NO_VERDICT, "this process did not run for a while"
            return Result.TIMEOUT, f"no {'answer' if answer.was_asked else 'connection'} within {seconds:g} s"
        except (UpstreamTlsFailed, ssl.SSLError) as error:
            return Result.TLS, f"TLS: {error}"
        except ConfigError as error:
            return Result.NO_VERDICT, str(error)
        except WireError as error:
            return Result.BAD_RESPONSE, f"the answer is no HTTP: {error}"
        except ConnectionRefusedError:
            return Result.REFUSED, "connection refused"
        except ConnectionError:
            return Result.CLOSED, "the connection was closed before an answer"
        except OSError as error:
            said = error.strerror or str(error)
            return Result.NO_VERDICT if error.errno in _OUR_OWN else Result.UNREACHABLE, said
        finally:
            answer.abort()
        if probe.kind is Kind.GET and not 200 <= status <= 299:
            return Result.BAD_STATUS, f"status {status} at {probe.lease.health_path}"
        return Result.OK, ""

    # Private

    async def _connect(self, loop: asyncio.AbstractEventLoop, lease: Lease, answer: _Answer) -> None:
        backend = lease.backend
        if not backend.use_tls:
            await loop.create_connection(lambda: answer, backend.host, backend.port)
            return
        if self._tls is None:
            self._tls = self._make_tls()
        transport, _ = await loop.create_connection(
            lambda: answer,
            backend.host,
            backend.port,
            ssl=self._tls.context(backend),
            server_hostname=host_of(lease.service),
        )
        self._tls.check_pin(backend, transport)


def host_of(service: str) -> str:
    """The name that a service is asked by."""
    return f"probe{service[1:]}" if service.startswith("*.") else service


# Private


class _Answer(asyncio.Protocol):
    """The connection, and the status of the answer that comes on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, parser: ResponseParser) -> None:
        self._parser = parser
        self._method = b""
        self._buffer = b""
        self._informational = 0
        self._status: asyncio.Future[int] = loop.create_future()
        self._transport: asyncio.Transport | None = None

    async def to(self, question: tuple[bytes, bytes]) -> int:
        """Ask: a method, and all bytes of the request. Raises ConnectionError, OSError or WireError."""
        self._method, request = question
        if self._transport is not None and not self._status.done():
            self._transport.write(request)
        return await self._status

    @property
    def was_asked(self) -> bool:
        """Whether the question has been sent."""
        return bool(self._method)

    def abort(self) -> None:
        """Close, whatever may be on the way.

        Also when it is given up between its handshake and the end of `create_connection`: uvloop closes only
        the TCP transport then, and would log a fault about the TLS above it.
        """
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        if self._status.done():
            return
        self._buffer += data
        try:
            status = self._read()
        except WireError as error:
            self._fail(error)
            return
        if status:
            self._status.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._status.done():
            self._fail(exc or ConnectionResetError())

    # Private

    def _fail(self, error: Exception) -> None:
        self._status.set_exception(error)
        self._status.exception()  # seen: nobody may be waiting, when a connection was enough or the wrong one

    def _read(self) -> int:
        """The status of the answer, 0 while it is not complete."""
        if not self._method:
            raise BadResponse("it came before the question")
        while length := find_head(self._buffer, MAX_HEAD, MAX_HEAD, BadResponse):
            head, _ = self._parser.parse(self._buffer[:length], self._method)
            if head.status >= 200 or head.status == 101:
                return head.status
            self._informational += 1
            if self._informational > MAX_INFORMATIONAL:
                raise BadResponse("too many answers below 200")
            self._buffer = self._buffer[length:]
        return 0


def _question(probe: Probe, scheme: bytes) -> tuple[bytes, bytes]:
    """The method, and the bytes of a request."""
    lease = probe.lease
    target = lease.health_path if probe.kind is Kind.GET else "*"
    host = host_of(lease.service)
    method = probe.kind.value.encode()
    request = (
        b"%b %b HTTP/1.1\r\nHost: %b\r\nUser-Agent: %b\r\nAccept: */*\r\n"
        b"X-Forwarded-Proto: %b\r\nConnection: close\r\n\r\n"
    ) % (
        method,
        target.encode("ascii"),
        (f"[{host}]" if ":" in host else host).encode(),
        _USER_AGENT,
        scheme,
    )
    return method, request
