"""`portero-py demo` on its own: it says what to type, that works when typed, and Ctrl-C ends everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

PATIENCE = 80.0

pytestmark = pytest.mark.e2e


class Demo:
    """A running demo in a process group of its own, as a terminal would have it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""

    async def until(self, text: str) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while text not in self.said:
                line = await self.process.stdout.readline()
                assert line, f"the demo ended:\n{self.said}"
                self.said += line.decode()
        return self.said

    async def ended(self) -> int:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            self.said += (await self.process.stdout.read()).decode()
            return await self.process.wait()

    def descendants(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]

    def curl_lines(self) -> list[str]:
        """The commands, continuation lines joined."""
        tour = self.said[self.said.index("Try, in another terminal") :].replace("\\\n", " ")
        return [line.strip() for line in tour.splitlines() if line.startswith("  curl ")]


@contextlib.asynccontextmanager
async def demo(directory: Path, **environ: str) -> AsyncIterator[Demo]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "portero_py", "demo", f"--directory={directory}"),
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        process_group=0,
    )
    running = Demo(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            for child in running.descendants():
                os.kill(child, signal.SIGKILL)
            process.kill()
            await running.ended()


async def shell(line: str) -> str:
    process = await asyncio.create_subprocess_shell(
        line, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(PATIENCE):
        out, _ = await process.communicate()
    assert process.returncode == 0, line
    return out.decode()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
async def test_every_line_that_it_prints_works_when_pasted(tmp_path: Path) -> None:
    async with demo(tmp_path) as running:
        await running.until("Ctrl-C ends everything.")
        answers = [await shell(line) for line in running.curl_lines()]
        h2, h1, events, redirect, backends, metrics, by_hand, after = answers
        assert {h2.split("\n")[0], h1.split("\n")[0]} == {"Hello from coral", "Hello from teal"}
        assert "X-Forwarded-Proto: https" in h2
        assert [line[:13] for line in events.split("\n\n") if line] == [
            f"data: event {n}" for n in range(1, 6)
        ]
        assert re.search(r"^Location: https://app.localhost:\d+/some/page\?x=1\r$", redirect, re.MULTILINE)
        assert backends.count('"instance_id"') == 3
        assert "portero_registry_backends 3.0" in metrics
        assert '"status":"registered"' in by_hand
        assert after.startswith("Hello from")
        children = running.descendants()
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0
        assert "HTTP/2 200" in running.said
        assert "HTTP/1.1 200" in running.said
        assert children
        assert not any(is_alive(child) for child in children)
        assert "Traceback" not in running.said


async def test_when_its_ports_are_taken_it_uses_others_and_the_caller_s_variables_do_not_disturb_it(
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        for port in (8443, 8080, 18080):
            with contextlib.suppress(OSError):  # somebody else has it: just as well
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        variables = {"LISTEN_ADDR": "nonsense", "PORTERO_CONFIG": "/nonexistent", "REGISTER_SECRET": "x"}
        async with demo(tmp_path, **variables) as running:
            said = await running.until("Ctrl-C ends everything.")
            assert re.search(r"port 8443 \(https\) is taken: using \d+", said)
            running.process.send_signal(signal.SIGTERM)
            assert await running.ended() == 0


async def test_it_ends_with_status_1_when_the_proxy_does(tmp_path: Path) -> None:
    async with demo(tmp_path) as running:
        await running.until("Ctrl-C ends everything.")
        (proxy,) = running.descendants()
        os.kill(proxy, signal.SIGKILL)
        assert await running.ended() == 1
        assert "the proxy ended by itself" in running.said


async def test_a_directory_that_cannot_be_written_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with demo(tmp_path / "file") as running:
        assert await running.ended() == 2
        assert running.said.startswith("portero-py: cannot write to ")
        assert running.said.count("\n") == 1
