"""Where in a TOML file a value stands: found by a second look at text that tomllib has taken."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.config.toml_file import TomlFile, lines_of
from portero_py.errors import ConfigError

TEXT = '''# a comment with [[service]]
top = 1
"quoted key" = """
[[service]]
not = "a key"
"""
'literal' = \'\'\'
[[service]]
\'\'\' # behind
a.b.c = { d = 1, "e f" = [1, { g = 2 }] }

[limits] # behind
body = 1979-05-27 07:32:00
[[service]]
name = "x"
list = [
  "one", # [[service]]
  { two = [
    3,
  ] },

  "four",
]
[service.inner]
deep = 1
[[service.more]]
k = 1
[[service.more]]
k = 2
[[service]]
name = "y"
inner.deep = "]]"
'''


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_value_has_its_line(end: str) -> None:
    text = TEXT.replace("\n", end)
    assert tomllib.loads(text)["service"][0]["list"][2] == "four"
    lines = lines_of(text)
    assert lines["top",] == 2
    assert lines["quoted key",] == 3
    assert lines["literal",] == 7
    assert lines["a", "b", "c"] == 10
    assert lines["a", "b", "c", "e f", 1, "g"] == 10
    assert lines["limits", "body"] == 13
    assert lines["service",] == 14
    assert lines["service", 0] == 14
    assert lines["service", 0, "name"] == 15
    assert lines["service", 0, "list", 0] == 17
    assert lines["service", 0, "list", 1, "two", 0] == 19
    assert lines["service", 0, "list", 2] == 22
    assert lines["service", 0, "inner", "deep"] == 25
    assert lines["service", 0, "more", 1, "k"] == 29
    assert lines["service", 1] == 30
    assert lines["service", 1, "inner", "deep"] == 32


def test_what_is_not_written_has_the_line_of_what_would_hold_it() -> None:
    sheet = TomlFile("x.toml", TEXT)
    assert sheet.where(("service", 1, "gone", "deeper")) == "x.toml:30"
    assert sheet.where(("service", 0, "more", 1, "gone")) == "x.toml:28"
    assert sheet.where(("gone",)) == "x.toml"


@pytest.mark.parametrize("text", ["[", "a = ", "a = [" * 5000, "a = " + "9" * 5000, "a = 1\na = 2"])
def test_what_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^x\.toml: no valid TOML: "):
        TomlFile("x.toml", text)


_KEYS = st.one_of(st.sampled_from(["a", "b-c", "service"]), st.text(max_size=4))
_VALUES = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def _quoted(text: str) -> str:
    return '"' + "".join(f"\\U{ord(c):08x}" for c in text) + '"'


class _Writer:
    """Writes a document, and remembers where it wrote what."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.line = 1
        self.lines: dict[tuple[str | int, ...], int] = {}

    def write(self, text: str) -> None:
        self.parts.append(text)
        self.line += text.count("\n")

    def value(self, place: tuple[str | int, ...], value: Any) -> None:
        if isinstance(value, dict):
            self.write("{ ")
            for number, (key, inner) in enumerate(value.items()):
                self.write(", " if number else "")
                self.lines[*place, key] = self.line
                self.write(f"{_quoted(key)} = ")
                self.value((*place, key), inner)
            self.write(" }")
        elif isinstance(value, list):
            self.write("[ # x ]\n")
            for number, inner in enumerate(value):
                self.lines[*place, number] = self.line
                self.value((*place, number), inner)
                self.write(",\n\n")
            self.write("]")
        else:
            self.write(
                _quoted(value)
                if isinstance(value, str)
                else str(value).lower()
                if isinstance(value, bool)
                else str(value)
            )


@settings(deadline=None)
@given(st.lists(st.dictionaries(_KEYS, _VALUES, max_size=4), max_size=3))
def test_lines_are_right_whatever_is_written(tables: list[dict[str, Any]]) -> None:
    writer = _Writer()
    for number, content in enumerate(tables):
        writer.lines["t", number] = writer.line
        writer.write("[[ t ]]\n")
        for key, value in content.items():
            writer.lines["t", number, key] = writer.line
            writer.write(f"{_quoted(key)} = ")
            writer.value(("t", number, key), value)
            writer.write(" # [[t]]\n")
    text = "".join(writer.parts)
    assert tomllib.loads(text).get("t", []) == tables
    found = lines_of(text)
    assert {place: found[place] for place in writer.lines} == writer.lines
