"""A real dockerd of one's own, with a network and a small image, in a folder that goes with it.

It needs root, and leaves alone what the machine may have: no docker0, no iptables, a socket of its own. Where
it cannot be started the test is skipped, and says why.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.waiting import PATIENCE, eventually

IMAGE = "portero-test"
NETWORKS = {"shop_front": "10.213.77.0/24", "shop_back": "10.213.78.0/24"}

#: PID 1 of a container, for which a signal without a trap does not exist.
#: `patient` serves on after SIGTERM until it is killed, `brisk` listens no more and ends a second later.
_PATIENT = """#!/bin/sh
exec httpd -f -p 8080 -h /www
"""
_BRISK = """#!/bin/sh
httpd -f -p 8080 -h /www &
trap 'kill $!; sleep 1; exit 0' TERM
wait
"""
_WHO = """#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
hostname
"""
_SLOW = """#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
sleep 0.3
hostname
"""


#: Makes dockerd's network one of its own, with an address for a Swarm, where the machine's rules say nothing.
APART = (
    *("unshare", "--net", "sh", "-euc"),
    (
        "ip link set lo up; ip link add eth0 type veth peer name eth1; "
        'ip address add 10.213.76.1/24 dev eth0; ip link set eth0 up; ip link set eth1 up; exec "$@"'
    ),
    "sh",
)


class Dockerd:
    """One dockerd in `folder`. Containers live on while it is stopped, unless it is to be in a Swarm."""

    def __init__(
        self, folder: Path, program: str, prefix: Sequence[str] = (), *, swarm: bool = False
    ) -> None:
        self._folder = folder
        self._program = [*prefix, program]
        self._swarm = swarm
        self._process: subprocess.Popen[bytes] | None = None
        self.host = f"unix://{folder}/docker.sock"

    def start(self) -> None:
        """Start, and wait until it answers."""
        folder = self._folder
        with (folder / "dockerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(*self._program, "--host", self.host, "--pidfile", str(folder / "pid")),
                    *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                    *("--bridge=none", "--ip-masq=false"),
                    # A Swarm needs the one, and forbids the other.
                    *(() if self._swarm else ("--iptables=false", "--live-restore")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        eventually(lambda: self._process_ended() or self._answers(), "dockerd answers")
        if self._process_ended():
            log_lines = (folder / "dockerd.log").read_text(errors="replace").splitlines()
            pytest.skip(
                f"dockerd cannot be started here: {log_lines[-1] if log_lines else 'no reason given'}"
            )

    def stop(self) -> None:
        """SIGTERM."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __call__(self, *arguments: str) -> str:
        """Run one command of docker's; what it printed."""
        done = self._run(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        # `logs` has both.
        return (done.stdout + (done.stderr if arguments[0] == "logs" else b"")).decode().strip()

    def import_image(self) -> None:
        """An image of busybox and little else, which exposes 8080."""
        busybox = shutil.which("busybox")
        assert busybox is not None
        held = io.BytesIO()
        with tarfile.open(fileobj=held, mode="w") as image:
            _add(image, "bin/busybox", Path(busybox).read_bytes())
            for name in ("sh", "httpd", "hostname", "sleep", "test", "touch", "rm", "kill"):
                link = tarfile.TarInfo(f"bin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                image.addfile(link)
            for name, text in (("patient", _PATIENT), ("brisk", _BRISK)):
                _add(image, f"bin/{name}", text.encode())
            for name, text in (("who", _WHO), ("slow", _SLOW)):
                _add(image, f"www/cgi-bin/{name}", text.encode())
            _add(image, "www/index.html", b"hello\n")
        done = self._run("import", "--change", "EXPOSE 8080", "-", IMAGE, given=held.getvalue())
        assert done.returncode == 0, done.stderr

    # Private

    def _run(self, *arguments: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["docker", "--host", self.host, *arguments],
            input=given,
            capture_output=True,
            timeout=2 * PATIENCE,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(self._folder)},
        )

    def _process_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _answers(self) -> bool:
        return self._run("version").returncode == 0


@contextmanager
def dockerd(prefix: Sequence[str] = (), *, swarm: bool = False) -> Iterator[Dockerd]:
    """One that runs, with its image and networks; or the test is skipped."""
    if os.geteuid() != 0:
        pytest.skip("dockerd needs root")
    found = {name: shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") for name in _NEEDED}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    # Not in pytest's own folder: a unix socket's path has 108 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="portero-dockerd-"))
    docker = Dockerd(folder, str(found["dockerd"]), prefix, swarm=swarm)
    try:
        docker.start()
        try:
            docker.import_image()
            for network, subnet in NETWORKS.items():
                docker("network", "create", "--subnet", subnet, network)
            yield docker
        finally:
            containers = docker("ps", "--all", "--quiet").split()
            if containers:
                docker("rm", "--force", *containers)
            for network in docker("network", "ls", "--filter", "type=custom", "--quiet").split():
                docker("network", "rm", network)
    finally:
        docker.stop()
        _unmount(folder)
        shutil.rmtree(folder)


# Private


_NEEDED = ("dockerd", "docker", "busybox")


def _unmount(folder: Path) -> None:
    """What a dockerd whose containers live on leaves mounted."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((each for each in mounts if each.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", mount], timeout=PATIENCE, check=True)


def _add(image: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o755
    image.addfile(entry, io.BytesIO(data))
