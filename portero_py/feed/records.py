"""Frozen dataclasses <- JSON, by the types of their fields.

The rules
- What orjson wrote of such a class comes back equal: texts, numbers, switches, enums by value, None, tuples
  of one kind (or of fixed kinds), and other such classes.
- A field that is not known is left out, one that is missing has its default: the two ends may be of different
  versions.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar

_Record = TypeVar("_Record")


def read(of: Callable[..., _Record], content: Any) -> _Record:
    """The `of` that orjson wrote. Raises TypeError, ValueError or AttributeError when it did not."""
    readers = _readers(of)
    return of(**{name: readers[name](value) for name, value in content.items() if name in readers})


# Private


@cache
def _readers(of: Any) -> dict[str, Callable[[Any], Any]]:
    kinds = typing.get_type_hints(of)
    return {each.name: _reader(kinds[each.name]) for each in fields(of) if each.init}


def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a `kind` of what JSON has in its place."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        [present] = [each for each in inner if each is not type(None)]
        read_present = _reader(present)
        return lambda value: None if value is None else read_present(value)
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        read_each = _reader(inner[0])
        return lambda value: tuple([read_each(each) for each in value])
    if origin is tuple:
        each_reader = [_reader(each) for each in inner]
        return lambda value: tuple([reads(each) for reads, each in zip(each_reader, value, strict=True)])
    if isinstance(kind, type) and is_dataclass(kind):
        return lambda value: read(kind, value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    return _as_it_is


def _as_it_is(value: Any) -> Any:
    return value
