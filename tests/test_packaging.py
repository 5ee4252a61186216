"""What surrounds the program agrees with it: README, docs, changelog, units, image, workflows, scripts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import portero_py
from portero_py.cli.main import app
from portero_py.config.model import Config
from portero_py.config.sources import SETTINGS
from portero_py.control.api.metrics import Metrics
from portero_py.core.registry import Registry
from portero_py.feed.feed import Feed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TOP_LEVEL = {
    *("pyproject.toml", "portero_py", "tests", "certs.example", "systemd", "Dockerfile", "README.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "LICENSE", "benchmarks", "docs", "examples"),
    *(".github", ".ci", ".gitignore", ".dockerignore"),
}
#: systemd's own measure of what a service could do, in tenths: below 2.0 of 10.
EXPOSURE = 20


def section(title: str) -> str:
    """One `##` section of the README."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no section called {title}"
    return found[1]


def page(name: str) -> str:
    """A page of the documentation."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, without heads and rules."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for table in tables
        for line in table.splitlines()[2:]
    ]


def commands(text: str) -> str:
    """The shell blocks of a text, one after the other."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def project_files() -> list[str]:
    """What is, or is about to be, in the repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    listing = ["ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(
        [git, "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *listing],
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


# The README and docs/


def test_the_table_of_settings_names_every_flag_of_the_command_line_and_no_other() -> None:
    written = {re.findall(r"--[a-z-]+", row[0])[0] for row in rows(page("configuration"))}
    parameters = typer.main.get_command(app).params
    flags = {flag for each in parameters for flag in each.opts if flag.startswith("--")}
    assert written == flags - {"--help"}


def test_the_table_of_settings_names_every_variable_and_every_key_of_the_file() -> None:
    written = {re.findall(r"--[a-z-]+", row[0])[0]: row for row in rows(page("configuration"))}
    for setting in SETTINGS:
        if not setting.flag:
            continue
        row = written[f"--{setting.flag}"]
        assert re.findall(r"[A-Z_]{5,}", row[1]) == list(setting.variables), setting.flag
        assert f"`{setting.key}" in row[2], setting.flag
        if setting.is_secret:
            row = written[f"--{setting.flag}-file"]
            assert re.findall(r"[A-Z_]{5,}", row[1]) == [f"{name}_FILE" for name in setting.variables]
            assert f"`{setting.key}_file`" in row[2], setting.flag


def test_the_file_in_the_docs_holds_every_time_and_limit_with_its_default() -> None:
    example = re.search(r"```toml\n(.*?)```", page("configuration"), re.DOTALL)
    assert example
    config = Config()
    for name, values in tomllib.loads(example[1]).items():
        group = getattr(config, name)
        defaults = {key: getattr(group, key) for key in group.__slots__}
        assert values == {
            key: list(each) if isinstance(each, tuple) else each for key, each in defaults.items()
        }


def test_the_defaults_in_the_table_are_those_of_the_configuration() -> None:
    config = Config()
    defaults = {re.findall(r"--[a-z-]+", row[0])[0]: row[3] for row in rows(page("configuration"))}
    assert defaults["--listen-addr"] == f"`{config.proxy.listen[0]}`"
    assert defaults["--register-addr"] == f"`{config.registration.listen}`"
    assert defaults["--tls-cert-dir"] == f"`{config.tls.cert_dir}`"
    assert defaults["--tls-min-version"].startswith(f"`{config.tls.min_version}`")
    assert defaults["--access-log"].startswith(f"`{config.log.access}`")
    assert defaults["--log"].startswith(f"`{config.log.level}`")


def test_every_command_is_named_in_the_docs_and_no_other() -> None:
    written = re.search(r"^Commands: (.*?)(?:\n\n|\Z)", page("configuration"), re.MULTILINE | re.DOTALL)
    assert written
    names = {name.split()[0] for name in re.findall(r"`([a-z][^`]*)`", written[1])}
    assert names == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


async def test_every_metric_is_named_in_the_docs_and_no_other() -> None:
    text = (await Metrics(Registry(""), Feed().counters).scrape()).decode()
    kinds = dict(re.findall(r"^# TYPE (portero_\w+) (\w+)$", text, re.MULTILINE))
    assert set(re.findall(r"`(portero_\w+)`", page("operations"))) == set(kinds)


def test_every_dependency_has_its_sentence() -> None:
    written = [row[0] for row in rows(section("Dependencies"))]
    assert written == [re.split(r"[><=\[]", name)[0] for name in PROJECT["dependencies"]]


def test_every_link_to_a_file_leads_to_one() -> None:
    pages = [page for folder in (".", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(((?!https?://|#)[^)]+)\)", page.read_text()):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_the_figures_in_the_readme_are_those_of_the_last_run() -> None:
    rows = {
        "HTTP/1.1, small": "h1 plain keep-alive, small",
        "HTTP/1.1 over TLS, small": "h1 TLS keep-alive, small",
        "HTTP/2, 16 connections of 16 streams": "h2 16 x 16 streams, small",
        "100 KiB over TLS": "100 KiB TLS",
        "10 MiB, plain": "10 MiB plain",
        "new TLS connection": "new TLS connections, full handshake",
        "a plain connection for every request": "connection per request, plain",
    }
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for said, measured in rows.items():
        lines = [line.split(" | ") for line in results.splitlines() if line.startswith(f"| {measured} | ")]
        ratios = [line[6] for line in lines if len(line) == 9]  # latency has fewer columns
        assert f"| {said} | {' | '.join(ratios)} |" in README


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_five_minute_tour_works_when_it_is_pasted(tmp_path: Path) -> None:
    tour = commands(section("Five minutes with real backends"))
    tour, end = tour.split("kill $(jobs -p)")
    explain = "portero-py explain https://app.localhost:8443/ | grep -c port="
    both = f'until [ "$({explain})" = 2 ]; do sleep 0.2; done'
    script = tour.replace("sleep 2\n", f"{both}\n") + commands(page("registration"))
    assert both in script
    taken: set[int] = set()
    for port in ("8443", "9001", "9002", "18080"):
        assert port in script
        script = script.replace(port, str(_free_port(taken)))
    script = script.replace("/tmp/tour", str(tmp_path))
    api = re.findall(r"http://(127\.0\.0\.1:\d+)/readyz", script)[0]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORTERO_REGISTER_ADDR": api,
        "PORTERO_REGISTER_URL": f"http://{api}",
        "PORTERO_ACCESS_LOG": "off",
        "PORTERO_LOG": "error",
    }
    ended = "trap 'kill $(jobs -p); wait' EXIT"
    with subprocess.Popen(
        ["bash", "-euc", f"{ended}\n{script}{end}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            output, complaints = shell.communicate(timeout=60)
        finally:  # what the tour leaves behind when it breaks off
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, complaints
    assert {"one", "two"} <= set(output.split()), output
    assert '"status":"registered"' in output
    assert '"status":"deregistered"' in output


# Versions and names


def test_the_newest_version_in_the_changelog_is_that_of_the_package() -> None:
    assert re.findall(r"^## \[(\d[^\]]*)\]", CHANGELOG, re.MULTILINE)[0] == portero_py.__version__
    assert "## [Unreleased]" in CHANGELOG


def test_the_image_is_labelled_with_the_version_of_the_package() -> None:
    assert f"ARG VERSION={portero_py.__version__}\n" in (ROOT / "Dockerfile").read_text()


def test_the_top_level_holds_only_what_belongs_there() -> None:
    assert {name.partition("/")[0] for name in project_files()} <= TOP_LEVEL


def test_no_file_names_a_package_registry_or_a_folder_of_somebodys_machine() -> None:
    # In pieces, so that this file does not name them either. (A package of Debian's is called like a host.)
    hosts = "|".join(
        (
            "pypi" + r"\.org",
            "python" + "hosted",
            "npm" + r"js\.",
            r"deb\." + "debian",
            r"[./]docker" + r"\.io",
        )
    )
    folders = r"(?<![\w.$}~])/(?:work|root|home|Users)" + r"/\w"
    for name in project_files():
        text = (ROOT / name).read_bytes().decode(errors="replace")
        found = re.search(f"{hosts}|{folders}", text)
        assert found is None, f"{name}: {found and found[0]}"


def test_no_private_key_is_in_the_repository() -> None:
    # A key's body; code and tests may name the marker of a PEM file.
    key = re.compile(r"-----BEGIN [A-Z ]*PRIVATE " + r"KEY-----\s+[A-Za-z0-9+/=]{40,}")
    for name in project_files():
        assert key.search((ROOT / name).read_bytes().decode(errors="replace")) is None, name


# systemd


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Copies whose program exists here."""
    found = sorted((ROOT / "systemd").iterdir())
    assert {unit.suffix for unit in found} == {".service", ".socket"}
    for unit in found:
        text = unit.read_text().replace("/opt/portero-py/bin/portero-py", sys.executable)
        (tmp_path / unit.name).write_text(text)
    return sorted(tmp_path.iterdir())


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


@needs_systemd
def test_systemd_finds_nothing_to_complain_about_in_the_units(units: list[Path]) -> None:
    # It exits with 0 even for a key that it does not know, so whatever it says counts.
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_the_services_are_hardened(units: list[Path]) -> None:
    for service in (unit for unit in units if unit.suffix == ".service"):
        command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(service)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout


def test_the_service_waits_longer_than_a_drain_takes() -> None:
    unit = (ROOT / "systemd" / "portero-py.service").read_text()
    patience = int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    timeouts = Config().timeouts
    assert patience > timeouts.drain + timeouts.shutdown


@pytest.mark.parametrize("name", ["portero-py", "portero-py-discover"])
def test_the_services_name_their_secrets_as_the_program_looks_for_them(name: str) -> None:
    unit = (ROOT / "systemd" / f"{name}.service").read_text()
    secrets = {setting.flag for setting in SETTINGS if setting.is_secret}
    loaded = set(re.findall(r"^LoadCredential=([a-z-]+):", unit, re.MULTILINE))
    assert loaded == {"register-secret", "jwt-hmac-key"}
    assert loaded <= secrets


# The image, the workflows, the scripts


def test_the_image_runs_as_an_ordinary_user_and_brings_no_secret() -> None:
    text = (ROOT / "Dockerfile").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    last_stage = code.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last_stage, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"SECRET|HMAC|TOKEN", code)


def test_the_image_is_compiled_unless_told_otherwise_and_its_last_stage_has_no_compiler() -> None:
    text = (ROOT / "Dockerfile").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    build, _, last_stage = code.rpartition("\nFROM ")
    assert "\nARG COMPILED=1\n" in build
    assert 'HATCH_BUILD_HOOK_ENABLE_CUSTOM="$COMPILED"' in build
    assert "gcc libc6-dev" in build
    assert not re.search(r"\bgcc\b|apt-get|COMPILED", last_stage)


def test_what_must_outlive_a_container_is_a_volume_that_its_user_can_write_to() -> None:
    text = (ROOT / "Dockerfile").read_text()
    folders = re.findall(r"PORTERO_(?:TLS_CERT_DIR|STATE_DIR)=(\S+)", text)
    declared = re.search(r"^VOLUME (.*)$", text, re.MULTILINE)
    assert declared
    assert sorted(json.loads(declared[1])) == sorted(folders)
    for folder in folders:
        made = re.search(rf"install -d -o portero -g portero -m 07\d0 {re.escape(folder)}\b", text)
        assert made, folder
        assert made.start() < declared.start()
        assert re.search(rf"-v [a-z-]+:{re.escape(folder)}\b", README), folder


def test_docker_is_told_to_wait_longer_than_a_drain_takes() -> None:
    timeouts = Config().timeouts
    for text in ((ROOT / "Dockerfile").read_text(), README):
        patience = [int(each) for each in re.findall(r"--stop-timeout (\d+)", text)]
        assert patience
        assert min(patience) > timeouts.drain + timeouts.shutdown


def test_what_the_image_copies_is_let_into_its_context() -> None:
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    let_in = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert names == set(let_in)
    assert ".ci/hatch_build.py" in names
    assert all((ROOT / name).exists() for name in names)


def test_what_the_image_sets_are_variables_that_the_program_reads() -> None:
    known = {name for setting in SETTINGS for name in setting.variables}
    set_here = set(re.findall(r"^\s+(PORTERO_[A-Z_]+)=", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert set_here
    assert set_here <= known


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").iterdir()), ids=lambda path: path.name
)
def test_a_workflow_gives_away_no_more_than_it_must(path: Path) -> None:
    text = path.read_text()
    assert "\npermissions: {}\n" in text
    assert "\nconcurrency:\n" in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    jobs = text[text.index("\njobs:\n") :].count("\n    runs-on:")
    assert text.count("timeout-minutes:") == jobs


def test_the_workflows_test_every_python_that_the_package_claims() -> None:
    claimed = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    matrix = re.findall(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text())[0]
    assert re.findall(r"[\d.]+", matrix) == claimed


def test_a_machine_without_a_usable_python_is_told_what_to_install(tmp_path: Path) -> None:
    done = _script("environment", str(tmp_path / "venv"), PYTHON="no-such-python")
    assert done.returncode == 1
    assert "apt-get install python3 python3-venv" in done.stderr


def test_a_machine_without_packages_is_told_what_is_left_out(tmp_path: Path) -> None:
    empty = str(tmp_path)
    done = _script("packages", PATH=empty, PORTERO_REQUIRE_PEERS="")
    assert done.returncode == 0
    assert "LEFT OUT" in done.stderr
    assert "curl" in done.stderr
    assert _script("packages", PATH=empty, PORTERO_REQUIRE_PEERS="1").returncode == 1


# Private


def _script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash
    return subprocess.run(
        [bash, str(ROOT / ".ci" / name), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _free_port(taken: set[int]) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        # No number that another port's number contains: the script is changed by replacing text.
        if port not in taken and not any(word in str(port) for word in ("8443", "9001", "9002", "18080")):
            taken.add(port)
            return port
