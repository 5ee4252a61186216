"""A TOML file, and where in it each value stands: whoever complains about a key names its line.

`tomllib` says what a file holds, not where. So the text is looked through a second time when there is
something to complain about, and only then. It is known to be valid TOML by then: the scan is simple, and
passes over what it need not understand.

A place is the way from the top to a value: names of keys, and numbers of elements, from 0. `[[service]]`
twice is two elements of `service`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from portero_py.config.files import read_text
from portero_py.errors import ConfigError

Place = tuple["str | int", ...]

#: The most that one file may hold, bytes: 10,000 services are about 4 MB.
MAX_TOML: Final = 16 << 20

_TOKEN: Final = re.compile(
    r"""
    (?P<space>[ \t]+ | \#[^\n]*)
  | (?P<line>\n)
  | (?P<text>\"{3}(?:[^\\]|\\.)*?\"{3,5} | '{3}.*?'{3,5} | "(?:[^"\\\n]|\\.)*" | '[^'\n]*')
  | (?P<mark>[\[\]{}=,.])
  | (?P<word>[^\s\[\]{}=,."'#]+)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)

#: How deep a place may be. What is deeper has the line of what holds it.
_MAX_DEPTH: Final = 12


class TomlFile:
    """What a file holds (`content`), and where (`where`)."""

    def __init__(self, path: str, text: str) -> None:
        """Raises ConfigError when `text` is no TOML. `path` is how complaints call it."""
        self.path = path
        self.size = len(text)
        self._text = text
        self._lines: dict[Place, int] | None = None
        try:
            self.content: dict[str, Any] = tomllib.loads(text)
        except ValueError as error:  # TOMLDecodeError is one; a number of thousands of digits is another
            raise ConfigError(f"{path}: no valid TOML: {error}") from None
        except RecursionError:
            raise ConfigError(f"{path}: no valid TOML: lists or tables are nested too deeply") from None

    @classmethod
    def read(cls, path: str, source: str) -> TomlFile:
        """The file at `path`. Raises ConfigError: `source` is what named the file."""
        # Some editors begin a file with a mark of its bytes' order.
        return cls(path, read_text(Path(path), source, MAX_TOML).removeprefix("\ufeff"))

    def where(self, place: Sequence[str | int]) -> str:
        """`FILE:LINE` of a place or, when that is not written anywhere, of what would hold it."""
        if self._lines is None:
            self._lines = lines_of(self._text)
        at = tuple(place)
        while at and at not in self._lines:
            at = at[:-1]
        return f"{self.path}:{self._lines[at]}" if at else self.path


def lines_of(text: str) -> dict[Place, int]:
    """The line, from 1, of each table, key and element of a TOML document."""
    found: dict[Place, int] = {}
    elements: dict[Place, int] = {}  # of each `[[...]]`: the number of the last one
    table: Place = ()
    tokens = _Tokens(text.replace("\r\n", "\n"))
    while (first := tokens.next_statement()) is not None:
        if first == "[":
            line = tokens.line
            is_element = tokens.take("[")
            keys = tokens.keys("]")
            table = ()
            for at, key in enumerate(keys):
                table = (*table, key)
                if at < len(keys) - 1 and table in elements:
                    table = (*table, elements[table])
            if is_element:
                elements[table] = elements.get(table, -1) + 1
                found.setdefault(table, line)
                table = (*table, elements[table])
            found.setdefault(table, line)
            tokens.skip_line()
        else:
            line = tokens.line
            place = table
            for key in tokens.keys("=", first):
                place = (*place, key)
                found.setdefault(place, line)
            tokens.value(place, found)
    return found


# Private


class _Tokens:
    """The words and marks of a document, with the line that each stands in."""

    def __init__(self, text: str) -> None:
        self.line = 1
        self._tokens = self._scan(text)
        self._next = next(self._tokens, None)

    def next_statement(self) -> str | None:
        """The first token of the next line that has any."""
        while self._next == "\n":
            self._advance()
        return self._advance()

    def take(self, mark: str) -> bool:
        """Pass over `mark` if it is next."""
        if self._next != mark:
            return False
        self._advance()
        return True

    def skip_line(self) -> None:
        while self._next not in (None, "\n"):
            self._advance()

    def keys(self, end: str, first: str | None = None) -> list[str]:
        """The keys, dotted, up to `end`."""
        found = []
        part = self._advance() if first is None else first
        while part is not None and part not in (end, "\n"):
            if part != ".":
                found.append(_key(part))
            part = self._advance()
        return found

    def value(self, place: Place, found: dict[Place, int]) -> None:
        """A value, whose parts go into `found`; ends behind it."""
        is_known = len(place) < _MAX_DEPTH
        if self.take("["):
            number = 0
            while not self._skip_to("]"):
                if is_known:
                    found.setdefault((*place, number), self.line)
                self.value((*place, number) if is_known else place, found)
                number += 1
        elif self.take("{"):
            while not self._skip_to("}"):
                line, inner = self.line, place
                for key in self.keys("="):
                    inner = (*inner, key) if is_known else inner
                    found.setdefault(inner, line)
                self.value(inner, found)
        else:
            while self._next not in (None, "\n", ",", "]", "}"):
                self._advance()

    def _skip_to(self, end: str) -> bool:
        """Pass over what separates values; whether that was the last one."""
        while self._next in (",", "\n"):
            self._advance()
        return self._next is None or self.take(end)

    def _advance(self) -> str | None:
        token, self._next = self._next, None
        if token is not None:
            self._next = next(self._tokens, None)
        return token

    def _scan(self, text: str) -> Iterator[str]:
        line = 1
        for match in _TOKEN.finditer(text):
            token = match[0]
            if match.lastgroup != "space":
                self.line = line
                yield token
            line += token.count("\n")


def _key(token: str) -> str:
    if token[0] == "'":
        return token[1:-1]
    if token[0] == '"':
        return str(tomllib.loads(f"key = {token}")["key"])
    return token
