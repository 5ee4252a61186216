"""The rules of who may import whom (docs/architecture.md), read from the source itself.

An import only ever points down, in every room, the top level included; an import that is there for types only
is one too. And no two files need each other, however long the way round is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import portero_py

ROOT = Path(portero_py.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

#: What each room may import of portero_py beside itself; "" are the files at the top.
ALLOWED = {
    "errors.py": (),
    "__init__.py": (),
    "__main__.py": ("cli", "run.held_signals", "run.main_process"),
    # A request's head is what a balancing policy may decide by, and its cookies.
    "core": ("wire.message", "wire.cookies", "errors"),
    "wire": ("errors",),
    "config": ("core", "wire", "errors"),
    "feed": ("config", "core", "wire", "errors"),
    "proxy": ("feed", "config", "core", "wire", "errors"),
    "control": ("feed", "config", "core", "wire", "errors", "__version__"),
    "client": ("core.auth", "core.names", "errors"),
    "run": ("control", "proxy", "feed", "config", "core", "wire", "errors", "__version__"),
    "demo": ("client", "config", "core", "errors"),
    "cli": (
        *("demo", "run", "control", "proxy", "feed", "client", "config", "core", "wire", "errors"),
        "__version__",
    ),
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


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def begins_with(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def needed_files(path: Path) -> set[Path]:
    """The files of the package that a file imports; a package's own face is not one of them."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "portero_py":
            continue
        for length in range(len(parts), 1, -1):
            file = ROOT.joinpath(*parts[1:length]).with_suffix(".py")
            if file.is_file():
                found.add(file)
                break
    return found - {path}


def circles() -> list[list[str]]:
    """The groups of files in which each needs each other (Tarjan's strongly connected components)."""
    graph = {path: needed_files(path) for path in SOURCES}
    order: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[str]] = []

    def visit(path: Path) -> None:
        order[path] = low[path] = len(order)
        stack.append(path)
        for other in sorted(graph[path]):
            if other not in order:
                visit(other)
                low[path] = min(low[path], low[other])
            elif other in stack:
                low[path] = min(low[path], order[other])
        if low[path] == order[path]:
            at = stack.index(path)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(str(each.relative_to(ROOT)) for each in group))

    for path in SOURCES:
        if path not in order:
            visit(path)
    return found


def test_every_room_has_its_rule() -> None:
    assert {room(path) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_point_down(path: Path) -> None:
    own = [name.removeprefix("portero_py.") for name in imports(path) if name.startswith("portero_py.")]
    allowed = (room(path), *ALLOWED[room(path)])
    assert [name for name in own if not begins_with(name, allowed)] == []


#: Who may know what lies beside him: the life cycle is known to `run` alone, an exchange is made by who
#: receives its request, and a backend's HTTP version is chosen in one place.
KNOWN_TO = {
    "proxy/worker.py": {"run/children.py", "run/single_process.py"},
    "proxy/exchange.py": {"proxy/downstream/http1.py", "proxy/downstream/http2.py"},
    "proxy/upstream/http1.py": {"proxy/upstream/connector.py"},
}


@pytest.mark.parametrize("name", KNOWN_TO)
def test_a_file_is_known_to_those_only_who_compose_with_it(name: str) -> None:
    knowing = {str(path.relative_to(ROOT)) for path in SOURCES if ROOT / name in needed_files(path)}
    # Whoever watches state machines knows them all.
    assert knowing - {"run/debugging.py"} == KNOWN_TO[name]


def test_no_two_files_need_each_other() -> None:
    assert circles() == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_and_wire_touch_no_socket_no_clock_and_no_chance(path: Path) -> None:
    if room(path) in {"core", "wire"}:
        assert [name for name in imports(path) if name.partition(".")[0] in IMPURE] == []
