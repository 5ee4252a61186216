"""The commands as a shell sees them: text on stdout, one line on stderr, an exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from portero_py import __version__
from portero_py.cli import main
from portero_py.config.model import Registration
from portero_py.config.sources import SETTINGS
from portero_py.control.api.application import RegistrationApi
from portero_py.control.api.metrics import Metrics
from portero_py.control.leases import Leases
from portero_py.core.auth import TokenVerifier
from portero_py.core.model import Halt
from portero_py.core.policies import ServicePolicy
from portero_py.core.registry import Registry
from portero_py.core.routes import Route, Routes
from portero_py.demo.self_signed import Authority, self_signed
from portero_py.feed.feed import Feed

SECRET, KEY = "a-shared-secret", "k" * 32
BACKEND = ("--service=app.example", "--host=::1", "--port=8000")


@dataclass(frozen=True, slots=True)
class Ended:
    status: int
    out: str
    err: str


async def portero(*arguments: str, environ: dict[str, str] | None = None) -> Ended:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "portero_py", *arguments),
        env={
            **os.environ,
            **({"REGISTER_SECRET": SECRET, "JWT_HMAC_KEY": KEY} if environ is None else environ),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


@dataclass(slots=True)
class RunningApi:
    registry: Registry
    url: str
    leases: Leases

    def states(self) -> list[str]:
        services = self.leases.table.services.values()
        return [lease.state.value for service in services for lease in service.leases]


@pytest.fixture
async def api() -> AsyncIterator[RunningApi]:
    """The real registration API on a loopback port."""
    registry, feed = Registry(), Feed()
    config = Registration(secret=SECRET, hmac_keys=(("", KEY), ("k2", "2" * 32)))
    metrics = Metrics(registry, feed.counters)
    leases = Leases(registry, feed, clock=time.monotonic, count_fault=metrics.fault)
    served = RegistrationApi(config, leases, metrics, clock=time.monotonic, wall_clock=time.time)
    await leases.start()
    runner = served.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield RunningApi(registry, f"--register-url=http://127.0.0.1:{runner.addresses[0][1]}", leases)
    await runner.cleanup()
    await leases.close()


class TestRoot:
    def test_the_version_is_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.run(["--version"]) == 0
        assert capsys.readouterr().out == f"portero-py {__version__}\n"

    def test_every_setting_s_flag_is_in_the_help_and_no_other(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main.run(["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        words = {line.split()[0] for line in lines if line.startswith("  --")}
        flags = {f"--{s.flag}" for s in SETTINGS if s.flag}
        flags |= {f"--{s.flag}-file" for s in SETTINGS if s.is_secret}
        assert words == flags | {"--config", "--check", "--version", "--help"}

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--frobnicate"], "portero-py: No such option: --frobnicate"),
            (["frobnicate"], "portero-py: No such command 'frobnicate'."),
            (["token"], "portero-py: Missing option '--service'."),
            (
                ["agent", *BACKEND, "--port=0"],
                "portero-py: Invalid value for '--port': ",
            ),
            (["--no-tls", "certs"], "portero-py: --no-tls stands before certs: its flags come after it"),
            (["explain", ""], 'portero-py: "" names no host'),
            (
                ["register", *BACKEND, "--register-url=ftp://x"],
                'portero-py: --register-url: "ftp://x" is no http',
            ),
            (
                ["deregister", "--service=a.example"],
                "portero-py: deregister needs --instance-id, or --host and --port",
            ),
            (
                ["drain", "--service=a.example", "--host=::1"],
                "portero-py: drain needs --host and --port together",
            ),
            (["ready", "--service=a.example", "--wait=301"], "portero-py: Invalid value for '--wait': "),
            (["pause", "--service=a.example"], "portero-py: Missing option '--seconds'."),
            (["pause", "--service=a.example", "--seconds=0"], "portero-py: Invalid value for '--seconds': "),
            (["resume"], "portero-py: Missing option '--service'."),
            (
                ["stop", "--service=a.example", "--message=\udcff"],
                'portero-py: --message: "\ufffd" is no text',
            ),
            (
                ["stop", "--service=a.example", "--api=ftp://x"],
                'portero-py: --register-url: "ftp://x" is no http',
            ),
            (["agent", *BACKEND, "--drain=-1"], "portero-py: Invalid value for '--drain': "),
            (
                ["register", *BACKEND, "--max-in-flight=-1"],
                "portero-py: Invalid value for '--max-in-flight': ",
            ),
        ],
    )
    def test_a_wrong_use_is_one_line_and_status_2(
        self,
        arguments: list[str],
        complaint: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("REGISTER_SECRET", SECRET)
        monkeypatch.setenv("JWT_HMAC_KEY", KEY)
        assert main.run(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(complaint)
        assert err.count("\n") == 1

    def test_a_missing_secret_says_where_it_may_come_from(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("JWT_HMAC_KEY", KEY)
        assert main.run(["register", *BACKEND]) == 2
        assert capsys.readouterr().err == (
            "portero-py: --register-secret is missing: set it, PORTERO_REGISTER_SECRET, "
            "or --register-secret-file FILE\n"
        )


class TestCheck:
    async def test_a_good_set_up_is_listed_with_status_0(self, tmp_path: Path) -> None:
        Authority().issue("app.example").write(tmp_path / "app.example")
        ended = await portero("--check", f"--tls-cert-dir={tmp_path}")
        assert ended.status == 0
        assert "listen: [::]:443\n" in ended.out
        assert "certificate app.example: app.example; until " in ended.out
        assert ended.out.endswith("all is well\n")

    async def test_services_are_listed_though_nobody_runs_to_compare_with(self, tmp_path: Path) -> None:
        file = tmp_path / "portero.toml"
        file.write_text(
            '[registration]\nlisten = "127.0.0.1:1"\n[tls]\nenabled = false\n'
            '[[service]]\nname = "a.example"\nbackends = ["127.0.0.1:8000", "localhost:8001"]\n'
        )
        ended = await portero("--check", f"--config={file}")
        assert ended.status == 0
        assert "services: 1 with 2 backend(s), 0 route(s)\nrunning: nothing to compare with: " in ended.out

    async def test_what_would_change_is_asked_of_the_api_that_runs(
        self, api: RunningApi, tmp_path: Path
    ) -> None:
        file = tmp_path / "portero.toml"
        file.write_text('[tls]\nenabled = false\n[[service]]\nname = "a.example"\nbalance = "source"\n')
        url = api.url.partition("=")[2]
        secrets = {"REGISTER_SECRET": SECRET, "JWT_HMAC_KEY": KEY}
        ended = await portero("--check", f"--config={file}", environ={**secrets, "PORTERO_API": url})
        assert ended.status == 0
        assert (
            "running: 2 change(s) to services and routes\n"
            "  service a.example is new\n"
            "  service a.example: balance: default -> source\n"
        ) in ended.out
        wrong = {**secrets, "REGISTER_SECRET": "another"}
        ended = await portero("--check", f"--config={file}", environ={**wrong, "PORTERO_API": url})
        assert ended.status == 0
        assert "the secret in X-Register-Secret is wrong" in ended.out
        assert SECRET not in ended.out
        assert ended.err == ""

    async def test_a_bad_certificate_beside_a_good_one_is_status_2(self, tmp_path: Path) -> None:
        Authority().issue("app.example").write(tmp_path / "app.example")
        self_signed("bad.example").write(tmp_path / "bad.example")
        (tmp_path / "bad.example" / "privkey.pem").write_bytes(self_signed("other.example").key_pem)
        ended = await portero("--check", f"--tls-cert-dir={tmp_path}")
        assert ended.status == 2
        assert "certificate app.example" in ended.out
        assert f"error: {tmp_path / 'bad.example'} cannot be used: " in ended.out

    async def test_a_bad_flag_is_one_line_and_status_2(self, tmp_path: Path) -> None:
        ended = await portero("--check", f"--tls-cert-dir={tmp_path}", "--http-addr=80")
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith('portero-py: --http-addr: "80" has no port')
        assert ended.err.count("\n") == 1

    async def test_it_binds_nothing(self, tmp_path: Path) -> None:
        Authority().issue("app.example").write(tmp_path / "app.example")
        ended = await portero("--check", f"--tls-cert-dir={tmp_path}", "--listen-addr=192.0.2.1:443")
        assert ended.status == 0


class TestCerts:
    async def test_names_expiry_days_and_origin_are_listed(self, tmp_path: Path) -> None:
        Authority().issue("app.example", "www.app.example", days=30).write(tmp_path / "app.example")
        ended = await portero("certs", f"--tls-cert-dir={tmp_path}", environ={})
        assert ended.status == 0
        day = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 30 * 86400))
        assert (
            f"app.example, www.app.example; until {day} (30 days left); {tmp_path / 'app.example'}"
            in ended.out
        )

    async def test_an_empty_directory_is_an_error(self, tmp_path: Path) -> None:
        ended = await portero("certs", f"--tls-cert-dir={tmp_path}", environ={})
        assert (ended.status, ended.out) == (2, f"error: no usable certificate in {tmp_path}\n")


class TestToken:
    async def test_it_is_one_that_portero_takes(self) -> None:
        ended = await portero("token", "--service=App.Example", "--ttl=60")
        verifier, now = TokenVerifier([("", KEY)]), time.time()
        assert verifier.verify(f"Bearer {ended.out.strip()}", now).service == "app.example"

    async def test_the_kid_chooses_among_the_named_keys(self) -> None:
        environ = {"PORTERO_JWT_NAMED_KEY": f"old={'1' * 32}\nnew={'2' * 32}", "JWT_HMAC_KEY": KEY}
        ended = await portero("token", "--service=app.example", "--jwt-kid=new", environ=environ)
        TokenVerifier([("new", "2" * 32)]).verify(f"Bearer {ended.out.strip()}", time.time())

    async def test_a_name_that_is_none_is_refused(self) -> None:
        ended = await portero("token", "--service=a b")
        assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)


class TestRegistration:
    async def test_a_backend_can_be_registered_explained_and_deregistered(self, api: RunningApi) -> None:
        ended = await portero("register", api.url, *BACKEND, "--ttl=30")
        assert ended.status == 0
        assert json.loads(ended.out)["expires_in"] == 30
        assert api.registry.lease_count == 1

        ended = await portero("explain", api.url, "https://user@APP.example:8443/path")
        assert ended.status == 0
        assert "service app.example, 1 backend(s)\n  instance_id=[::1]:8000" in ended.out

        for asked in ("app.example/a//b", "app.example:8443/?next=https://other.example/", "//app.example//"):
            assert (await portero("explain", api.url, asked)).status == 0

        ended = await portero("deregister", api.url, *BACKEND)
        assert ended.status == 0
        assert api.registry.lease_count == 0

        ended = await portero("explain", api.url, "app.example")
        assert (ended.status, ended.out) == (1, "app.example: service app.example, 0 backend(s): 503\n")
        ended = await portero("explain", api.url, "other.example")
        assert (ended.status, ended.out) == (1, "other.example: no such service: 404\n")

    async def test_a_refusal_is_one_line_and_status_1(self, api: RunningApi) -> None:
        ended = await portero(
            "register", api.url, *BACKEND, environ={"REGISTER_SECRET": "x", "JWT_HMAC_KEY": KEY}
        )
        assert (ended.status, ended.out) == (1, "")
        assert ": 403: the secret in X-Register-Secret is wrong" in ended.err
        assert ended.err.count("\n") == 1

    async def test_so_is_a_proxy_that_does_not_run(self) -> None:
        ended = await portero("register", "--register-url=http://127.0.0.1:1", *BACKEND)
        assert (ended.status, ended.err.count("\n")) == (1, 1)
        ended = await portero("explain", "--register-url=http://127.0.0.1:1", "app.example")
        assert (ended.status, ended.err.count("\n")) == (1, 1)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_the_agent_holds_the_lease_until_it_is_told_to_stop(
        self, api: RunningApi, number: signal.Signals
    ) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "portero_py", "agent", api.url, *BACKEND, "--ttl=1", "--instance-id=one"),
            env={**os.environ, "REGISTER_SECRET": SECRET, "JWT_HMAC_KEY": KEY},
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        async with asyncio.timeout(20):
            assert b"app.example is registered as one" in await process.stderr.readline()
            lease = first = api.registry.find("app.example", "one")
            while lease == first:  # until it was renewed
                await asyncio.sleep(0.02)
                lease = api.registry.find("app.example", "one")
            assert lease is not None
            process.send_signal(number)
            assert await process.wait() == 0
            assert await process.stderr.read() == b""
        assert api.registry.lease_count == 0

    async def test_an_agent_that_is_refused_ends_with_status_1(self, api: RunningApi) -> None:
        ended = await portero(
            "agent", api.url, *BACKEND, environ={"REGISTER_SECRET": "x", "JWT_HMAC_KEY": KEY}
        )
        assert ended.status == 1
        assert ended.err.count("\n") == 1

    async def test_what_a_backend_says_of_itself_arrives(self, api: RunningApi) -> None:
        said = ("--health-path=/up", "--max-in-flight=7")
        assert (await portero("register", api.url, *BACKEND, *said, "--json")).status == 0
        lease = api.registry.find("app.example", "", "::1", 8000)
        assert lease is not None
        assert (lease.health_path, lease.max_in_flight) == ("/up", 7)

    async def test_explain_speaks_json_too(self, api: RunningApi) -> None:
        await portero("register", api.url, *BACKEND)
        ended = await portero("explain", api.url, "app.example", "--json")
        found = json.loads(ended.out)
        assert (ended.status, found["host"]) == (0, "app.example")
        assert [each["port"] for each in found["service"]["backends"]] == [8000]
        ended = await portero("explain", api.url, "other.example", "--json")
        assert (ended.status, json.loads(ended.out)) == (1, {"host": "other.example", "service": None})

    async def test_explain_follows_routes_and_names_policies(self, api: RunningApi) -> None:
        routes = Routes(
            [
                Route("www.example", "/api", "app.example", strip_path=True),
                Route("www.example", "", redirect="https://example$uri", status=301),
                Route("lost.example", "", "gone.example"),
            ]
        )
        api.registry.configure({"app.example": ServicePolicy(balance="source")}, routes, 0.0)
        await portero("register", api.url, *BACKEND)
        ended = await portero("explain", api.url, "https://www.example/api/x?y=1")
        assert ended.status == 0
        assert ended.out.startswith(
            "www.example: route www.example/api, asked for as /x?y=1: service app.example, 1 backend(s)\n"
            "  balance: source\n  instance_id="
        )
        ended = await portero("explain", api.url, "www.example/api?y")
        assert "asked for as /?y" in ended.out
        ended = await portero("explain", api.url, "www.example/apis?y")
        assert (ended.status, ended.out) == (
            0,
            "www.example: route www.example: 301 to https://example/apis?y\n",
        )
        ended = await portero("explain", api.url, "lost.example")
        assert (ended.status, ended.out) == (
            1,
            "lost.example: route lost.example: no such service: 404\n",
        )
        ended = await portero("explain", api.url, "www.example/api", "--json")
        found = json.loads(ended.out)
        assert (found["route"]["path"], found["service"]["service_name"]) == ("/api", "app.example")
        ended = await portero("explain", api.url, "www.example", "--json")
        assert json.loads(ended.out)["route"]["redirect"] == "https://example$uri"

    async def test_deregister_waits_and_says_what_is_in_flight(self, api: RunningApi) -> None:
        await portero("register", api.url, *BACKEND)
        ended = await portero("deregister", api.url, *BACKEND, "--wait=20", "--json")
        assert (ended.status, json.loads(ended.out)["in_flight"]) == (0, 0)


class TestActions:
    """drain, ready, pause, stop and resume; what waiting is, is in tests/e2e/test_drain.py."""

    async def test_one_backend_is_drained_and_made_ready(self, api: RunningApi) -> None:
        await portero("register", api.url, *BACKEND, "--instance-id=one")
        url = api.url.replace("--register-url", "--api")
        ended = await portero("drain", url, "--service=APP.example", "--instance-id=one", "--wait=20")
        assert ended == Ended(0, "app.example at [::1]:8000 (one): draining, 0 in flight\n", "")
        assert api.states() == ["draining"]
        ended = await portero("ready", url, *BACKEND, "--json")
        assert ended.status == 0
        assert json.loads(ended.out) == {
            "service_name": "app.example",
            "backends": [
                {
                    "service_name": "app.example",
                    "instance_id": "one",
                    "host": "::1",
                    "port": 8000,
                    "state": "ready",
                    "in_flight": 0,
                }
            ],
        }
        assert api.states() == ["ready"]

    async def test_without_a_backend_all_of_the_service_are_meant(self, api: RunningApi) -> None:
        for port in (8000, 8001):
            await portero("register", api.url, "--service=app.example", "--host=127.0.0.1", f"--port={port}")
        await portero("register", api.url, "--service=other.example", "--host=127.0.0.1", "--port=8002")
        ended = await portero("drain", api.url, "--service=App.example", "--wait=20")
        assert ended == Ended(
            0,
            "app.example at 127.0.0.1:8000: draining, 0 in flight\n"
            "app.example at 127.0.0.1:8001: draining, 0 in flight\n",
            "",
        )
        assert api.states() == ["draining", "draining", "ready"]
        ended = await portero("ready", api.url, "--service=app.example")
        assert (ended.status, ended.out.count(": ready, ")) == (0, 2)
        assert api.states() == ["ready", "ready", "ready"]

    async def test_where_nothing_is_meant_the_status_is_1(self, api: RunningApi) -> None:
        ended = await portero("drain", api.url, "--service=app.example")
        assert ended == Ended(1, "app.example: no backend\n", "")
        ended = await portero("drain", api.url, *BACKEND)
        assert (ended.status, ended.out) == (1, "")
        assert ": 404: no such lease for app.example" in ended.err
        ended = await portero("pause", api.url, "--service=app.example", "--seconds=5")
        assert (ended.status, ended.err.count("\n")) == (1, 1)
        assert ": 404: no such service: app.example" in ended.err

    async def test_ready_that_is_not_there_in_time_is_status_1(self, api: RunningApi) -> None:
        await portero("register", api.url, *BACKEND, "--health-path=/up")
        ended = await portero("ready", api.url, *BACKEND, "--wait=0.05")
        assert ended == Ended(1, "app.example at [::1]:8000: starting, 0 in flight\n", "")

    async def test_a_service_is_paused_stopped_and_resumed(self, api: RunningApi) -> None:
        await portero("register", api.url, *BACKEND)
        name = "--service=App.example"
        ended = await portero("pause", api.url, name, "--seconds=7.5")
        assert ended == Ended(0, "app.example: paused: a request is held for up to 7.5 s\n", "")
        assert api.leases.table.services["app.example"].halt == Halt(7.5)
        ended = await portero("stop", api.url, name, "--message=back at \u2153", "--json")
        assert json.loads(ended.out)["message"] == "back at \u2153"
        assert api.leases.table.services["app.example"].halt == Halt(None, "back at \u2153")
        assert await portero("stop", api.url, name) == Ended(0, "app.example: stopped\n", "")
        assert await portero("resume", api.url, name) == Ended(0, "app.example: serving\n", "")
        assert api.leases.table.services["app.example"].halt is None

    async def test_they_need_the_secret_and_no_key(self, api: RunningApi) -> None:
        await portero("register", api.url, *BACKEND)
        ended = await portero("drain", api.url, *BACKEND, environ={"REGISTER_SECRET": SECRET})
        assert ended.status == 0
        ended = await portero("ready", api.url, *BACKEND, environ={"REGISTER_SECRET": "wrong"})
        assert ended.status == 1
        assert ": 403: the secret in X-Register-Secret is wrong" in ended.err
        assert api.states() == ["draining"]
        ended = await portero("ready", api.url, *BACKEND, environ={"REGISTER_SECRET": ""})
        assert (ended.status, ended.out) == (2, "")

    async def test_the_api_may_be_named_by_a_variable(self, api: RunningApi) -> None:
        await portero("register", api.url, *BACKEND)
        for name in ("PORTERO_API", "PORTERO_REGISTER_URL"):
            environ = {"REGISTER_SECRET": SECRET, name: api.url.partition("=")[2]}
            assert (await portero("drain", *BACKEND, environ=environ)).status == 0

    async def test_a_proxy_that_does_not_run_is_one_line_and_status_1(self) -> None:
        ended = await portero("drain", "--api=http://127.0.0.1:1", *BACKEND)
        assert (ended.status, ended.out, ended.err.count("\n")) == (1, "", 1)
