"""curl, asked for whole answers of hosts that only one proxy knows."""

from __future__ import annotations

import subprocess
from pathlib import Path


def ask_by_curl(
    program: str, ca_file: Path, port: int, version: str, host: str, path: str = "/", *flags: str
) -> str:
    """Head and body of an answer in `version` (--http2), the names of fields in lower case."""
    command = [program, "-sS", "-i", version, "--path-as-is", "--cacert", str(ca_file), "-m", "60"]
    command += ["--noproxy", "*", "--resolve", f"{host}:{port}:127.0.0.1", *flags]
    command.append(f"https://{host}:{port}{path}")
    done = subprocess.run(command, capture_output=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    head, _, body = done.stdout.decode().partition("\r\n\r\n")
    while head.split(" ")[1] == "100":
        head, _, body = body.partition("\r\n\r\n")
    lines = [line.partition(": ") for line in head.split("\r\n")]
    return "\r\n".join([name.lower() + colon + value for name, colon, value in lines]) + "\r\n\r\n" + body
