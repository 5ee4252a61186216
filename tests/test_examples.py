"""examples/compose.yaml says what we read: its labels, its commands, its variables, its networks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import typer

from portero_py.cli.main import app
from portero_py.client.discovery.containers import Options, parse, wanted
from portero_py.client.discovery.labels import Reading, Wish, read
from portero_py.config.model import Config
from portero_py.config.sources import SETTINGS
from tests.client.discovery.inspections import inspection
from tests.e2e.http1_client import Http1Client, get
from tests.e2e.proxy_process import free_port
from tests.e2e.waiting import PATIENCE, eventually

EXAMPLES = Path(__file__).parent.parent / "examples"
SOCKET = "/var/run/docker.sock"


@pytest.fixture
def compose() -> Any:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return yaml.safe_load((EXAMPLES / "compose.yaml").read_text())


def test_the_labels_are_a_service_and_nothing_is_wrong_with_them(compose: Any) -> None:
    found = read(compose["services"]["app"]["labels"])
    assert found == Reading((Wish("app.localhost", 8000, "front"),))


def test_a_replica_as_compose_starts_it_is_registered_where_the_proxy_reaches_it(compose: Any) -> None:
    name, service = compose["name"], compose["services"]["app"]
    labels = {**service["labels"], "com.docker.compose.project": name}
    networks = {f"{name}_{each}": f"172.18.0.{2 + number}" for number, each in enumerate(service["networks"])}
    # The image exposes the ports of the proxy, too.
    said = inspection("app-1", labels, networks=networks, ports=("8443/tcp", "18080/tcp"), health="healthy")
    container = parse(said)
    assert container is not None
    found = wanted(container, Options())
    assert [(each.host, each.port) for each in found.registrations] == [("172.18.0.2", 8000)]
    assert found.complaints == ()
    assert set(service["networks"]) <= set(compose["services"]["proxy"]["networks"])


def test_its_commands_are_commands(compose: Any) -> None:
    root: Any = typer.main.get_command(app)
    context = root.make_context("portero-py", list(compose["services"]["proxy"]["command"]))
    assert context.params["no_tls"]
    name, *rest = compose["services"]["discover"]["command"]
    assert root.commands[name].commands[rest[0]].make_context(name, rest[1:]).params["register_url"] == (
        "http://proxy:18080"
    )


def test_what_it_sets_are_variables_that_the_program_reads(compose: Any) -> None:
    known = {name for setting in SETTINGS for name in setting.variables}
    for name in ("proxy", "discover"):
        assert set(compose["services"][name]["environment"]) <= known


def test_only_who_watches_docker_has_its_socket_and_nobody_reaches_him(compose: Any) -> None:
    services = compose["services"]
    having = [name for name, each in services.items() if SOCKET in str(each.get("volumes", ""))]
    assert having == ["discover"]
    assert "ports" not in services["discover"]
    assert set(services["discover"]["networks"]) == {"control"}
    assert "control" not in services["app"]["networks"]


def test_it_has_two_replicas_and_time_to_end(compose: Any) -> None:
    services, timeouts = compose["services"], Config().timeouts
    assert services["app"]["deploy"]["replicas"] == 2
    grace = int(services["proxy"]["stop_grace_period"].removesuffix("s"))
    assert grace > timeouts.drain + timeouts.shutdown
    (seconds,) = re.findall(r"^GRACE = (\d+)$", (EXAMPLES / "plain_app.py").read_text(), re.MULTILINE)
    assert int(services["app"]["stop_grace_period"].removesuffix("s")) > int(seconds)


def test_the_files_and_networks_that_it_names_are_there(compose: Any) -> None:
    for service in compose["services"].values():
        assert set(service["networks"]) <= set(compose["networks"])
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source == SOCKET or (EXAMPLES / source).is_file()


def test_the_commands_in_its_head_are_about_itself(compose: Any) -> None:
    head = (EXAMPLES / "compose.yaml").read_text().partition("\nname: ")[0]
    for name in re.findall(r"--scale (\w+)=", head):
        assert name in compose["services"]
    needed = set(re.findall(r"\$\{(\w+):\?", (EXAMPLES / "compose.yaml").read_text()))
    assert needed == set(re.findall(r"(\w+)=\$\(", head))


@pytest.mark.e2e
def test_the_plain_app_answers_what_it_was_asked_before_it_ends() -> None:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "plain_app.py")],
        env={**os.environ, "HOST": "127.0.0.1", "PORT": str(port)},
    ) as process:
        try:
            eventually(lambda: _answers(port), "it serves")
            with Http1Client(("127.0.0.1", port)) as client:
                client.send(get("app.localhost", "/slow"))
                threading.Timer(0.3, process.send_signal, [signal.SIGTERM]).start()
                assert client.read_response().status == 200
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def _answers(port: int) -> bool:
    try:
        with Http1Client(("127.0.0.1", port)) as client:
            return client.ask(get("app.localhost", "/up")).status == 200
    except OSError:
        return False
