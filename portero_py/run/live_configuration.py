"""What changes while portero runs, when the configuration is read again (SIGHUP, or its files changed).

Services, routes, the default service, timeouts, limits, health and the log change at once; what else changed
is named in the log as waiting for a restart. A configuration that cannot be used changes nothing and says
why. Nor does a fault of portero's own in reading it: what runs goes on as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final

from portero_py.config.model import Config
from portero_py.errors import ConfigError
from portero_py.run import logs, preflight

#: The groups of `Config` that change while portero runs.
LIVE: Final = frozenset({"services", "routes", "timeouts", "limits", "health", "log"})

_log = logging.getLogger(__name__)


def read_again(running: Config, read: Callable[[], Config]) -> Config | None:
    """`running` with what has changed in its live groups; None, and a line in the log, when it is unusable.

    The same object when nothing has changed. It reads files: not to be called on an event loop.
    """
    try:
        found = read()
        preflight.require(found)
    except ConfigError as error:
        _log.error("the configuration stays as it was: %s", error)
        return None
    except Exception:  # a bug, or no memory: no reason to end what serves
        _log.exception("the configuration stays as it was: reading it failed")
        return None
    waiting = waiting_for_restart(running, found)
    if waiting:
        _log.warning("changed, but waiting for a restart: %s", ", ".join(waiting))
    return with_live(running, found)


def with_live(running: Config, found: Config) -> Config:
    """`running` with the live groups of `found`; the same object when they are equal."""
    live: dict[str, Any] = {name: getattr(found, name) for name in LIVE}
    live["proxy"] = replace(running.proxy, default_service=found.proxy.default_service)
    if all(getattr(running, name) == value for name, value in live.items()):
        return running
    logs.set_level(found.log.level)
    return replace(running, **live)


def waiting_for_restart(running: Config, read: Config) -> list[str]:
    """The keys in which a configuration that was read again differs, and that cannot change live."""
    waiting: list[str] = []
    read = replace(read, proxy=replace(read.proxy, default_service=running.proxy.default_service))
    for group in fields(Config):
        old, new = getattr(running, group.name), getattr(read, group.name)
        if group.name in LIVE or old == new:
            continue
        inner = fields(old) if is_dataclass(old) else ()
        changed = [each.name for each in inner if getattr(old, each.name) != getattr(new, each.name)]
        waiting += [f"{group.name}.{name}" for name in changed] or [group.name]
    return waiting
