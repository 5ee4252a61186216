"""A part of a package is loaded without the package's own code, until somebody wants that."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portero_py.control import lean_imports

NAME = "portero_test_package"

_REAL = """
import sys
from portero_py.control import lean_imports
lean_imports.load_parts()
assert "aiohttp.web" in sys.modules
assert "aiohttp.client" not in sys.modules
from aiohttp import web
import aiohttp
assert "aiohttp.client" not in sys.modules
assert aiohttp.web is web
assert web.Server and aiohttp.__version__ in aiohttp.http.SERVER_SOFTWARE
from aiohttp import ClientSession
assert ClientSession is aiohttp.client.ClientSession
assert aiohttp.web is web and "ClientTimeout" in aiohttp.__all__
assert not hasattr(aiohttp, "nothing_of_the_kind")
import watchfiles
assert "watchfiles.run" not in sys.modules
assert watchfiles.run_process is watchfiles.run.run_process and watchfiles.awatch is watchfiles.main.awatch
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package whose own code counts how often it runs."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text(
        '__version__ = "1.2"\nfrom .counting import runs\nruns.append(1)\nfrom . import server\nclient = 7\n'
    )
    (folder / "counting.py").write_text("runs = []\n")
    (folder / "server.py").write_text("from . import __version__\nversion = __version__\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


def runs() -> list[int]:
    found: list[int] = importlib.import_module(f"{NAME}.counting").runs
    return found


def test_the_server_is_there_and_the_rest_comes_when_it_is_wanted(package: Path) -> None:
    lean_imports.load(NAME, f"{NAME}.server")
    server = sys.modules[f"{NAME}.server"]
    assert server.version == "1.2"
    assert runs() == []
    whole = importlib.import_module(NAME)
    assert runs() == []
    assert whole.client == 7
    assert whole.client == 7
    assert runs() == [1]
    assert whole.server is server
    with pytest.raises(AttributeError, match="nothing"):
        _ = whole.nothing


def test_who_asks_for_what_nobody_has_hears_that(package: Path) -> None:
    lean_imports.load(NAME, f"{NAME}.server")
    with pytest.raises(AttributeError, match="nothing"):
        _ = sys.modules[NAME].nothing
    assert not hasattr(sys.modules[NAME], "__nothing__")


def test_a_server_that_needs_its_package_gets_it(package: Path) -> None:
    (package / "server.py").write_text("from . import client\nversion = client\n")
    (package / "__init__.py").write_text("from .counting import runs\nruns.append(1)\nclient = 7\n")
    lean_imports.load(NAME, f"{NAME}.server")
    assert sys.modules[f"{NAME}.server"].version == 7
    assert runs() == [1]


def test_a_server_that_cannot_be_loaded_so_is_loaded_as_ever(package: Path) -> None:
    (package / "server.py").write_text(
        "import sys\n"
        f"if not hasattr(sys.modules['{NAME}'], '__all__'):\n"
        "    raise ImportError('not without the package')\n"
        "version = 3\n"
    )
    (package / "__init__.py").write_text("__all__ = ()\nclient = 7\n")
    lean_imports.load(NAME, f"{NAME}.server")
    assert sys.modules[f"{NAME}.server"].version == 3
    assert importlib.import_module(NAME).client == 7


def test_a_package_that_is_loaded_already_is_left_alone(package: Path) -> None:
    whole = importlib.import_module(NAME)
    lean_imports.load(NAME, f"{NAME}.server")
    assert sys.modules[NAME] is whole
    assert runs() == [1]


def test_a_package_that_is_not_there_is_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=NAME):
        lean_imports.load(NAME, f"{NAME}.server")
    assert NAME not in sys.modules


def test_the_packages_themselves_can_be_loaded_so() -> None:
    subprocess.run([sys.executable, "-c", _REAL], check=True, timeout=60)
