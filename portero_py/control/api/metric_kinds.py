"""Metrics as a scrape shows them, before they are text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """What may be done with a metric's numbers."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: `values` is the labels' values -> (number,); of a histogram (cumulative buckets, sum)."""

    kind: Kind
    name: str
    meaning: str
    labels: tuple[str, ...]
    values: Mapping[tuple[str, ...], tuple[Any, ...]]
