"""What keeps the proxy from starting is one line on stderr and exit status 2; `--check` starts nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.proxy_process import KEY, SECRET, ProxyProcess, clean_environment, free_port


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        yield taken.getsockname()[1]


def _start_up(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    secrets = {"PORTERO_REGISTER_SECRET": SECRET, "PORTERO_JWT_HMAC_KEY": KEY, **environment}
    return subprocess.run(
        [sys.executable, "-m", "portero_py", *flags],
        env=clean_environment({name: value for name, value in secrets.items() if value}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _says(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2 and one line that says what is wrong."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if " WARNING " not in line and " INFO " not in line]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def _plain(*flags: str, port: int | None = None, register: str = "") -> list[str]:
    listen, register = f"127.0.0.1:{port or free_port()}", register or f"127.0.0.1:{free_port()}"
    return ["--no-tls", "--listen-addr", listen, "--register-addr", register, *flags]


def test_a_bad_address_is_one_line(tmp_path: Path) -> None:
    _says(_start_up("--no-tls", "--listen-addr", "nonsense"), "listen-addr", "nonsense")
    _says(_start_up("--no-tls", "--listen-addr", "127.0.0.1:99999"), "listen-addr", "99999")
    _says(_start_up("--no-tls", "--register-addr", "[::1:80"), "register-addr")


def test_a_taken_port_is_one_line(taken_port: int) -> None:
    _says(_start_up(*_plain(port=taken_port)), "listen-addr", str(taken_port))
    flags = (
        "--no-tls",
        "--listen-addr",
        f"127.0.0.1:{free_port()}",
        "--register-addr",
        f"127.0.0.1:{taken_port}",
    )
    _says(_start_up(*flags), "register-addr", str(taken_port))


def test_a_missing_secret_is_one_line() -> None:
    _says(_start_up(*_plain(), PORTERO_REGISTER_SECRET=""), "register-secret")
    _says(_start_up(*_plain(), PORTERO_JWT_HMAC_KEY=""), "jwt-hmac-key")


def test_the_example_secret_is_refused_outside_loopback() -> None:
    flags = (
        "--no-tls",
        "--listen-addr",
        f"127.0.0.1:{free_port()}",
        "--register-addr",
        f"0.0.0.0:{free_port()}",
    )
    _says(_start_up(*flags, PORTERO_REGISTER_SECRET="changeme"), "changeme")
    _says(_start_up(*flags, PORTERO_JWT_HMAC_KEY="changeme"), "changeme")


def test_a_certificate_directory_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    flags = ("--listen-addr", f"127.0.0.1:{free_port()}", "--register-addr", f"127.0.0.1:{free_port()}")
    (tmp_path / "file").write_text("no directory")
    for path in (tmp_path / "file", tmp_path / "missing"):
        _says(_start_up(*flags, "--tls-cert-dir", str(path)), str(path))


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    file = tmp_path / "portero.toml"
    file.write_text("[timeouts]\nkeepalive = 5\n")
    _says(_start_up(*_plain("--config", str(file))), str(file), "keepalive", "keep_alive")
    file.write_text("[timeouts\n")
    _says(_start_up(*_plain("--config", str(file))), str(file))
    file.write_text('[timeouts]\nhead = "soon"\n')
    _says(_start_up(*_plain("--config", str(file))), "head")
    _says(_start_up(*_plain("--config", str(tmp_path / "missing.toml"))), "missing.toml")


def test_a_bad_flag_ends_with_status_2() -> None:
    for flags in (
        ("--no-such-flag",),
        ("--workers", "0"),
        ("--workers", "many"),
        ("--tls-min-version", "1.0"),
    ):
        done = _start_up(*_plain(*flags))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert flags[0].lstrip("-") in done.stderr


def test_a_secret_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    file = str(tmp_path / "secret")
    _says(_start_up(*_plain(), PORTERO_REGISTER_SECRET="", PORTERO_REGISTER_SECRET_FILE=file), file)


def test_check_and_start_refuse_the_same_with_the_same_words(
    certificate_folder: Path, tmp_path: Path, taken_port: int
) -> None:
    (tmp_path / "empty").touch()
    public = "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"
    port = str(free_port())
    good: tuple[tuple[str, ...], dict[str, str]] = (("--tls-cert-dir", str(certificate_folder)), {})
    for flags, environment in (
        ((*good[0],), {"PORTERO_JWT_HMAC_KEY": public}),
        ((*good[0], "--upstream-tls-verify", "--upstream-ca-file", str(tmp_path / "empty")), {}),
        ((*good[0], "--state-dir", str(tmp_path / "empty")), {}),
        ((*good[0], "--state-dir", "/proc/1/nothing"), {}),
        ((*good[0], "--http-addr", f"127.0.0.1:{port}"), {}),
        (("--tls-cert-dir", str(tmp_path / "empty")), {}),
        ((*good[0], "--acme-domain", "a.example", "--acme-agree-tos"), {}),
        ((*good[0], "--jwt-named-key", "no-key"), {}),
        ((*good[0], "--acme-directory", "https://[x"), {}),
    ):
        common = ("--listen-addr", f"127.0.0.1:{port}", "--register-addr", f"127.0.0.1:{free_port()}", *flags)
        start = _start_up(*common, **environment)
        check = _start_up("--check", *common, **environment)
        _says(start)
        _says(check)
        assert check.stdout == ""
        complaint = check.stderr.splitlines()[-1].replace("--check", "")
        assert start.stderr.splitlines()[-1] == complaint


def test_check_leaves_a_missing_state_directory_to_the_start(
    certificate_folder: Path, tmp_path: Path
) -> None:
    state = tmp_path / "var" / "state"
    flags = ("--tls-cert-dir", str(certificate_folder), "--state-dir", str(state))
    done = _start_up("--check", *flags)
    assert done.returncode == 0, done.stderr
    assert f"state: {state}, which is missing: the start makes it\n" in done.stdout
    assert not state.parent.exists()
    proxy = ProxyProcess(
        tmp_path / "proxy", certificates=certificate_folder, flags=("--state-dir", str(state))
    )
    proxy.start()
    try:
        assert state.stat().st_mode & 0o777 == 0o700
        proxy.stop()
    finally:
        proxy.kill()


@pytest.mark.parametrize("command", ["certs", "--help"])
def test_a_reader_that_has_heard_enough_causes_no_traceback(command: str, certificate_folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "portero_py", command],
        env=clean_environment({"PORTERO_TLS_CERT_DIR": str(certificate_folder)}),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_check_says_what_it_found_and_starts_nothing(certificate_folder: Path, tmp_path: Path) -> None:
    flags = ("--check", "--listen-addr", f"127.0.0.1:{free_port()}")
    done = _start_up(*flags, "--tls-cert-dir", str(certificate_folder))
    assert done.returncode == 0, done.stderr
    for name in ("*.e2e.test", "one.other.test", "two.other.test"):
        assert name in done.stdout
    (tmp_path / "broken.test").mkdir()
    (tmp_path / "broken.test" / "fullchain.pem").write_text("no certificate")
    done = _start_up(*flags, "--tls-cert-dir", str(tmp_path))
    assert done.returncode == 2
    assert "broken.test" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
