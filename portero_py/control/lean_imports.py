"""Of large packages the part that control needs, without the rest, until somebody asks for that.

`import aiohttp` loads its client too, whatever is wanted: 4 MB that stay, and 85 of the 450 ms of CPU time of
a start (35 of them to read all CAs of the system). A control process always has a server, and a client only
when somebody else answers ACME's challenges, say. watchfiles brings what starts programs anew.

So an empty package is put in its place, whose modules (`aiohttp.web`) are found as ever. Whoever wants
anything else of it (`aiohttp.ClientSession`) has its real code run first, and then it is what it always was.
When the part cannot be loaded so, because some version of the package is made differently, all is loaded.
"""

from __future__ import annotations

import logging
import re
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: Package -> the part of it that is needed.
PARTS: Final = {"aiohttp": "aiohttp.web", "watchfiles": "watchfiles.main"}

#: What aiohttp's server says in its Server field, and hence takes from the package.
_VERSION: Final = re.compile(r'^__version__ = "([^"\n]+)"$', re.MULTILINE)

_log = logging.getLogger(__name__)


def load_parts() -> None:
    """Load the parts: before whoever imports these packages. Raises ImportError as an import does."""
    for package, part in PARTS.items():
        load(package, part)


def load(package: str, part: str) -> None:
    """Load a part, and its package only if that has to be. Raises ImportError as an import does."""
    if package in sys.modules:
        return
    spec = find_spec(package)
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        import_module(part)  # it knows what is wrong
        return
    sys.modules[package] = _empty(spec, spec.origin)
    try:
        import_module(part)
    except (ImportError, AttributeError) as error:
        _log.debug("all of %s is loaded: %s", package, error)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        import_module(part)


# Private


def _empty(spec: ModuleSpec, origin: str) -> ModuleType:
    package = module_from_spec(spec)
    with open(origin, encoding="utf-8") as file:  # noqa: PTH123 - pathlib is not needed for it
        version = _VERSION.search(file.read(10_000))
    if version is not None:
        vars(package)["__version__"] = version[1]
    vars(package)["__getattr__"] = _Missing(package, spec)
    return package


class _Missing:
    """What the package does about a name that it does not have (PEP 562)."""

    def __init__(self, package: ModuleType, spec: ModuleSpec) -> None:
        self._package = package
        self._spec = spec
        self._lock = RLock()

    def __call__(self, name: str) -> Any:
        package = self._package
        # The import system asks in vain before it loads a module of the package.
        if name.startswith("__") or find_spec(f"{package.__name__}.{name}") is not None:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        with self._lock:
            if vars(package).get("__getattr__") is self:
                del vars(package)["__getattr__"]
                assert self._spec.loader is not None
                self._spec.loader.exec_module(package)
        return getattr(package, name)
