"""What came out, as rows that are kept, and as tables in docs/reliability.md between two markers.

A run of some scenarios or peers replaces their rows and leaves the others, so each row says of which commit
it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.asks import Kind
from benchmarks.faults.ledger import Tally

BEGIN = "<!-- figures: written by `make faults` -->"
END = "<!-- end of the figures -->"

#: A load that was later than this was no steady load: its row says so.
TOO_LATE = 0.25


@dataclass
class Row:
    """One scenario with one peer."""

    scenario: str
    peer: str
    commit: str
    tally: Tally
    repeated: int = 0  # POSTs that were carried out once too often
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Row:
        return cls(**{**said, "tally": Tally(**said["tally"])})


def read(path: Path) -> list[Row]:
    """The rows that were kept; none where there is no file."""
    return [Row.read(each) for each in json.loads(path.read_text())["rows"]] if path.exists() else []


def keep(path: Path, about: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write them down."""
    path.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def merged(
    old: Sequence[Row], new: Sequence[Row], scenarios: Sequence[str], peers: Sequence[str]
) -> list[Row]:
    """The new rows in the place of the old ones, in the order of the scenarios and peers."""
    found = {(row.scenario, row.peer): row for row in [*old, *new]}
    return [found[scenario, peer] for scenario in scenarios for peer in peers if (scenario, peer) in found]


def summary(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """One line a scenario, one column a peer: how many GETs and POSTs were lost, how many downloads and
    WebSockets, of how many, and the slowest answer.
    """
    peers = list(dict.fromkeys(row.peer for row in rows))
    lines = ["| | " + " | ".join(peers) + " |", "|---|" + "--:|" * len(peers)]
    for key, title in titles.items():
        mine = {row.peer: row for row in rows if row.scenario == key}
        if mine:
            cells = [_cell(mine[peer]) if peer in mine else "" for peer in peers]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """Every row: what was lost of each class and in which way."""
    lines = [
        "| scenario | peer | sent | right | lost: GETs | POSTs | downloads | WebSockets | how | p99 | max ||",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|---|",
    ]
    for row in rows:
        tally = row.tally
        lost = " | ".join(str(tally.lost_of(kind)) for kind in Kind)
        ways = ", ".join(f"{count} {way}" for way, count in tally.ways().items())
        head = f"| {titles[row.scenario]} | {row.peer} | {tally.total_sent} | {tally.total_answered}"
        times = f"{tally.p99:.2f} | {_slowest(tally):.1f}"
        lines.append(f"{head} | {lost} | {ways} | {times} | {'; '.join(remarks(row))} |")
    return "\n".join(lines)


def remarks(row: Row) -> list[str]:
    """What a reader must know beside the counts."""
    found = list(row.notes)
    if row.repeated:
        found.append(f"{row.repeated} POSTs carried out twice")
    if row.tally.late > TOO_LATE:
        found.append(f"the load itself was up to {row.tally.late:.1f} s late")
    return found


def into(page: str, text: str) -> str:
    """The page with `text` between its markers. ValueError: it does not have both."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page lacks its markers")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


# Private


def _slowest(tally: Tally) -> float:
    return max(tally.slowest.values(), default=0.0)


def _cell(row: Row) -> str:
    asked, begun = row.tally.lost_of(Kind.GET, Kind.POST), row.tally.lost_of(Kind.DOWNLOAD, Kind.WEBSOCKET)
    mark = " *" if remarks(row) else ""
    count = f"**{asked}**" if asked else "0"
    return f"{count} + {begun} of {row.tally.total_sent:,}, {_slowest(row.tally):.1f} s{mark}"
