"""The rules of who may import whom (DESIGN.md, section 3), read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import portero_py

ROOT = Path(portero_py.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

#: What each floor may import of portero_py; other floors are open to the composition root only.
ALLOWED = {
    "core": ("core", "errors"),
    "wire": ("wire", "errors"),
    "proxy": ("proxy", "core", "wire", "config", "errors"),
    "control": ("control", "core", "config", "errors", "__version__"),
    "client": ("client", "core.auth", "errors"),
}

#: I/O, clocks and chance: `core` and `wire` are tested without any of them.
IMPURE = {
    *("asyncio", "uvloop", "socket", "socketserver", "select", "selectors", "ssl", "threading", "subprocess"),
    *("time", "datetime", "random", "secrets", "os", "pathlib", "io", "logging", "signal", "aiohttp"),
}


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports; `from a import b` counts as a.b."""
    for found in ast.walk(ast.parse(path.read_text())):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, f"{path}: relative import"
            yield from (f"{found.module}.{alias.name}" for alias in found.names)


def floor(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def begins_with(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_the_rules_look_at_every_floor() -> None:
    assert set(ALLOWED) <= {floor(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_point_down(path: Path) -> None:
    own = [name.removeprefix("portero_py.") for name in imports(path) if name.startswith("portero_py.")]
    allowed = ALLOWED.get(floor(path))
    if allowed is not None:
        assert [name for name in own if not begins_with(name, allowed)] == []
    if path.name not in {"cli.py", "__main__.py"}:
        assert not any(begins_with(name, ("cli", "supervisor")) for name in own)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_and_wire_touch_no_socket_no_clock_and_no_chance(path: Path) -> None:
    if floor(path) in {"core", "wire"}:
        assert [name for name in imports(path) if name.partition(".")[0] in IMPURE] == []
