"""`portero-py discover docker` in a process of its own, with its log kept and judged."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.proxy_process import FAULTS, KEY, PROXY, SECRET, ProxyProcess, clean_environment
from tests.e2e.waiting import PATIENCE, eventually


class DiscoverProcess:
    """`with`: it watches the Docker at `host` for `proxy`. At the end: status 0, and a log without faults."""

    def __init__(self, folder: Path, proxy: ProxyProcess, host: str, flags: Sequence[str] = ()) -> None:
        self._command = [*PROXY, "discover", "docker", "--ttl", "9", *flags]
        self._environment = clean_environment(
            {
                "PORTERO_REGISTER_SECRET": SECRET,
                "PORTERO_JWT_HMAC_KEY": KEY,
                "PORTERO_API": f"http://127.0.0.1:{proxy.register_port}",
                "DOCKER_HOST": host,
            }
        )
        self._path = folder / "discover.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DiscoverProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> DiscoverProcess:
        """Start, and wait until it has listed what runs."""
        before = self.log().count("containers with our labels")
        with self._path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        eventually(
            lambda: self.log().count("containers with our labels") > before or self._process_ended(),
            "Docker is watched",
        )
        assert not self._process_ended(), self.log()
        return self

    def stop(self) -> None:
        """SIGTERM."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.crash()
            raise AssertionError(f"it did not end:\n{self.log()}") from None
        assert status == 0, self.log()
        found = [fault for fault in FAULTS if fault in self.log()]
        assert not found, self.log()

    def crash(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def log(self) -> str:
        """What it has written."""
        return self._path.read_text() if self._path.exists() else ""

    # Private

    def _process_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None
