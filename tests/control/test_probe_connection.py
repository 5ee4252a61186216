"""One probe on the wire, against backends that answer in all ways: real sockets, both kinds of event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from portero_py.config.model import Proxy
from portero_py.control import probe_connection
from portero_py.control.probe_connection import MAX_FIELDS, MAX_HEAD, MAX_INFORMATIONAL, Asker, host_of
from portero_py.core.model import NEVER, Backend, Lease, LeaseState
from portero_py.core.probing import Probe, Probing, Result
from portero_py.demo.self_signed import Authority, self_signed
from portero_py.errors import ConfigError
from portero_py.proxy.upstream.tls import UpstreamTls

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

AUTHORITY = Authority()
SIGNED = AUTHORITY.issue("app.example")
SELF_SIGNED = self_signed("whatever.example", days=-1)

#: Seconds that a probe has which is to be answered: a busy machine is no time-out.
PATIENCE = 30.0
#: Seconds that one has which is not: enough to connect and to ask, also there.
SHORT = 1.0


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on each kind of event loop: they differ in what they raise."""

    @functools.wraps(test)
    def run(loop: str, **given: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(test(**given))

    asked = inspect.signature(test)
    loop = inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
    run.__signature__ = asked.replace(parameters=[loop, *asked.parameters.values()])  # type: ignore[attr-defined]
    parametrized: Callable[..., None] = pytest.mark.parametrize("loop", LOOPS)(run)
    return parametrized


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    gc.collect()
    told = [record.getMessage() for record in (*caplog.get_records("call"), *caplog.records)]
    assert not [line for line in told if "never retrieved" in line or "Fatal error" in line]


@contextlib.asynccontextmanager
async def backend(
    script: Script, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Backend]:
    """A server that plays `script` on each connection, until the test is done with it."""
    playing: set[asyncio.Task[None]] = set()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        playing.add(task)
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the probe is over when it has heard enough
        except asyncio.CancelledError:
            pass  # and so is the test
        finally:
            playing.discard(task)
            writer.close()

    server = await asyncio.start_server(play, host, 0, ssl=tls)
    try:
        port = server.sockets[0].getsockname()[1]
        yield Backend(host, port, use_tls=tls is not None)
    finally:
        server.close()
        ending = list(playing)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


def answer(raw: bytes) -> Script:
    """Read a head and write `raw`, then wait until the probe closes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await reader.read()

    return script


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    await asyncio.sleep(PATIENCE)


def probe_of(
    there: Backend, path: str = "/up", *, service: str = "app.example", state: LeaseState = LeaseState.DOWN
) -> Probe:
    """The probe that is due for a lease: OPTIONS without a path, because it was found down."""
    probing = Probing(5, 1, 3, chance=lambda: 0.0)
    lease = Lease(service, "one", there, NEVER, None, health_path=path, state=state)
    probing.see((service, there.host, there.port), lease, 0.0)
    [probe] = probing.take(0.0, 1)
    return probe


def connecting(there: Backend) -> Probe:
    """A probe that wants a connection only."""
    return probe_of(there, "", state=LeaseState.STARTING)


def asker(proxy: Proxy | None = None) -> Asker:
    return Asker(lambda: UpstreamTls(proxy or Proxy()), "https")


async def asked(script: Script, seconds: float = PATIENCE) -> tuple[Result, str]:
    async with backend(script) as there:
        return await asker().ask(probe_of(there), seconds)


# What is asked


@on_both_loops
async def test_the_health_path_is_asked_for_with_the_service_in_host() -> None:
    received = bytearray()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert await reader.read() == b""

    async with backend(script) as there:
        assert await asker().ask(probe_of(there, "/up?deep=1"), PATIENCE) == (Result.OK, "")
    lines = bytes(received).split(b"\r\n")
    assert lines[0] == b"GET /up?deep=1 HTTP/1.1"
    fields = dict(line.split(b": ") for line in lines[1:-2])
    assert fields.pop(b"User-Agent").startswith(b"portero-py-probe/")
    assert fields == {
        b"Host": b"app.example",
        b"Accept": b"*/*",
        b"X-Forwarded-Proto": b"https",
        b"Connection": b"close",
    }


@pytest.mark.parametrize(
    ("service", "host"),
    [("*.app.example", b"probe.app.example"), ("::1", b"[::1]"), ("192.0.2.1", b"192.0.2.1")],
)
@on_both_loops
async def test_wildcards_and_addresses_are_asked_by_a_name_that_they_have(service: str, host: bytes) -> None:
    received = bytearray()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with backend(script) as there:
        assert await asker().ask(probe_of(there, service=service), PATIENCE) == (Result.OK, "")
    assert b"\r\nHost: %b\r\n" % host in received


@on_both_loops
async def test_one_that_hangs_is_asked_for_any_answer_at_all() -> None:
    received = bytearray()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\n\r\n")

    async with backend(script) as there:
        assert await asker().ask(probe_of(there, ""), PATIENCE) == (Result.OK, "")
    assert received.startswith(b"OPTIONS * HTTP/1.1\r\nHost: app.example\r\n")
    assert await no_answer_to_options() is Result.TIMEOUT


async def no_answer_to_options() -> Result:
    async with backend(silent) as there:
        result, _ = await asker().ask(probe_of(there, ""), SHORT)
        return result


@on_both_loops
async def test_a_connection_is_enough_where_nothing_else_was_named() -> None:
    async with backend(silent) as there:
        assert await asker().ask(connecting(there), PATIENCE) == (Result.OK, "")


@on_both_loops
async def test_a_backend_at_an_ipv6_address_is_asked() -> None:
    async with backend(answer(b"HTTP/1.1 200 OK\r\n\r\n"), host="::1") as there:
        assert await asker().ask(probe_of(there), PATIENCE) == (Result.OK, "")


# What is answered


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",  # whose body never comes
        b"HTTP/1.0 299 Odd\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * MAX_INFORMATIONAL + b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nthat is no chunk",
    ],
)
@on_both_loops
async def test_a_2xx_is_a_success_whatever_its_body(raw: bytes) -> None:
    assert await asked(answer(raw)) == (Result.OK, "")


@on_both_loops
async def test_an_endless_body_is_not_read() -> None:
    written = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            written += 65536
            await writer.drain()

    assert await asked(endless) == (Result.OK, "")
    assert written < 64 << 20


@pytest.mark.parametrize("status", [101, 301, 302, 404, 500, 503])
@on_both_loops
async def test_any_other_status_is_none_and_redirects_are_not_followed(status: int) -> None:
    upgrade = b"Connection: upgrade\r\nUpgrade: chat\r\n" if status == 101 else b""
    raw = b"HTTP/1.1 %d Odd\r\nLocation: /\r\n%bContent-Length: 0\r\n\r\n" % (status, upgrade)
    assert await asked(answer(raw)) == (Result.BAD_STATUS, f"status {status} at /up")


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"<html>hello</html>\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + bytes(10) + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (MAX_FIELDS + 1) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * MAX_HEAD,
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INFORMATIONAL + 1),
    ],
    ids=["ssh", "tls", "html", "http2", "lf", "lengths", "zeros", "fields", "endless", "informational"],
)
@on_both_loops
async def test_what_a_client_would_not_get_is_no_success(raw: bytes) -> None:
    result, said = await asked(answer(raw))
    assert result is Result.BAD_RESPONSE
    assert said.startswith("the answer is no HTTP: ")


@on_both_loops
async def test_who_talks_first_speaks_no_http() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    # It may come before or after the question: never is anything raised.
    result, _ = await asked(greet)
    assert result in (Result.BAD_RESPONSE, Result.OK)


@on_both_loops
async def test_a_head_that_comes_byte_by_byte_is_read_while_there_is_time() -> None:
    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n":
            writer.write(bytes([byte]))
            await asyncio.sleep(0.001)

    assert await asked(slowly) == (Result.OK, "")


@on_both_loops
async def test_all_of_it_has_to_happen_in_time() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.05)

    assert await asked(drip, SHORT) == (Result.TIMEOUT, "no answer within 1 s")
    assert await asked(silent, SHORT) == (Result.TIMEOUT, "no answer within 1 s")


@on_both_loops
async def test_a_time_out_that_comes_late_says_nothing_about_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe_connection, "LATE", -1.0)
    result, _ = await asked(silent, SHORT)
    assert result is Result.NO_VERDICT


@on_both_loops
async def test_an_end_before_the_answer_is_none() -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 O")

    said = "the connection was closed before an answer"
    assert await asked(leave) == (Result.CLOSED, said)

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    assert await asked(reset) == (Result.CLOSED, said)


# No connection


@on_both_loops
async def test_a_refused_connection_is_told_from_one_that_cannot_be_made() -> None:
    async with backend(silent) as there:
        pass
    assert await asker().ask(probe_of(there), PATIENCE) == (Result.REFUSED, "connection refused")
    nowhere = Backend("255.255.255.255", 80)
    result, said = await asker().ask(probe_of(nowhere), PATIENCE)
    assert result is Result.UNREACHABLE
    assert said


@on_both_loops
async def test_a_full_backlog_is_a_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        address = full.getsockname()
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        there = Backend(*address)
        assert await asker().ask(connecting(there), SHORT) == (
            Result.TIMEOUT,
            "no connection within 1 s",
        )


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """There is no descriptor left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@on_both_loops
async def test_without_descriptors_nothing_is_said_about_the_backend() -> None:
    async with backend(silent) as there:
        with no_descriptors():
            result, said = await asker().ask(probe_of(there), PATIENCE)
    assert (result, said) == (Result.NO_VERDICT, "Too many open files")


# TLS


def server_tls(folder: Path, *, signed: bool) -> ssl.SSLContext:
    (SIGNED if signed else SELF_SIGNED).write(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "fullchain.pem", folder / "privkey.pem")
    return context


OK = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@on_both_loops
async def test_over_tls_the_name_is_the_services_and_nothing_is_verified_unless_asked(tmp_path: Path) -> None:
    names: list[object] = []
    context = server_tls(tmp_path, signed=False)
    context.sni_callback = lambda _tls, name, _context: names.append(name)
    async with backend(OK, tls=context) as there:
        for probe in (probe_of(there), connecting(there), probe_of(there, service="*.app.example")):
            assert await asker().ask(probe, PATIENCE) == (Result.OK, "")
    assert names == ["app.example", "app.example", "probe.app.example"]


@on_both_loops
async def test_verification_holds_for_probes_as_for_traffic(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(AUTHORITY.pem)
    one = asker(Proxy(upstream_tls_verify=True, upstream_ca_file=str(ca_file)))
    async with backend(OK, tls=server_tls(tmp_path, signed=True)) as there:
        assert await one.ask(probe_of(there), PATIENCE) == (Result.OK, "")
        result, said = await one.ask(probe_of(there, service="other.example"), PATIENCE)
        assert (result, said[:5]) == (Result.TLS, "TLS: ")
    async with backend(OK, tls=server_tls(tmp_path, signed=False)) as there:
        assert (await one.ask(connecting(there), PATIENCE))[0] is Result.TLS


@on_both_loops
async def test_a_pin_holds_for_probes_as_for_traffic(tmp_path: Path) -> None:
    async with backend(OK, tls=server_tls(tmp_path, signed=False)) as there:
        pinned = Backend(there.host, there.port, use_tls=True, tls_fingerprint=SELF_SIGNED.fingerprint)
        assert await asker().ask(probe_of(pinned), PATIENCE) == (Result.OK, "")
        other = Backend(there.host, there.port, use_tls=True, tls_fingerprint="ab" * 32)
        for probe in (probe_of(other), connecting(other)):
            result, said = await asker().ask(probe, PATIENCE)
            assert (result, "pinned" in said) == (Result.TLS, True)


@on_both_loops
async def test_who_does_not_speak_tls_fails_by_it() -> None:
    async with backend(OK) as there:
        spoken = Backend(there.host, there.port, use_tls=True)
        # What comes instead of a server hello, or nothing until the time is up: both are failures.
        result, _ = await asker().ask(probe_of(spoken), 1.0)
    assert result in (Result.TLS, Result.CLOSED, Result.TIMEOUT)


@on_both_loops
async def test_a_handshake_that_hangs_is_a_time_out() -> None:
    async with backend(silent) as there:
        spoken = Backend(there.host, there.port, use_tls=True)
        assert (await asker().ask(connecting(spoken), SHORT))[0] is Result.TIMEOUT


@on_both_loops
async def test_those_that_are_given_up_as_their_handshakes_end_leave_no_fault_behind(tmp_path: Path) -> None:
    made = probe_connection._Answer.connection_made
    connected = 0

    def give_up(self: probe_connection._Answer, transport: asyncio.BaseTransport) -> None:
        nonlocal connected
        connected += 1
        made(self, transport)
        if connected == 5:
            for task in asking:
                task.cancel()

    async with backend(OK, tls=server_tls(tmp_path, signed=True)) as there:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe_connection._Answer, "connection_made", give_up)
            asking = [asyncio.create_task(asker().ask(probe_of(there), PATIENCE)) for _ in range(20)]
            await asyncio.wait(asking)
            assert any(task.cancelled() for task in asking)
        await asyncio.sleep(0.05)


@on_both_loops
async def test_without_anything_to_verify_by_nothing_is_said_about_the_backend(tmp_path: Path) -> None:
    def no_tls() -> UpstreamTls:
        raise ConfigError("--upstream-ca-file: cannot read it")

    async with backend(OK, tls=server_tls(tmp_path, signed=True)) as there:
        result, said = await Asker(no_tls, "http").ask(probe_of(there), PATIENCE)
    assert (result, said) == (Result.NO_VERDICT, "--upstream-ca-file: cannot read it")


def test_a_wildcards_certificate_covers_the_name_that_it_is_asked_by() -> None:
    assert host_of("*.app.example") == "probe.app.example"
    assert host_of("app.example") == "app.example"
