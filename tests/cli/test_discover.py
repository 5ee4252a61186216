"""`discover docker` as a shell sees it: where it looks for Docker, and what it says when it cannot begin."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from portero_py.cli import main
from portero_py.cli.discover import find
from portero_py.errors import ConfigError

ENVIRON = {"REGISTER_SECRET": "a-shared-secret", "JWT_HMAC_KEY": "k" * 32}


@pytest.mark.parametrize(
    ("given", "environ", "shown"),
    [
        ("", {}, "unix:///var/run/docker.sock"),
        ("", {"DOCKER_HOST": "unix:///run/user/1000/docker.sock"}, "unix:///run/user/1000/docker.sock"),
        ("tcp://10.0.0.1:2375", {"DOCKER_HOST": "unix:///x"}, "tcp://10.0.0.1:2375"),
        ("", {"DOCKER_HOST": ""}, "unix:///var/run/docker.sock"),
        ("", {"DOCKER_TLS_VERIFY": "1"}, "unix:///var/run/docker.sock"),
    ],
)
def test_docker_is_found_as_docker_s_own_commands_find_it(
    given: str, environ: dict[str, str], shown: str
) -> None:
    assert find(given, environ).shown == shown


def test_tls_is_what_the_variables_say(tmp_path: Path) -> None:
    assert find("tcp://docker", {}).url == "http://docker:2375"
    environ = {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path)}
    with pytest.raises(ConfigError, match=rf"^DOCKER_CERT_PATH: {tmp_path}: "):
        find("tcp://docker", environ)
    assert find("unix:///docker.sock", environ).url == "http://docker"


@pytest.mark.parametrize(
    ("arguments", "environ", "complaint"),
    [
        (["--docker=ssh://host"], ENVIRON, "portero-py: --docker: ssh:// is not spoken here"),
        (["--docker=docker.sock"], ENVIRON, "portero-py: --docker: 'docker.sock' is neither unix:///path"),
        (["--host-address=here"], ENVIRON, 'portero-py: --host-address: "here" is no IP address'),
        (["--ttl=1"], ENVIRON, "portero-py: Invalid value for '--ttl'"),
        (["--api=x"], ENVIRON, 'portero-py: --register-url: "x" is no http'),
        (["--network=a\nb"], ENVIRON, "portero-py: --network: "),
        ([], {}, "portero-py: "),
        ([], {"REGISTER_SECRET": "a-shared-secret"}, "portero-py: "),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(
    arguments: list[str],
    environ: dict[str, str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [*ENVIRON, "PORTERO_REGISTER_SECRET", "PORTERO_JWT_HMAC_KEY"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main.run(["discover", "docker", *arguments]) == 2
    found = capsys.readouterr()
    assert (found.out, found.err.count("\n")) == ("", 1)
    assert found.err.startswith(complaint)


def test_discover_alone_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["discover"]) == 2
    assert "portero-py: Missing command" in capsys.readouterr().err


async def test_without_docker_and_without_a_proxy_it_waits_for_both_until_it_is_told_to_end(
    tmp_path: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "portero_py", "discover", "docker", "--api=http://127.0.0.1:1"),
        env={**os.environ, **ENVIRON, "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    async with asyncio.timeout(60):
        line = await process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, rest = await process.communicate()
    assert f"unix://{tmp_path}/docker.sock: ".encode() in line
    assert line.endswith(b"; it is tried again, leases are kept\n")
    assert (process.returncode, out) == (0, b"")
    assert b"0 leases are left" in rest


def test_whoever_has_no_home_has_no_certificates_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(ConfigError, match=r"DOCKER_CERT_PATH: ~/\.docker"):
        find("tcp://docker", {"DOCKER_TLS_VERIFY": "1"})
