"""One value at a time: what a flag, a variable or a key of the file may hold.

A reader takes a value as the TOML file gives it (text from flags and variables is brought into that shape
by `shape_*` first) and returns what `Config` holds. It raises `BadValueError` with the rest of the sentence
"listen-addr: ..."; the caller knows where the value came from. The readers of secrets never show the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, Final
from urllib.parse import urlsplit

from portero_py.config.model import Address, Network
from portero_py.core.acme.names import read_group, read_pattern
from portero_py.core.names import MAX_NAME
from portero_py.errors import ConfigError

Reader = Callable[[object], Any]

#: Portero's words (those of Rust's env_logger) beside Python's.
LOG_LEVELS: Final = {
    "off": "error",
    "error": "error",
    "warn": "warning",
    "warning": "warning",
    "info": "info",
    "debug": "debug",
    "trace": "debug",
}

#: Short names of CAs.
ACME_DIRECTORIES: Final = {
    "letsencrypt": "https://acme-v02.api.letsencrypt.org/directory",
    "staging": "https://acme-staging-v02.api.letsencrypt.org/directory",
}

_HOST_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?")
#: Characters of a value that a complaint repeats.
_MAX_SHOWN: Final = 80

_KID: Final = re.compile(r"[A-Za-z0-9._:/+-]{1,128}")


class BadValueError(ValueError):
    """A value that cannot be used; the text says why, and what would do."""


# Text from flags and variables, brought into the shape of the file


def shape_text(text: str) -> object:
    return text


def shape_list(text: str) -> object:
    """Several values in one variable are separated by commas or white space."""
    return re.split(r"[,\s]+", text.strip(", \t\r\n"))


def shape_lines(text: str) -> object:
    """One value a line; empty lines and lines that begin with `#` do not count."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def shape_words(text: str) -> object:
    """Several values, separated by white space only: each may hold commas."""
    return text.split()


def shape_command(text: str) -> object:
    """A program and its arguments, quoted as for a shell, or the text itself for the reader to refuse."""
    import shlex  # for those who have such a program

    try:
        return shlex.split(text)
    except ValueError:
        return text


def shape_whole(text: str) -> object:
    """A whole number, or the text itself for the reader to refuse."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()) else text


def shape_switch(text: str) -> object:
    word = text.strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    return False if word in {"0", "false", "no", "off"} else text


# Readers


def text(value: object) -> str:
    """Text without control characters; "" is allowed."""
    if not isinstance(value, str):
        raise BadValueError(f"must be text, not {kind(value)}")
    if not value.isprintable():
        raise BadValueError("must not hold control characters")
    return value


def switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise BadValueError(f"must be true or false, not {shown(value)}")
    return value


def off_switch(value: object) -> bool:
    """A flag that turns off what is on by default, such as `--no-tls`."""
    return not switch(value)


def whole(lowest: int, highest: int) -> Reader:
    """A whole number within both bounds."""

    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise BadValueError(f"must be a whole number from {lowest} to {highest}, not {shown(value)}")
        return value

    return read


def workers(value: object) -> int:
    """How many data-plane processes; `auto` is one for each core that this process may use."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1024:
        raise BadValueError(f"must be auto or a whole number from 1 to 1024, not {shown(value)}")
    return value


def seconds(lowest: float, highest: float = 86400) -> Reader:
    """A time in seconds within both bounds; fractions are allowed."""

    def read(value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and lowest <= value <= highest:
            return value
        raise BadValueError(f"must be a number of seconds from {lowest:g} to {highest:g}, not {shown(value)}")

    return read


def one_of(*words: str) -> Reader:
    def read(value: object) -> str:
        word = value.strip().lower() if isinstance(value, str) else value
        if word not in words:
            raise BadValueError(f"must be {_alternatives(words)}, not {shown(value)}")
        return str(word)

    return read


def many(read_one: Reader) -> Reader:
    """A list; one value alone does too. Duplicates are dropped, the order stays."""

    def read(value: object) -> tuple[Any, ...]:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(dict.fromkeys(read_one(each) for each in values))

    return read


def log_level(value: object) -> str:
    """A level, or Portero's filter list (`warn,portero=debug`), of which Portero's own part counts."""
    if not isinstance(value, str):
        raise BadValueError(f"must be {_alternatives(tuple(LOG_LEVELS))}, not {shown(value)}")
    own = everything = ""
    for directive in filter(None, (part.strip().lower() for part in value.split(","))):
        module, equals, level = directive.rpartition("=")
        if level not in LOG_LEVELS:
            raise BadValueError(f"must be {_alternatives(tuple(LOG_LEVELS))}, not {shown(level)}")
        if not equals:
            everything = level
        elif module.partition("::")[0] in {"portero", "portero_py"}:
            own = level
    return LOG_LEVELS[own or everything or "info"]


def address(value: object) -> Address:
    """`host:port`, `[v6]:port` or `:port`; port 0 lets the system choose."""
    forms = "use host:port, [v6]:port or :port"
    if not isinstance(value, str):
        raise BadValueError(f"must be an address, not {kind(value)}: {forms}")
    host, colon, port = value.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_ip(host, 6):
            raise BadValueError(f"{shown(value)} holds no IPv6 address between its brackets: {forms}")
    elif ":" in host:
        raise BadValueError(f"{shown(value)} needs brackets around its IPv6 address: {forms}")
    elif host and not _HOST_NAME.fullmatch(host):
        raise BadValueError(f"{shown(value)} is no address: {forms}")
    elif re.fullmatch(r"[0-9.]+", host) and not _is_ip(host, 4):
        raise BadValueError(f"{shown(value)} holds no IPv4 address: {forms}")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise BadValueError(f"{shown(value)} has no port from 0 to 65535: {forms}")
    return Address(host, int(port))


def connect_address(value: object) -> Address:
    """An address to connect to: a host and a port, neither left to the system."""
    chosen = address(value)
    if not chosen.host or not chosen.port:
        raise BadValueError(f"{shown(value)} must name both a host and a port from 1 to 65535")
    return chosen


def network(value: object) -> Network:
    """A network in CIDR notation, or one IP address."""
    if not isinstance(value, str):
        raise BadValueError(f"must be a network such as 10.0.0.0/8 or fd00::/8, not {kind(value)}")
    try:
        return ip_network(value.strip())
    except ValueError:
        pass
    try:
        meant = ip_interface(value.strip()).network
    except ValueError:
        raise BadValueError(
            f"{shown(value)} is no network: use 10.0.0.0/8, fd00::/8 or one IP address"
        ) from None
    raise BadValueError(f"{shown(value)} has bits set beyond its prefix: the network is {meant}")


def service_name(value: object) -> str:
    """A service's host name in lower case, or "" for none."""
    name = text(value).strip().rstrip(".").lower()
    if name and (len(name) > MAX_NAME or not _HOST_NAME.fullmatch(name)):
        raise BadValueError(f"{shown(value)} is no host name")
    return name


def secret(value: object) -> str:
    """A shared secret. It travels in a header field, which carries no controls and no outer white space."""
    if not isinstance(value, str):
        raise BadValueError("must be text")
    if not value.isprintable():
        raise BadValueError("must not hold control characters: it is sent in a header field")
    if value != value.strip():
        raise BadValueError("must not begin or end with white space: a header field would lose it")
    return value


def key(value: object) -> str:
    """An HMAC key, taken as it is: it may hold any characters, `=` included."""
    if not isinstance(value, str):
        raise BadValueError("must be text")
    return value


def named_key(value: object) -> tuple[str, str]:
    """`KID=KEY`, split at the first `=`: a kid holds none, a key may."""
    kid, equals, rest = value.partition("=") if isinstance(value, str) else ("", "", "")
    if not equals or not rest or not _KID.fullmatch(kid):
        raise BadValueError("must be KID=KEY, where KID is made of letters, digits and . _ : / + -")
    return kid, rest


def acme_names(value: object) -> tuple[str, ...]:
    """The names of one certificate: `a.example`, or `a.example,www.a.example`."""
    try:
        return read_group(text(value))
    except ConfigError as error:
        raise BadValueError(str(error)) from None


def acme_pattern(value: object) -> str:
    """A service name, or `*.` in front of one."""
    try:
        return read_pattern(text(value))
    except ConfigError as error:
        raise BadValueError(str(error)) from None


def acme_directory(value: object) -> str:
    """The https:// address of a CA's directory; `letsencrypt` and `staging` are Let's Encrypt's two."""
    url = text(value).strip()
    url = ACME_DIRECTORIES.get(url.lower(), url)
    if not url.isascii() or not is_url(url, "https"):
        raise BadValueError(f"{shown(value)} is no https:// address: use one, letsencrypt or staging")
    return url


def command(value: object) -> tuple[str, ...]:
    """A program and its arguments, which no shell ever sees; `["/usr/local/bin/hook", "zone"]`."""
    words = [value] if isinstance(value, str) and " " not in value else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise BadValueError(
            f'must be a list of words, such as ["/path/to/program", "word"], not {shown(value)}'
        )
    if not words or not words[0]:
        raise BadValueError("must name a program")
    if "/" in words[0] and not words[0].startswith("/"):
        raise BadValueError(
            f"must name its program by a whole path, or by its name alone, not {shown(words[0])}"
        )
    return tuple(text(word) for word in words)


def domain(value: object) -> str:
    """A domain's name in DNS, in lower case and without the last dot, or "" for none."""
    return service_name(value)


def ip_port(value: object) -> Address:
    """An IP address and a port: who looks names up cannot be looked up."""
    chosen = connect_address(value)
    if not (_is_ip(chosen.host, 4) or _is_ip(chosen.host, 6)):
        raise BadValueError(f"{shown(value)} must be an IP address and a port")
    return chosen


def is_url(url: str, *schemes: str) -> bool:
    """Whether it is an absolute URL of one of these schemes, with a host and, if any, a port that can be."""
    try:
        parts = urlsplit(url)
        # Both are only parsed when they are asked for, and raise what `urlsplit` itself raises for "//[x".
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        return False


def email(value: object) -> str:
    """One e-mail address; it is the CA that knows whether it exists."""
    address = text(value).strip()
    if not re.fullmatch(r"[^\s@,<>]+@[^\s@,<>]+", address):
        raise BadValueError(f"{shown(value)} is no e-mail address")
    return address


def nearest(word: str, known: list[str]) -> str:
    """The known word that `word` was most likely meant to be."""
    import difflib  # for complaints only

    return difflib.get_close_matches(word[:_MAX_SHOWN], known, n=1, cutoff=0.0)[0]


def shown(value: object) -> str:
    """A value as a complaint shows it: short, and without control characters."""
    try:
        text = f'"{value}"' if isinstance(value, str) else str(value)
    except ValueError:  # Python writes no number of more than 4,300 digits, alone or in a list
        text = "that"
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: _MAX_SHOWN + 1])
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def kind(value: object) -> str:
    """What sort of value it is, where the value itself may be a secret."""
    names = {
        "bool": "true or false",
        "int": "a number",
        "float": "a number",
        "list": "a list",
        "dict": "a table",
    }
    return names.get(type(value).__name__, "text" if isinstance(value, str) else "a date or time")


# Private


def _is_ip(host: str, version: int) -> bool:
    try:
        return ip_address(host).version == version
    except ValueError:
        return False


def _alternatives(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
