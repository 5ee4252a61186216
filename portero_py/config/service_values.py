"""The values of `[[service]]` and `[[route]]`, one at a time: what `values` is to the other settings.

A reader takes what TOML has there and returns what `core.policies` and `core.routes` hold, or raises
`BadValueError` with the rest of the sentence. What is wrong deeper inside is an `InnerError`: it has the way
to it, from the value that was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, TypeVar

from portero_py.config import values
from portero_py.config.model import Address
from portero_py.config.toml_file import Place
from portero_py.config.values import BadValueError, Reader, shown
from portero_py.core.names import normalise_service_name
from portero_py.core.policies import (
    BALANCES,
    BasicAuth,
    FieldChanges,
    ForwardAuth,
    Maintenance,
    RateLimit,
    ServiceHealth,
    ServiceTimeouts,
    Sticky,
)
from portero_py.wire.headers import HOST, REQUEST_KINDS, RESPONSE_KINDS

_Made = TypeVar("_Made")

#: The most that one service may have of what a request, or each worker, pays for.
MAX_FIELDS: Final = 100
MAX_VALUE: Final = 4096
MAX_NETWORKS: Final = 10_000
MAX_RATE_LIMITS: Final = 16
MAX_USERS: Final = 1_000
MAX_PAGE: Final = 64 << 10
#: bcrypt's cost: each step doubles the time that a worker's thread spends on one password.
MAX_COST: Final = 16

_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")  # RFC 9110, 5.6.2
_FIELD_VALUE: Final = re.compile(r"([\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?)?")
_PATH: Final = re.compile(r"/[\x21-\x7e]{0,1023}")
_ROUTE_PATH: Final = re.compile(r"/[\x21\x22\x24-\x3e\x40-\x7e]{0,1023}")  # neither ? nor #
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
#: The last digit of a salt has four bits that nobody uses: bcrypt refuses a hash in which they are not 0.
_BCRYPT: Final = re.compile(r"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_REALM: Final = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,128}")  # what a quoted-string holds as it is
_CONTENT_TYPE: Final = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,127}")
_BROADCAST: Final = IPv4Address("255.255.255.255")
_DOLLAR: Final = re.compile(r"\$(?!uri\b)")

#: What a response's field is to us beside what ends at each hop: each answer has its own.
_OWN_RESPONSE_FIELDS: Final = frozenset({b"x-request-id", *RESPONSE_KINDS})

_PAGE_KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".htm": "text/html; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}
_DEFAULT_PAGE: Final = "Down for maintenance. Please come back in a while.\n"


class InnerError(BadValueError):
    """What is wrong inside of a value, and where: keys and numbers of elements from the value on."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(text)
        self.place = place


class UnknownKeyError(InnerError):
    """A key that means nothing there."""


def table(readers: Mapping[str, Reader], *required: str) -> Callable[[object], dict[str, Any]]:
    """Of a table: the values of its keys, each read by its reader."""

    def read(value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise BadValueError(f"must be a table of {listed(readers)}, not {values.kind(value)}")
        found = {}
        for key, inner in value.items():
            read_one = readers.get(key)
            if read_one is None:
                nearest = values.nearest(key, list(readers))
                raise UnknownKeyError((key,), f'unknown key: the nearest is "{nearest}"')
            found[key] = within(key, read_one, inner)
        for key in required:
            if key not in found:
                raise InnerError((key,), "is missing")
        return found

    return read


def record(
    of: Callable[..., _Made], readers: Mapping[str, Reader], *required: str
) -> Callable[[object], _Made]:
    """Of a table whose keys are the fields of a dataclass: that."""
    read_table = table(readers, *required)
    return lambda value: of(**read_table(value))


def within(key: str | int, read: Reader, value: object) -> Any:
    """What `read` makes of the value at `key`."""
    try:
        return read(value)
    except InnerError as error:
        raise type(error)((key, *error.place), str(error)) from None
    except BadValueError as error:
        raise InnerError((key,), str(error)) from None


def each(read_one: Reader, most: int) -> Callable[[object], tuple[Any, ...]]:
    """A list, or one value alone, in order and without duplicates."""

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            return (read_one(value),)
        if len(value) > most:
            raise BadValueError(f"has {len(value)} elements: {most} are the most")
        return tuple(dict.fromkeys([within(at, read_one, inner) for at, inner in enumerate(value)]))

    return read


def service_name(value: object) -> str:
    """A host name, an address, or a wildcard, normalised."""
    name = normalise_service_name(values.text(value))
    if name is None:
        raise BadValueError(
            f"{shown(value)} is no service: "
            "use a host name (without a port, in xn-- form), an address or *.example.com"
        )
    return name


def backend_address(value: object) -> Address:
    """One machine's own address and a port, or a host name and a port; each in one spelling."""
    chosen = values.connect_address(value)
    try:
        ip = ip_address(chosen.host)
    except ValueError:
        return Address(chosen.host.rstrip(".").lower(), chosen.port)
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip
    if ip.is_unspecified or ip.is_multicast or ip == _BROADCAST:
        raise BadValueError(f"must be one machine's own address, not {shown(value)}")
    return Address(str(ip), chosen.port)


def health_path(value: object) -> str:
    return _matching(_PATH, value, "a path that begins with / and holds visible ASCII characters only")


def route_path(value: object) -> str:
    """A prefix; `/` is every path, as "" is."""
    path = _matching(_ROUTE_PATH, value, "a path such as /api, without ? and #")
    return path.rstrip("/")


def fingerprint(value: object) -> str:
    text = values.text(value).replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(text):
        raise BadValueError("must be the certificate's SHA-256: 64 hex digits, colons allowed")
    return text


def protocol(value: object) -> str:
    if value in ("h2", "h2c"):
        raise BadValueError(f"{value} backends are not supported by this version: use http1")
    if value != "http1":
        raise BadValueError(f"must be http1, not {shown(value)}")
    return "http1"


def hash_on(value: object) -> str:
    """`header:NAME`, `cookie:NAME`, `path` or `host`."""
    text = values.text(value).strip()
    kind, colon, name = text.partition(":")
    kind = kind.lower()
    if (kind in ("path", "host") and not colon) or (kind == "cookie" and _TOKEN.fullmatch(name)):
        return f"{kind}{colon}{name}"
    if kind == "header" and _TOKEN.fullmatch(name):
        return f"header:{name.lower()}"
    raise BadValueError(f"must be header:NAME, cookie:NAME, path or host, not {shown(value)}")


def rate_key(value: object) -> str:
    """`client`, `service` or `header:NAME`."""
    text = values.text(value).strip()
    kind, _, name = text.partition(":")
    if text.lower() in ("client", "service"):
        return text.lower()
    if kind.lower() == "header" and _TOKEN.fullmatch(name):
        if REQUEST_KINDS.get(name.lower().encode(), HOST) != HOST:
            raise BadValueError(f"{name} is no key: it does not go on to backends as clients send it")
        return f"header:{name.lower()}"
    raise BadValueError(f"must be client, service or header:NAME, not {shown(value)}")


def redirect(value: object) -> str:
    """An absolute http:// or https:// URL, or a path, in which `$uri` may stand."""
    text = values.text(value)
    is_path = _PATH.fullmatch(text) is not None and not text.startswith("//")
    if not text.isascii() or " " in text or not (is_path or values.is_url(text, "http", "https")):
        raise BadValueError(f"{shown(value)} is no https:// or http:// address and no path")
    if text.lower().startswith(("http://$", "https://$")):
        raise BadValueError(f"{shown(value)}: the host is missing, and a client's path would take its place")
    if _DOLLAR.search(text):
        raise BadValueError(f"{shown(value)}: $uri is all that can be filled in")
    return text


def status(value: object) -> int:
    if not isinstance(value, int) or value not in (301, 302, 303, 307, 308):
        raise BadValueError(f"must be 301, 302, 303, 307 or 308, not {shown(value)}")
    return value


def network(value: object) -> str:
    return str(values.network(value))


def forward_url(value: object) -> str:
    text = values.text(value).strip()
    if "@" in text:  # it would be a password
        raise BadValueError("must be an http:// or https:// address without a name and a password")
    if not text.isascii() or not values.is_url(text, "http", "https") or "#" in text:
        raise BadValueError(f"{shown(value)} is no http:// or https:// address")
    return text


def field_name(value: object) -> str:
    return _matching(_TOKEN, value, "the name of a header field")


def request_field(value: object) -> str:
    """The name of a request's field that may be changed."""
    name = field_name(value)
    if name.lower().encode() in REQUEST_KINDS:
        raise BadValueError(f"{name} is the proxy's own: it cannot be changed here")
    return name


def response_field(value: object) -> str:
    """The name of a response's field that may be changed."""
    name = field_name(value)
    if name.lower().encode() in _OWN_RESPONSE_FIELDS:
        raise BadValueError(f"{name} is the proxy's own: it cannot be changed here")
    return name


def field_value(value: object) -> str:
    text = _field_text(value)
    if not _FIELD_VALUE.fullmatch(text):
        raise BadValueError("must be visible ASCII characters, with spaces and tabs between them")
    return text


def basic_auth(users_of_file: Callable[[str], str]) -> Callable[[object], BasicAuth]:
    """`{ realm, users, users_file }`; `users_of_file` gives the text of a file. Hashes are never shown."""
    read_table = table(
        {
            "realm": lambda value: _matching(_REALM, value, 'ASCII text without " and \\'),
            "users": each(_user, MAX_USERS),
            "users_file": lambda value: _users(users_of_file(values.text(value))),
        }
    )

    def read(value: object) -> BasicAuth:
        found = read_table(value)
        users = (*found.pop("users", ()), *found.pop("users_file", ()))
        if not users:
            raise BadValueError("needs users or users_file: without any nobody could come in")
        names = [name for name, _ in users]
        twice = next((name for name in names if names.count(name) > 1), None) if len(users) > 1 else None
        if twice is not None:
            raise BadValueError(f"has user {shown(twice)} twice")
        if len(users) > MAX_USERS:
            raise BadValueError(f"has {len(users)} users: {MAX_USERS} are the most")
        return BasicAuth(users, **found)

    return read


def maintenance(page_of_file: Callable[[str], str]) -> Callable[[object], Maintenance | None]:
    """`{ page | page_file, content_type, retry_after }`, or true for a page of ours."""
    read_table = table(
        {
            "page": _page,
            "page_file": lambda value: (values.text(value), _page(page_of_file(values.text(value)))),
            "content_type": lambda value: _matching(_CONTENT_TYPE, value, "a media type"),
            "retry_after": values.whole(0, 86_400),
        }
    )

    def read(value: object) -> Maintenance | None:
        if value is False:
            return None
        found = read_table({} if value is True else value)
        if "page" in found and "page_file" in found:
            raise BadValueError("has both page and page_file: use one of them")
        path, page = found.pop("page_file", ("", found.pop("page", _DEFAULT_PAGE)))
        suffix = path[path.rfind(".") :].lower() if "." in path else ""
        kind = _PAGE_KINDS.get(suffix, _PAGE_KINDS[".html" if page.lstrip().startswith("<") else ".txt"])
        return Maintenance(page, found.get("content_type", kind), found.get("retry_after", 0))

    return read


def _changes(name: Reader) -> Callable[[object], FieldChanges]:
    def pairs(read_one: Callable[[str, object], list[tuple[str, str]]]) -> Reader:
        def read(value: object) -> tuple[tuple[str, str], ...]:
            if not isinstance(value, dict):
                raise BadValueError(
                    f'must be a table such as {{ "X-Name" = "value" }}, not {values.kind(value)}'
                )
            found: list[tuple[str, str]] = []
            names: set[str] = set()
            for key, inner in value.items():
                within(key, name, key)
                if key.lower() in names:
                    raise InnerError((key,), "is there twice")
                names.add(key.lower())
                found += within(key, partial(read_one, key), inner)
            if len(found) > MAX_FIELDS:
                raise BadValueError(f"has {len(found)} fields: {MAX_FIELDS} are the most")
            return tuple(found)

        return read

    several = each(field_value, MAX_FIELDS)
    return record(
        FieldChanges,
        {
            "remove": each(name, MAX_FIELDS),
            "set": pairs(lambda key, given: [(key, field_value(given))]),
            "add": pairs(lambda key, given: [(key, value) for value in several(given)]),
        },
    )


request_headers: Final = _changes(request_field)
response_headers: Final = _changes(response_field)

balance: Final = values.one_of(*BALANCES)
weight: Final = values.whole(1, 1_000)
max_in_flight: Final = values.whole(0, 1_000_000)
networks: Final = each(network, MAX_NETWORKS)

sticky: Final = record(
    Sticky,
    {
        "cookie": lambda value: _matching(_TOKEN, value, "the name of a cookie"),
        "mode": values.one_of("insert", "prefix"),
    },
    "cookie",
)
health: Final = record(
    ServiceHealth,
    {
        "interval": values.seconds(0.1),
        "timeout": values.seconds(0.1),
        "rise": values.whole(1, 1000),
        "fall": values.whole(1, 1000),
        "statuses": each(values.whole(500, 599), 100),
    },
)
timeouts: Final = record(
    ServiceTimeouts,
    dict.fromkeys(("connect", "upstream_head", "upstream_idle", "body_idle"), values.seconds(0.1)),
)
rate_limits: Final = each(
    record(
        RateLimit,
        {"requests": values.whole(1, 1 << 30), "seconds": values.seconds(0.001), "key": rate_key},
        "requests",
    ),
    MAX_RATE_LIMITS,
)
forward_auth: Final = record(
    ForwardAuth,
    {
        "url": forward_url,
        "request_headers": each(field_name, MAX_FIELDS),
        "response_headers": each(request_field, MAX_FIELDS),
        "timeout": values.seconds(0.1, 300),
    },
    "url",
)


def listed(words: Mapping[str, object]) -> str:
    """`a, b or c`."""
    names = list(words)
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


# Private


def _matching(pattern: re.Pattern[str], value: object, what: str) -> str:
    text = values.text(value)
    if not pattern.fullmatch(text):
        raise BadValueError(f"must be {what}, not {shown(value)}")
    return text


def _field_text(value: object) -> str:
    if not isinstance(value, str):
        raise BadValueError(f"must be text, not {shown(value)}")
    if len(value) > MAX_VALUE:
        raise BadValueError(f"has {len(value)} characters: {MAX_VALUE} are the most")
    return value


def _user(value: object) -> tuple[str, str]:
    """`NAME:HASH`. A hash is no password, but nobody has to see it."""
    name, colon, hashed = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not name or not name.isprintable() or len(name) > 255:
        raise BadValueError("must be NAME:HASH, with the bcrypt hash of the password ($2b$...)")
    form = _BCRYPT.fullmatch(hashed)
    if form is None:
        raise BadValueError(f"user {shown(name)} has no bcrypt hash ($2b$...): make one by htpasswd -nB NAME")
    if not 4 <= int(form[1]) <= MAX_COST:
        raise BadValueError(f"user {shown(name)} has a hash of cost {int(form[1])}: 4 to {MAX_COST} will do")
    return name, hashed


def _users(text: str) -> tuple[tuple[str, str], ...]:
    """Those of an htpasswd file: one a line, `#` before what does not count."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(_user(line.strip()))
            except BadValueError as error:
                raise BadValueError(f"line {number}: {error}") from None
    return tuple(found)


def _page(value: object) -> str:
    if not isinstance(value, str):
        raise BadValueError(f"must be text, not {shown(value)}")
    if len(value.encode("utf-8", "replace")) > MAX_PAGE:
        raise BadValueError(f"is larger than {MAX_PAGE} bytes")
    return value
