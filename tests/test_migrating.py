"""docs/migrating.md names keys, flags and labels that there are; its two compose files are about one shop."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from portero_py.cli.main import app
from portero_py.client.discovery.labels import FIELDS as LABELS
from portero_py.config.model import FixedBackend, FixedService
from portero_py.config.sources import SECTIONS, SETTINGS
from portero_py.core import policies
from portero_py.core.routes import Route

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "migrating.md"

#: What the file calls otherwise than the code, and what is read from files.
_SPELT: Final = {"tls", "rate_limit", "users_file", "page_file"}
_CLASSES: Final[tuple[Any, ...]] = (
    *(policies.ServicePolicy, policies.FieldChanges, policies.RateLimit, policies.Sticky),
    *(policies.BasicAuth, policies.ForwardAuth, policies.Maintenance, policies.ServiceTimeouts),
    *(policies.ServiceHealth, FixedService, FixedBackend, Route),
)


def _ours() -> Iterator[str]:
    """What stands in code in the last column of the tables."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("|"):
            yield from re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", line)[-2])


def _compose(name: str) -> dict[str, Any]:
    """The containers of one of the compose files."""
    text = (ROOT / "examples" / "migrating" / name).read_text()
    found: dict[str, Any] = importlib.import_module("yaml").safe_load(text)["services"]
    return found


@pytest.fixture
def keys() -> set[str]:
    """All that may stand before a `=`."""
    of_classes = {field.name for each in _CLASSES for field in fields(each)}
    return {*of_classes, *_SPELT, *(setting.key.rpartition(".")[2] for setting in SETTINGS)}


def test_every_key_before_an_equals_sign_is_one(keys: set[str]) -> None:
    named = {key for span in _ours() for key in re.findall(r"(?<![\w.\"])([a-z_]+) =", span)}
    assert len(named) > 25
    assert named <= keys, named - keys


def test_every_table_in_braces_has_such_keys(keys: set[str]) -> None:
    inside = [
        key for span in _ours() for text in re.findall(r"\{ ([a-z_, ]+) \}", span) for key in text.split(", ")
    ]
    assert len(inside) > 20
    assert set(inside) <= keys, set(inside) - keys


def test_every_dotted_key_is_a_setting_or_a_label() -> None:
    settings = {setting.key for setting in SETTINGS}
    dotted = {span for span in _ours() if re.fullmatch(r"[a-z_]+\.[a-z_]+( = .*)?", span)}
    found = 0
    for span in dotted:
        key = span.partition(" ")[0]
        section, _, name = key.partition(".")
        if section == "portero":
            assert name in LABELS, key
        elif section in SECTIONS:
            assert key in settings, key
            found += 1
        else:
            assert section in ("request_headers", "response_headers") or name in ("pem", "html"), key
    assert found > 15


def test_every_flag_is_one_of_a_command() -> None:
    root: Any = typer.main.get_command(app)
    commands = [root, *root.commands.values(), *root.commands["discover"].commands.values()]
    known = {flag for command in commands for each in command.params for flag in each.opts}
    named = {flag for span in _ours() for flag in re.findall(r"(?<!\S)--[a-z-]+", span)}
    assert len(named) > 8
    assert named <= known, named - known


def test_every_command_is_one() -> None:
    root: Any = typer.main.get_command(app)
    named = {name for span in _ours() for name in re.findall(r"^portero-py ([a-z]+)", span)}
    assert {"drain", "ready", "pause"} <= named <= set(root.commands), named


def test_both_compose_files_have_the_same_containers_behind_the_proxy() -> None:
    before, after = _compose("traefik.compose.yaml"), _compose("portero.compose.yaml")
    assert before.keys() - {"traefik"} == after.keys() - {"proxy", "discover"}
    for name in before.keys() - {"traefik"}:
        assert ("labels" in before[name]) == ("labels" in after[name]), name
        assert before[name]["image"] == after[name]["image"]


def test_what_the_compose_file_runs_and_sets_is_known() -> None:
    after = _compose("portero.compose.yaml")
    root: Any = typer.main.get_command(app)
    assert root.make_context("portero-py", list(after["proxy"]["command"])).params["config"]
    name, *rest = after["discover"]["command"]
    assert root.commands[name].commands[rest[0]].make_context(name, rest[1:]).params["register_url"]
    known = {variable for setting in SETTINGS for variable in setting.variables}
    assert set(after["proxy"]["environment"]) | set(after["discover"]["environment"]) <= known
    having = [name for name, each in after.items() if "docker.sock" in str(each.get("volumes", ""))]
    assert having == ["discover"]
