"""examples/compose.yaml, run by a real dockerd: replicas are scaled up and down, and its load loses nothing.

There is no Compose here and no registry, so the test does what Compose would do with the file, and the image
is this machine's Python with the sources, at the places where they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.proxy_process import KEY, SECRET
from tests.e2e.waiting import eventually
from tests.slow.dockerd import APART, IMAGE, Dockerd, dockerd

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"

#: What the image holds, and where.
MOUNTS = ["/usr", "/lib", "/lib64", "/etc/passwd", sys.base_prefix, sys.prefix, str(ROOT)]
#: Who runs in it, and what its Dockerfile sets.
USER = "10001"
SET = re.findall(r"(PORTERO_(?:LISTEN|REGISTER)_ADDR=\S+)", (ROOT / "Dockerfile").read_text())


class Compose:
    """The services of the file as containers."""

    def __init__(self, docker: Dockerd, said: Any) -> None:
        self.docker = docker
        self.name: str = said["name"]
        self._services: dict[str, Any] = said["services"]
        # What Compose would ask the shell for.
        socket = Path(docker.host.removeprefix("unix://"))
        self._asked = {
            "PORTERO_REGISTER_SECRET": SECRET,
            "PORTERO_JWT_HMAC_KEY": KEY,
            "DOCKER_GID": str(socket.stat().st_gid),
        }
        self._numbers = dict.fromkeys(self._services, 0)
        for network in said["networks"]:
            docker("network", "create", f"{self.name}_{network}")

    def up(self, service: str) -> str:
        """Start one container of a service; its name."""
        said = self._services[service]
        self._numbers[service] += 1
        name = f"{self.name}-{service}-{self._numbers[service]}"
        labels = {
            **said.get("labels", {}),
            "com.docker.compose.project": self.name,
            "com.docker.compose.service": service,
        }
        flags = ["--name", name, "--hostname", name, "--user", f"{USER}:{USER}", "--restart=no"]
        flags += [f"--label={key}={value}" for key, value in labels.items()]
        flags += [f"--group-add={self._filled(group)}" for group in said.get("group_add", ())]
        flags += [f"--env={each}" for each in SET]
        flags += [f"--env={key}={self._filled(value)}" for key, value in said.get("environment", {}).items()]
        flags += [f"--volume={path}:{path}:ro" for path in dict.fromkeys(MOUNTS) if Path(path).exists()]
        flags += [f"--volume={self._volume(volume)}" for volume in said.get("volumes", ())]
        flags += self._health(said.get("healthcheck", {}))
        first, *others = [f"{self.name}_{network}" for network in said["networks"]]
        entrypoint = said.get("entrypoint", ["portero-py"])
        program = {
            "python": [sys.executable],
            "portero-py": [sys.executable, "-P", "-m", "portero_py"],
        }[entrypoint[0]]
        command = [*program, *entrypoint[1:], *said["command"]]
        self.docker(
            *("create", *flags, "--network", first, "--network-alias", service, "--entrypoint", command[0]),
            *(IMAGE, *command[1:]),
        )
        for network in others:
            self.docker("network", "connect", "--alias", service, network, name)
        self.docker("start", name)
        return name

    def stop(self, *names: str) -> None:
        """All at once, with the time that the file gives them, as Compose does."""
        grace = self._services["app"]["stop_grace_period"].removesuffix("s")
        stopping = [
            subprocess.Popen(["docker", "--host", self.docker.host, "stop", "-t", grace, name])
            for name in names
        ]
        assert [each.wait(120) for each in stopping] == [0] * len(names)
        self.docker("rm", *names)

    def logs(self) -> str:
        """What they all said last."""
        names = self.docker("ps", "--all", "--format", "{{.Names}}").split()
        said = [f"{name}:\n{self.docker('logs', '--tail', '20', name)}" for name in names]
        return "\n".join([self.docker("ps", "--all"), *said])

    # Private

    def _volume(self, volume: str) -> str:
        source, _, rest = volume.partition(":")
        if source == "/var/run/docker.sock":
            source = self.docker.host.removeprefix("unix://")
        return f"{(EXAMPLES / source).resolve()}:{rest}"

    def _filled(self, value: str) -> str:
        name = re.match(r"\$\{(\w+)", value)
        return self._asked[name[1]] if name else value

    @staticmethod
    def _health(said: dict[str, Any]) -> list[str]:
        if "test" not in said:
            return []
        kind, program, *arguments = said["test"]
        assert (kind, program) == ("CMD", "python")
        # The command line of docker's knows the shell's form only.
        quoted = " ".join(f"'{each}'" for each in (sys.executable, *(a.replace("'", '"') for a in arguments)))
        return [
            *("--health-cmd", quoted, "--health-interval", said["interval"]),
            *("--health-timeout", "20s", "--health-retries", str(said["retries"])),
        ]


@pytest.fixture
def compose() -> Iterator[Compose]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    with dockerd(APART) as docker:
        yield Compose(docker, yaml.safe_load((EXAMPLES / "compose.yaml").read_text()))


def test_replicas_are_scaled_up_and_down_under_load_and_nothing_is_lost(compose: Compose) -> None:
    compose.up("proxy")
    compose.up("discover")
    apps = [compose.up("app") for _ in range(2)]
    load = compose.up("load")

    def all_answer() -> None:
        # Exactly these, in a line that is not written yet.
        before = len(_lines(compose, load))
        try:
            eventually(
                lambda: any(_who(line) == set(apps) for line in _lines(compose, load)[before:]),
                f"answers of {apps}",
                180,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{compose.logs()}") from None

    all_answer()
    apps += [compose.up("app") for _ in range(3)]
    all_answer()
    leaving, apps = apps[:4], apps[4:]
    compose.stop(*leaving)
    all_answer()
    lines = _lines(compose, load)
    assert {line.partition(" - ")[0] for line in lines} == {"lost 0"}, lines


def _lines(compose: Compose, load: str) -> list[str]:
    return compose.docker("logs", load).splitlines()


def _who(line: str) -> set[str]:
    return set(re.findall(r"([\w-]+): \d+", line))
