"""The compiled build: off unless asked for, of modules that exist, and really what `make test-compiled` runs.

The suites that hold against it are those of `COMPILED_TESTS` in the Makefile. The second half here needs such
a build, and is skipped where PORTERO_TEST_PYTHON does not name one.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import portero_py

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("PORTERO_TEST_PYTHON", "")
BUILD: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOOK: dict[str, Any] = BUILD["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]
MODULES: list[str] = HOOK["modules"]

needs_compiled = pytest.mark.skipif(
    not PYTHON, reason="needs PORTERO_TEST_PYTHON, as make test-compiled sets it"
)


def test_an_ordinary_build_neither_compiles_nor_installs_a_compiler() -> None:
    assert HOOK["enable-by-default"] is False
    always = " ".join(BUILD["build-system"]["requires"] + BUILD["project"]["dependencies"])
    assert "mypy" in " ".join(HOOK["dependencies"])
    assert "mypy" not in always
    assert "setuptools" not in always


def test_what_is_compiled_exists_and_each_module_once() -> None:
    assert sorted(set(MODULES)) == MODULES
    assert all((ROOT / name).is_file() for name in MODULES)


def test_only_the_floors_of_the_data_path_are_compiled() -> None:
    assert {Path(name).parts[1] for name in MODULES} == {"core", "proxy", "wire"}


def test_no_extension_module_lies_among_the_sources_where_it_would_hide_them() -> None:
    assert not list((ROOT / "portero_py").rglob("*.so"))
    assert not list(ROOT.glob("*.so"))


def test_the_source_archive_can_be_compiled_too() -> None:
    assert f"/{HOOK['path']}" in BUILD["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


def test_no_slice_has_a_bound_with_effects() -> None:
    """The compiler evaluates the first one twice."""
    harmless = {"len", "max", "min", "end"}
    found = [
        f"{name}:{call.lineno}"
        for name in MODULES
        for part in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(part, ast.Slice)
        for call in ast.walk(part)
        if isinstance(call, ast.Call)
        and (call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func))
        not in harmless
    ]
    assert found == []


def test_every_suite_that_runs_against_the_compiled_build_exists() -> None:
    names = re.findall(r"test_%\.py,(.*?)\)", (ROOT / "Makefile").read_text().replace("\\\n", ""))[0].split()
    assert len(names) >= 9
    assert all((ROOT / "tests" / "e2e" / f"test_{name}.py").is_file() for name in names)


# With a compiled build


def run(code: str) -> Any:
    """What `code` prints, run by the interpreter of the compiled build; JSON."""
    done = subprocess.run([PYTHON, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_compiled
def test_it_says_that_it_is_compiled() -> None:
    done = subprocess.run(
        [PYTHON, "-P", "-m", "portero_py", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"portero-py {portero_py.__version__} (compiled)\n"


@needs_compiled
def test_every_module_of_the_list_is_compiled_and_its_source_lies_beside_it() -> None:
    names = [name.removesuffix(".py").replace("/", ".") for name in MODULES]
    code = (
        f"import importlib, json; print(json.dumps([importlib.import_module(n).__file__ for n in {names}]))"
    )
    for name, found in zip(MODULES, run(code), strict=True):
        assert found.endswith(".so"), name
        source = Path(found).parent / Path(name).name
        assert source.read_text() == (ROOT / name).read_text(), f"{name} was compiled from another version"
        assert ROOT / "portero_py" not in source.parents


@needs_compiled
def test_bytes_are_demanded_where_bytes_are_meant() -> None:
    # Both event loops hand over bytes. Whoever hands over something else shall hear of it, in either build.
    code = """if True:
        import json
        from portero_py.wire.http1 import RequestParser
        head, refused = b"GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n", []
        for kind in (bytes, bytearray, memoryview):
            try:
                RequestParser(8192, 100).parse(kind(head))
            except TypeError:
                refused.append(kind.__name__)
        print(json.dumps(refused))"""
    assert run(code) == ["bytearray", "memoryview"]


@needs_compiled
def test_what_is_dropped_is_collected() -> None:
    # A connection and the protocol around it hold each other.
    code = """if True:
        import gc, json
        from portero_py.wire.http1 import RequestParser
        from portero_py.wire.http2.server import ServerConnection
        from portero_py.wire.http2.heads import HeadLimits
        gc.disable()
        class Shell:
            def __init__(self):
                self.parser = RequestParser(8192, 100)
                self.parser.parse(b"GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
                self.core = ServerConnection(self.wake, lambda *a: None, HeadLimits(8192, 32768, 100), 128)
            def wake(self):
                pass
        Shell()
        def live():
            names = ("ServerConnection", "RequestParser", "Output", "Floods")
            return sum(type(each).__name__ in names for each in gc.get_objects())
        gc.collect()
        before = live()
        for _ in range(100):
            Shell()
        made = live()
        gc.collect()
        print(json.dumps([made - before >= 100, live() - before]))"""
    assert run(code) == [True, 0]
