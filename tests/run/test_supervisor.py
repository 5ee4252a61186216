"""The running proxy as its operator sees it: start, signals, reload, stop. Real processes on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from portero_py.client.registrar import Api, Registrar, Registration
from portero_py.config.model import Address, Config, Limits, Log, Proxy, Timeouts, Tls
from portero_py.demo.self_signed import Authority
from portero_py.run.live_configuration import waiting_for_restart

SECRET, KEY = "a-shared-secret", "k" * 32
PATIENCE = 60.0


class Portero:
    """One `portero-py` process and what it said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def said(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until that many lines match; the last match."""
        async with asyncio.timeout(PATIENCE):
            while True:
                found = [match for line in self.lines if (match := re.search(pattern, line))]
                if len(found) >= times:
                    return found[times - 1]
                if self._reading.done():
                    raise AssertionError(f"no {pattern!r} in {self.lines}")
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), 0.5)

    async def ports(self) -> tuple[int, int]:
        """The ports of the proxy and of the registration API."""
        match = await self.said(r"https? on \S*?:(\d+)[;,].*registration on \S*:(\d+)")
        return int(match[1]), int(match[2])

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE):
            status = await self.process.wait()
            await self._reading
        return status

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode().rstrip("\n"))
            self._news.set()


class Start:
    """Starts porteros that end with the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Portero] = []

    async def __call__(
        self, *flags: str, tls: bool = False, environ: dict[str, str] | None = None
    ) -> Portero:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "portero_py", "--listen-addr=127.0.0.1:0", "--register-addr=127.0.0.1:0"),
            *([f"--tls-cert-dir={self.directory / 'certs'}"] if tls else ["--no-tls"]),
            *flags,
            env={**os.environ, "REGISTER_SECRET": SECRET, "JWT_HMAC_KEY": KEY, **(environ or {})},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self.started.append(Portero(process))
        return self.started[-1]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    starter = Start(tmp_path)
    yield starter
    for portero in starter.started:
        await portero.kill()
        assert not [line for line in portero.lines if "Traceback" in line or "never" in line]


@pytest.fixture
async def slow_backend() -> AsyncIterator[tuple[int, asyncio.Event, asyncio.Event]]:
    """A backend's port, the event that a request has come, and the event for which it waits to answer."""
    arrived, answer = asyncio.Event(), asyncio.Event()

    async def serve(request: web.BaseRequest) -> web.Response:
        arrived.set()
        await answer.wait()
        return web.Response(text="finished")

    runner = web.ServerRunner(web.Server(serve), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "::1", 0).start()
    yield runner.addresses[0][1], arrived, answer
    answer.set()
    await runner.cleanup()


def backend_at(port: int) -> Registration:
    return Registration("app.example", "::1", port)


async def status_of(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status


@contextlib.asynccontextmanager
async def request_that_hangs(
    portero: Portero, slow_backend: tuple[int, asyncio.Event, asyncio.Event]
) -> AsyncIterator[None]:
    """One exchange in flight that the backend does not answer."""
    backend_port, arrived, _ = slow_backend
    port, api_port = await portero.ports()
    async with aiohttp.ClientSession() as session:
        api = Api(f"http://127.0.0.1:{api_port}", SECRET, KEY)
        await Registrar(api, backend_at(backend_port), session).register()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n")
        await arrived.wait()
        yield
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_a_signal_ends_an_idle_proxy_with_status_0(
        self, start: Start, number: signal.Signals
    ) -> None:
        portero = await start()
        await portero.ports()
        portero.process.send_signal(number)
        assert await portero.ended() == 0
        assert portero.lines[-1].endswith("stopped")

    async def test_exchanges_in_flight_finish_while_nothing_new_is_taken(
        self, start: Start, slow_backend: tuple[int, asyncio.Event, asyncio.Event]
    ) -> None:
        backend_port, arrived, answer = slow_backend
        portero = await start()
        port, api_port = await portero.ports()
        api_url = f"http://127.0.0.1:{api_port}"
        registrar = Registrar(Api(api_url, SECRET, KEY), backend_at(backend_port))
        async with aiohttp.ClientSession() as session, registrar:
            assert await status_of(f"{api_url}/readyz") == 200
            headers = {"Host": "app.example"}
            request = asyncio.create_task(session.get(f"http://127.0.0.1:{port}/", headers=headers))
            await arrived.wait()
            portero.process.terminate()
            await portero.said("stopping: exchanges in flight have 30 s")
            assert await status_of(f"{api_url}/readyz") == 503
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            # A backend may still renew, and say goodbye, while its last exchange runs.
            await registrar.register()
            await registrar.deregister()
            answer.set()
            response = await request
            assert (response.status, await response.text()) == (200, "finished")
            response.close()
        assert await portero.ended() == 0

    async def test_a_drain_is_over_after_its_time(
        self, start: Start, tmp_path: Path, slow_backend: tuple[int, asyncio.Event, asyncio.Event]
    ) -> None:
        (tmp_path / "c.toml").write_text("[timeouts]\ndrain = 0.2\n")
        portero = await start(f"--config={tmp_path / 'c.toml'}")
        async with request_that_hangs(portero, slow_backend):
            portero.process.terminate()
            assert await portero.ended() == 0

    async def test_a_second_signal_ends_everything_at_once(
        self, start: Start, slow_backend: tuple[int, asyncio.Event, asyncio.Event]
    ) -> None:
        portero = await start()
        async with request_that_hangs(portero, slow_backend):
            portero.process.terminate()
            await portero.said("stopping")
            portero.process.terminate()
            # `ended` is less patient than the drain, which has 30 s.
            assert await portero.ended() == 1
        assert "told to stop again" in portero.lines[-1]


class TestReload:
    async def test_times_limits_and_the_log_change_at_once(self, start: Start, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text("")
        portero = await start(f"--config={file}")
        port, _ = await portero.ports()
        assert await status_of(f"http://127.0.0.1:{port}/{'x' * 5000}") == 404
        file.write_text("[limits]\nrequest_line = 300\n")
        portero.process.send_signal(signal.SIGHUP)
        await portero.said("configuration read again")
        assert await status_of(f"http://127.0.0.1:{port}/{'x' * 5000}") == 414

    async def test_what_cannot_change_live_is_named_without_its_value(
        self, start: Start, tmp_path: Path
    ) -> None:
        file = tmp_path / "c.toml"
        file.write_text("")
        portero = await start(f"--config={file}")
        await portero.ports()
        file.write_text('[registration]\naudience = "hush"\n[proxy]\ndefault_service = "a.example"\n')
        portero.process.send_signal(signal.SIGHUP)
        await portero.said("waiting for a restart: registration.audience$")
        assert not any("hush" in line for line in portero.lines)

    async def test_a_bad_file_changes_nothing_and_says_why(self, start: Start, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text("[limits]\nrequest_line = 300\n")
        portero = await start(f"--config={file}")
        port, _ = await portero.ports()
        file.write_text("[limits]\nrequest_lien = 300\n")
        portero.process.send_signal(signal.SIGHUP)
        await portero.said(r'stays as it was: .*"limits.request_lien": the nearest is "limits.request_line"')
        assert await status_of(f"http://127.0.0.1:{port}/{'x' * 500}") == 414
        portero.process.terminate()
        assert await portero.ended() == 0

    async def test_certificates_are_scanned_again(self, start: Start, tmp_path: Path) -> None:
        authority = Authority()
        authority.issue("one.example").write(tmp_path / "certs" / "one.example")
        portero = await start(tls=True)
        await portero.said("certificate loaded: one.example")
        await portero.ports()
        authority.issue("two.example").write(tmp_path / "certs" / "two.example")
        portero.process.send_signal(signal.SIGHUP)
        await portero.said("certificate loaded: two.example")

    def test_only_keys_that_changed_and_cannot_change_live_wait(self) -> None:
        running = Config()
        read = Config(
            proxy=Proxy(listen=(Address("", 1),), default_service="x"),
            tls=Tls(min_version="1.3"),
            timeouts=Timeouts(head=1),
            limits=Limits(h2_streams=1),
            log=Log(level="debug"),
            state_dir="/s",
        )
        assert waiting_for_restart(running, read) == [
            "proxy.listen",
            "tls.min_version",
            "state_dir",
        ]
        assert waiting_for_restart(running, running) == []


class TestSystemd:
    async def test_systemd_hears_of_ready_reload_watchdog_and_stop(
        self, start: Start, tmp_path: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(tmp_path / "notify"))
            notify.setblocking(False)
            loop = asyncio.get_running_loop()

            async def hears(beginning: bytes) -> None:
                async with asyncio.timeout(PATIENCE):
                    while not (await loop.sock_recv(notify, 999)).startswith(beginning):
                        pass

            environ = {"NOTIFY_SOCKET": notify.getsockname(), "WATCHDOG_USEC": "200000"}
            portero = await start(environ=environ)
            await hears(b"READY=1\nSTATUS=http on 127.0.0.1:")
            await hears(b"WATCHDOG=1")
            portero.process.send_signal(signal.SIGHUP)
            await hears(b"RELOADING=1\nMONOTONIC_USEC=")
            await hears(b"READY=1")
            portero.process.terminate()
            await hears(b"STOPPING=1")
            assert await portero.ended() == 0


class TestPlainHttp:
    async def test_it_redirects_to_the_port_of_the_proxy(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "certs").mkdir()
        portero = await start("--http-addr=127.0.0.1:0", tls=True)
        port, _ = await portero.ports()
        http = int((await portero.said(r"; http on \S*:(\d+)"))[1])
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{http}/a?b", allow_redirects=False) as response,
        ):
            assert response.headers["Location"] == f"https://127.0.0.1:{port}/a?b"


class TestStartErrors:
    @pytest.mark.parametrize(
        ("flags", "line"),
        [
            (["--listen-addr=nonsense"], '--listen-addr: "nonsense" has no port from 0 to 65535'),
            (["--config=/nonexistent.toml"], "--config: cannot read /nonexistent.toml: No such file"),
            (["--register-secret="], "--register-secret is missing"),
            (["--workers=many"], '--workers: must be auto or a whole number from 1 to 1024, not "many"'),
            (["--frobnicate"], "No such option: --frobnicate"),
            (["frobnicate"], "No such command 'frobnicate'"),
            (["--upstream-tls-verify", "--upstream-ca-file=/nonexistent"], "--upstream-ca-file: cannot read"),
            (["--register-addr=192.0.2.1:1"], "--register-addr: cannot listen on 192.0.2.1:1: this machine"),
        ],
    )
    async def test_they_are_one_clear_line_and_status_2(
        self, start: Start, flags: list[str], line: str
    ) -> None:
        environ = {"REGISTER_SECRET": ""} if "--register-secret=" in flags else {}
        portero = await start(*flags, environ=environ)
        assert await portero.ended() == 2
        complaints = [said for said in portero.lines if said.startswith("portero-py: ")]
        assert complaints == portero.lines[-1:]
        assert line in complaints[0]

    async def test_a_taken_port_is_such_a_line_too(self, start: Start) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            portero = await start(f"--http-addr=127.0.0.1:{taken.getsockname()[1]}")
            assert await portero.ended() == 2
        assert "--http-addr: cannot listen on 127.0.0.1:" in portero.lines[-1]
        assert portero.lines[-1].endswith("the port is taken by another process")

    async def test_so_is_a_certificate_directory_that_is_not_there(self, start: Start) -> None:
        portero = await start(tls=True)
        assert await portero.ended() == 2
        assert portero.lines == [
            f"portero-py: --tls-cert-dir: cannot read {start.directory / 'certs'}: No such file or directory"
        ]

    async def test_so_is_the_example_s_secret_outside_loopback(self, start: Start) -> None:
        portero = await start("--register-addr=0.0.0.0:0", environ={"REGISTER_SECRET": "changeme"})
        assert await portero.ended() == 2
        assert len(portero.lines) == 1
        assert 'is the example "changeme"' in portero.lines[0]

    async def test_so_is_a_ca_file_that_holds_no_certificate(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text("nothing")
        portero = await start("--upstream-tls-verify", f"--upstream-ca-file={tmp_path / 'ca.pem'}")
        assert await portero.ended() == 2
        assert portero.lines[-1].startswith("portero-py: ")
        assert str(tmp_path / "ca.pem") in portero.lines[-1]


class TestExample:
    async def test_its_backend_registers_serves_and_leaves(self, start: Start) -> None:
        portero = await start()
        port, api_port = await portero.ports()
        example = await asyncio.create_subprocess_exec(
            *(sys.executable, Path(__file__).parents[2] / "examples" / "backend.py", "app.example"),
            env={
                **os.environ,
                "PORTERO_REGISTER_URL": f"http://127.0.0.1:{api_port}",
                "PORTERO_REGISTER_SECRET": SECRET,
                "PORTERO_JWT_HMAC_KEY": KEY,
            },
            stderr=asyncio.subprocess.DEVNULL,
        )
        await portero.said("registered: app.example at http://")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/path", headers={"Host": "app.example"}) as response,
        ):
            assert await response.text() == "Hello 127.0.0.1, you asked app.example for /path\n"
        example.terminate()
        assert await example.wait() == 0
        await portero.said("deregistered: app.example")


class TestWarnings:
    async def test_unverified_backends_are_named_once_at_the_start(self, start: Start) -> None:
        portero = await start()
        await portero.ports()
        assert len([line for line in portero.lines if "--upstream-tls-verify" in line]) == 1

    async def test_no_line_of_the_log_holds_a_secret(self, start: Start) -> None:
        portero = await start(environ={"PORTERO_LOG": "debug"})
        _, api_port = await portero.ports()
        api = Api(f"http://127.0.0.1:{api_port}", SECRET, KEY)
        async with Registrar(api, backend_at(8000)):
            pass
        await portero.said("deregistered: app.example")
        assert not [line for line in portero.lines if SECRET in line or KEY in line or "eyJ" in line]
