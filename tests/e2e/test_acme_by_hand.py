"""The five lines of docs/certificates.md that try ACME by hand, pasted as they are, on other ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.proxy_process import KEY, SECRET, clean_environment, free_port

PAGE = Path(__file__).parents[2] / "docs" / "certificates.md"


def test_the_five_lines_bring_a_certificate(tmp_path: Path, need: Callable[[str], str]) -> None:
    for program in ("pebble", "pebble-challtestsrv", "openssl", "bash"):
        need(program)
    found = re.search(r"try it with Pebble,.*?```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    script = found[1]
    assert script.count("\n") == 5
    for port in ("14000", "8443", "8053", "8055"):
        assert port in script
        script = script.replace(port, str(free_port()))
    script = script.replace("/tmp/tour", str(tmp_path))
    (tmp_path / "certs").mkdir()
    environment = clean_environment(
        {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PORTERO_REGISTER_SECRET": SECRET,
            "PORTERO_JWT_HMAC_KEY": KEY,
            "PORTERO_REGISTER_ADDR": f"127.0.0.1:{free_port()}",
        }
    )
    with subprocess.Popen(
        ["bash", "-uc", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    ) as shell:
        assert shell.stdout is not None
        said = ""
        try:
            for line in shell.stdout:
                said += line
                if "the listener at" in line or "nothing listens" in line:
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    assert re.search(
        r"certificate shop\.example: shop\.example; until .*\n  issuer: Pebble .*; by ACME", said
    ), said
    assert re.search(r"ok: the listener at \S+ presents it", said), said


pytestmark = pytest.mark.timeout(90)
