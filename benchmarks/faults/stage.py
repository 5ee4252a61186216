"""The stage of a run: a scratch folder, two pairs for one name, backends that can be told to fail, the load.

Whatever is started here ends when the block is left. Processes are not pinned to cores: nothing here is a
measurement of speed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.faults import ledger
from benchmarks.faults.connections import HOST
from benchmarks.faults.ledger import Tally
from benchmarks.faults.load import PATIENCE
from benchmarks.machine import program
from benchmarks.stage import BenchError, free_port, stop


class Backend:
    """A running backend process (backend.py)."""

    def __init__(self, stage: Stage, port: int) -> None:
        self.port = port
        command = [sys.executable, "-m", "benchmarks.faults.backend"]
        command += ["--port", str(port), "--posts", str(stage.folder / "posts")]
        with (stage.folder / "backends.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        stage.processes.append(self.process)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def tell(self, command: str) -> None:
        """Let it obey. BenchError: it is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{command}\n".encode())
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError as error:
            raise BenchError(f"a backend did not take {command!r}: {error}") from error
        if answer != b"ok\n":
            raise BenchError(f"a backend did not do {command!r}: status {self.process.poll()}")

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self) -> None:
        """Until it has ended. BenchError: it does not."""
        try:
            self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise BenchError("a backend does not leave") from error


class Load:
    """A running load (load.py)."""

    def __init__(self, stage: Stage, port: int, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.faults.load", "--port", str(port)]
        command += ["--certificates", str(stage.trusted), *arguments]
        with (stage.folder / "load.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        stage.processes.append(self.process)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            raise BenchError("the load does not start")

    def finish(self) -> Tally:
        """Let it end, and its counts. BenchError: it counts wrong or does not end."""
        try:
            out, _ = self.process.communicate(b"stop\n", timeout=2 * PATIENCE + 30)
        except subprocess.TimeoutExpired as error:
            raise BenchError("the load does not end") from error
        if self.process.returncode:
            raise BenchError(f"the load ended with status {self.process.returncode}")
        return Tally(**json.loads(out))


class Stage:
    """The scratch folder, and what runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        #: The pair that a peer is to serve: as portero-py wants it, and as one file.
        self.pair = folder / "certs" / HOST
        self.pem = folder / "pair.pem"
        self.trusted = folder / "trusted.pem"
        self._pairs = [_make_pair(folder / f"pair-{number}") for number in (0, 1)]
        self.trusted.write_bytes(b"".join((pair / "fullchain.pem").read_bytes() for pair in self._pairs))
        self.pair.mkdir(parents=True)
        self.install_pair(0)

    def install_pair(self, turn: int) -> None:
        """Put the one pair or the other where the peers look, each file by a rename."""
        pair = self._pairs[turn % 2]
        for name in ("fullchain.pem", "privkey.pem"):
            shutil.copy(pair / name, self.pair / f".{name}")
            (self.pair / f".{name}").replace(self.pair / name)
        both = (pair / "fullchain.pem").read_bytes() + (pair / "privkey.pem").read_bytes()
        write(self.pem, both)

    def start_backend(self, port: int = 0) -> Backend:
        """One that accepts; on the port of one that is gone, or on a free one."""
        backend = Backend(self, port or free_port())
        backend.tell("accept")
        return backend

    def start_load(self, port: int, *arguments: str) -> Load:
        return Load(self, port, arguments)

    def spawn(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        descriptors: int = 0,
    ) -> subprocess.Popen[bytes]:
        """Start a proxy; `descriptors`: as many as it may open. BenchError: it is not installed."""
        path = program(command[0])
        if path is None:
            raise BenchError(f"{command[0]} is not installed")
        limit = [str(program("prlimit")), f"--nofile={descriptors}:{descriptors}"] if descriptors else []
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*limit, path, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                pass_fds=pass_fds,
                start_new_session=True,  # `stop` reaches everything that it starts
            )
        self.processes.append(process)
        return process

    def repeated(self) -> int:
        """How many POSTs too many the backends carried out."""
        posts = self.folder / "posts"
        return ledger.repeated(posts.read_text().split()) if posts.exists() else 0

    def last_words(self) -> str:
        """The ends of the logs."""
        lines = []
        for log in sorted(self.folder.glob("*.log")):
            lines += [f"  {log.stem}: {line}" for line in log.read_text(errors="replace").splitlines()[-8:]]
        return "\n".join(lines)


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """A stage for one run; what fails on it is told with the last lines of the logs."""
    with tempfile.TemporaryDirectory(prefix="portero-faults-") as scratch:
        made = Stage(Path(scratch))
        try:
            yield made
        except BenchError as error:
            raise BenchError(f"{error}\n{made.last_words()}") from error
        finally:
            for process in made.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGCONT)
            stop(made.processes)
            for process in made.processes:
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()


def write(path: Path, data: bytes | str) -> Path:
    """The whole file at once, by a rename."""
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(data.encode() if isinstance(data, str) else data)
    return beside.replace(path)


def await_end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the process has ended; after so many seconds it is killed."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def until(what: str, is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    """Until calling `is_so` says yes. BenchError: it does not."""
    give_up = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > give_up:
            raise BenchError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)


# Private


def _make_pair(folder: Path) -> Path:
    folder.mkdir()
    openssl = ["openssl", "req", "-x509", "-nodes", "-days", "30"]
    openssl += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/CN={HOST}"]
    openssl += ["-addext", f"subjectAltName=DNS:{HOST},IP:127.0.0.1"]
    out = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run([*openssl, *out], check=True, capture_output=True, timeout=30)
    return folder
