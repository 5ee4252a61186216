"""The services and routes that an operator wrote: `[[service]]`, `[[route]]`, and files with more of them.

The rules
- `include` is a pattern, or a list of them, relative to the folder of the configuration file. What matches is
  read in the order of its names. A pattern may match nothing, in folders that can be read; a path without a
  pattern must be there. Such a file has services and routes, and nothing else. What a service names
  (`users_file`, `page_file`) is relative to the folder of the file that names it.
- Services of one name are an error, wherever they stand, and so are routes of one host and path: there is no
  last one that wins.
- The first fault ends it, as `FILE:LINE: service "NAME": KEY: what is wrong`. All or nothing.
- Whatever is opened, or listed, is noted in `seen` before: also a file whose fault is the reason for the end.
  Who mends it wants to be heard.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from portero_py.config import service_values as read
from portero_py.config import values
from portero_py.config.files import Seen, read_text, require_listed
from portero_py.config.model import SERVICE_KEYS, FixedBackend, FixedService
from portero_py.config.service_values import InnerError, within
from portero_py.config.toml_file import Place, TomlFile
from portero_py.config.values import BadValueError, Reader, shown
from portero_py.core.policies import DEFAULTS, ServicePolicy
from portero_py.core.registry import MAX_LEASES, MAX_LEASES_PER_SERVICE, MAX_SERVICES
from portero_py.core.routes import Route
from portero_py.errors import ConfigError

#: The keys of the configuration file that are read here.
SERVICE, ROUTE, INCLUDE = SERVICE_KEYS

MAX_ROUTES: Final = MAX_SERVICES
#: The most that one configuration may include.
MAX_FILES: Final = 10_000
MAX_TEXT: Final = 64 << 20

Found = tuple[tuple[FixedService, ...], tuple[Route, ...]]


def read_services(main: TomlFile, seen: Seen) -> Found:
    """What the configuration file and those that it includes say. Raises ConfigError.

    To `seen` goes all that it depends on.
    """
    book = _Book()
    for sheet in [main, *_included(main, seen)]:
        readers = _service_readers(sheet, seen)
        for number, content in enumerate(_tables(sheet, SERVICE)):
            place = (SERVICE, number)
            book.add_service(sheet, place, _read(sheet, place, content, partial(_service, readers)))
        for number, content in enumerate(_tables(sheet, ROUTE)):
            place = (ROUTE, number)
            book.add_route(sheet, place, _read(sheet, place, content, _route))
    return tuple(book.services.values()), tuple(book.routes.values())


class _Book:
    """What was read so far, and where it stands."""

    def __init__(self) -> None:
        self.services: dict[str, FixedService] = {}
        self.routes: dict[tuple[str, str], Route] = {}
        self._backends = 0
        self._places: dict[object, tuple[TomlFile, Place]] = {}

    def add_service(self, sheet: TomlFile, place: Place, service: FixedService) -> None:
        self._once(f'service "{service.name}"', sheet, (*place, "name"))
        self.services[service.name] = service
        self._backends += len(service.backends)
        if len(self.services) > MAX_SERVICES or self._backends > MAX_LEASES:
            raise ConfigError(
                f"{sheet.where(place)}: too many: "
                f"{MAX_SERVICES} services and {MAX_LEASES} backends are the most"
            )

    def add_route(self, sheet: TomlFile, place: Place, route: Route) -> None:
        self._once(f'route "{route.host}{route.path}"', sheet, (*place, "host"))
        self.routes[route.host, route.path] = route
        if len(self.routes) > MAX_ROUTES:
            raise ConfigError(f"{sheet.where(place)}: too many: {MAX_ROUTES} routes are the most")

    def _once(self, what: str, sheet: TomlFile, place: Place) -> None:
        there = self._places.get(what)
        if there is not None:
            raise ConfigError(f"{sheet.where(place)}: {what} is at {there[0].where(there[1])} too")
        self._places[what] = sheet, place


# Private: files


def _included(main: TomlFile, seen: Seen) -> list[TomlFile]:
    """The included files, in order."""
    given = main.content.get(INCLUDE, [])
    folder = os.path.dirname(main.path)  # noqa: PTH120 - the spelling is for the complaints
    paths: dict[str, bool] = {}  # path -> whether it has to be there
    for number, pattern in enumerate(given if isinstance(given, list) else [given]):
        place = (INCLUDE, number)
        try:
            text = values.text(pattern)
        except BadValueError as error:
            raise ConfigError(f"{main.where(place)}: include: {error}") from None
        if not text:
            raise ConfigError(f'{main.where(place)}: include: must be a path such as "services.d/*.toml"')
        whole = os.path.join(folder, text)  # noqa: PTH118 - likewise
        is_pattern = glob.has_magic(text)
        found_now = seen.matches(whole) if is_pattern else (whole,)
        if is_pattern:
            require_listed(whole, f"{main.where(place)}: include")
        for path in found_now:
            paths.setdefault(path, not is_pattern)
        if len(paths) > MAX_FILES:
            raise ConfigError(f"{main.where(place)}: include: more than {MAX_FILES} files")
    found, length = [], 0
    for path, must_be_there in paths.items():
        seen.file(path)
        try:
            sheet = TomlFile.read(path, f"{main.where((INCLUDE,))}: include")
        except ConfigError:
            if must_be_there or not _has_gone(path):
                raise
            continue  # it has gone since it was listed
        length += sheet.size
        if length > MAX_TEXT:
            raise ConfigError(f"{path}: the included files are larger than {MAX_TEXT} bytes in all")
        for key in sheet.content:
            if key not in (SERVICE, ROUTE):
                raise ConfigError(
                    f"{sheet.where((key,))}: unknown key {shown(key)}: "
                    "an included file has [[service]] and [[route]] only"
                )
        found.append(sheet)
    return found


def _has_gone(path: str) -> bool:
    """Whether there is surely no such file: not one that only cannot be looked at."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        pass  # whoever reads it has said what is wrong
    return False


def _tables(sheet: TomlFile, key: str) -> Sequence[object]:
    given = sheet.content.get(key, [])
    if not isinstance(given, list):
        raise ConfigError(f"{sheet.where((key,))}: {key}: must be written as [[{key}]]")
    return given


def _read(sheet: TomlFile, place: Place, content: object, make: Callable[[object], Any]) -> Any:
    try:
        return make(content)
    except InnerError as error:
        where = sheet.where((*place, *error.place))
        raise ConfigError(f"{where}: {_said(place, content)}: {_key(error.place)}: {error}") from None
    except BadValueError as error:
        raise ConfigError(f"{sheet.where(place)}: {_said(place, content)}: {error}") from None


def _said(place: Place, content: object) -> str:
    """Which service or route it is, for people."""
    kind = str(place[0])
    name = content.get("name" if kind == SERVICE else "host") if isinstance(content, dict) else None
    path = content.get("path", "") if kind == ROUTE and isinstance(content, dict) else ""
    if isinstance(name, str) and isinstance(path, str):
        return f"{kind} {shown(name + path)}"
    return f"{kind} {int(place[1]) + 1}"


def _key(place: Place) -> str:
    said = ""
    for part in place:
        if isinstance(part, int):
            said += f"[{part}]"
        else:
            said += f".{_spelt(part)}" if said else _spelt(part)
    return said


def _spelt(key: str) -> str:
    is_bare = key.isascii() and bool(key) and all(c.isalnum() or c in "_-" for c in key)
    return key if is_bare else shown(key)


# Private: one service, one route


def _service_readers(sheet: TomlFile, seen: Seen) -> Callable[[object], dict[str, Any]]:
    def text_of(path: str) -> str:
        whole = os.path.join(os.path.dirname(sheet.path), path)  # noqa: PTH118, PTH120 - likewise
        seen.file(whole)
        try:
            return read_text(Path(whole), "")
        except ConfigError as error:
            raise BadValueError(str(error).removeprefix(": ")) from None

    return read.table(
        {
            **_SERVICE_READERS,
            "basic_auth": read.basic_auth(text_of),
            "maintenance": read.maintenance(text_of),
        },
        "name",
    )


def _service(readers: Callable[[object], dict[str, Any]], content: object) -> FixedService:
    found = readers(content)
    name, backends = found.pop("name"), found.pop("backends", ())
    if "rate_limit" in found:
        found["rate_limits"] = found.pop("rate_limit")
    policy = ServicePolicy(**found) if found else DEFAULTS
    if policy.balance == "hash" and not policy.hash_on:
        raise InnerError(("balance",), 'hash needs hash_on, such as "header:x-user"')
    if policy.hash_on and policy.balance != "hash":
        raise InnerError(("hash_on",), 'needs balance = "hash"')
    return FixedService(name, backends, policy)


def _backends(value: object) -> tuple[FixedBackend, ...]:
    if not isinstance(value, list):
        value = [value]
    found = [within(number, _backend, inner) for number, inner in enumerate(value)]
    if len(found) > MAX_LEASES_PER_SERVICE:
        raise BadValueError(f"has {len(found)} elements: {MAX_LEASES_PER_SERVICE} are the most")
    addresses: set[str] = set()
    for number, backend in enumerate(found):
        address = str(backend.address)
        if address in addresses:
            raise InnerError((number,), f"{address} is there twice")
        addresses.add(address)
    return tuple(found)


def _backend(value: object) -> FixedBackend:
    """`"host:port"`, or a table with the terms beside it."""
    if not isinstance(value, dict):
        return FixedBackend(read.backend_address(value))
    found = _BACKEND_TABLE(value)
    if "tls" in found:
        found["use_tls"] = found.pop("tls")
    if found.get("tls_fingerprint") and not found.get("use_tls"):
        raise InnerError(("tls_fingerprint",), "needs tls = true")
    return FixedBackend(**found)


def _route(content: object) -> Route:
    found = _ROUTE_TABLE(content)
    if ("service" in found) == ("redirect" in found):
        raise BadValueError("needs either service or redirect")
    if "status" in found and "redirect" not in found:
        raise InnerError(("status",), "is that of a redirect, which this is not")
    route = Route(**found)
    if route.strip_path and not (route.path and route.service):
        raise InnerError(("strip_path",), "needs a path to strip, and a service")
    return route


_BACKEND_TABLE: Final = read.table(
    {
        "address": read.backend_address,
        "tls": values.switch,
        "weight": read.weight,
        "health_path": read.health_path,
        "max_in_flight": read.max_in_flight,
        "tls_fingerprint": read.fingerprint,
        "protocol": read.protocol,
    },
    "address",
)

_SERVICE_READERS: Final[Mapping[str, Reader]] = {
    "name": read.service_name,
    "backends": _backends,
    "balance": read.balance,
    "hash_on": read.hash_on,
    "slow_start": values.seconds(0, 3600),
    "sticky": read.sticky,
    "health_path": read.health_path,
    "max_in_flight": read.max_in_flight,
    "health": read.health,
    "timeouts": read.timeouts,
    "retries": values.whole(0, 10),
    "body_bytes": values.whole(0, 1 << 50),
    "queue_seconds": values.seconds(0),
    "queue_length": values.whole(1, 1_000_000),
    "allow": read.networks,
    "deny": read.networks,
    "rate_limit": read.rate_limits,
    "forward_auth": read.forward_auth,
    "request_headers": read.request_headers,
    "response_headers": read.response_headers,
}

_ROUTE_TABLE: Final = read.table(
    {
        "host": read.service_name,
        "path": read.route_path,
        "service": read.service_name,
        "strip_path": values.switch,
        "redirect": read.redirect,
        "status": read.status,
    },
    "host",
)
