"""The compiled build of the wheel: mypyc over the modules that every request passes through.

Off by default; HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 turns it on. pyproject.toml says which modules, and
docs/compiled.md what comes of it.

Why not the plugin hatch-mypyc: it compiles in place. The extension modules that it leaves in the source tree
go before the .py files of an editable installation, so that a change to these has no effect any more, and
while it runs pyproject.toml is not there. Here everything happens in a copy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

#: Runs in the copy. A module that is missing from the build environment is `Any` to the compiler.
_SETUP = """\
from mypyc.build import mypycify
from setuptools import setup

options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
setup(
    name="portero_py",
    packages=[],
    ext_modules=mypycify([*options, *{modules!r}], group_name="portero_py", opt_level="3"),
)
"""


class CompiledBuild(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the extension modules to a wheel, beside the sources that they were made of."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; an editable installation stays pure, or it would not run what is being edited."""
        if version == "editable":
            return
        self._folder = Path(mkdtemp(prefix="portero-compiled-"))
        built = _compile(Path(self.root), self._folder, self.config["modules"])
        build_data["force_include"].update({str(self._folder / name): name for name in built})
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel is complete."""
        if version != "editable":
            shutil.rmtree(self._folder)


def _compile(root: Path, folder: Path, modules: list[str]) -> list[str]:
    """Compile `modules` of a copy of the package in `folder`; return the paths of what came of it."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(root / "portero_py", folder / "portero_py", ignore=unwanted)
    (folder / "setup.py").write_text(_SETUP.format(modules=modules))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    shutil.rmtree(folder / "build", ignore_errors=True)
    built = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.so"))
    # One file holds all the code; each module has a small one beside its source, which leads there.
    if done.returncode or len(built) != len(modules) + 1:
        shutil.rmtree(folder)
        raise RuntimeError(f"mypyc failed:\n{done.stdout}")
    return built
