"""The tables of docs/reliability.md: what a row says, and what a new run leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import report
from benchmarks.faults.ledger import Tally
from benchmarks.faults.report import BEGIN, END, Row

TITLES = {"frozen": "one is frozen", "500": "one answers 500"}


def row(scenario: str, peer: str, lost: int = 0, late: float = 0.0, repeated: int = 0) -> Row:
    ways = {"GET": {"504": lost}} if lost else {}
    tally = Tally({"GET": 1000}, {"GET": 1000 - lost}, ways, {"GET": 2.5}, 0.01, late, 5.0)
    return Row(scenario, peer, "abc", tally, repeated)


def test_a_summary_has_a_line_a_scenario_and_a_column_a_peer() -> None:
    rows = [row("frozen", "portero"), row("frozen", "nginx", lost=3), row("500", "nginx", late=1.0)]
    rows[2].tally.lost["WebSocket"] = {"cut": 1}
    assert report.summary(rows, TITLES).splitlines() == [
        "| | portero | nginx |",
        "|---|--:|--:|",
        "| one is frozen | 0 + 0 of 1,000, 2.5 s | **3** + 0 of 1,000, 2.5 s |",
        "| one answers 500 |  | 0 + 1 of 1,000, 2.5 s * |",
    ]


def test_a_row_tells_when_the_load_was_late_and_when_a_post_was_carried_out_twice() -> None:
    text = report.details([row("frozen", "portero", late=1.0, repeated=2)], TITLES)
    assert text.endswith("| 2 POSTs carried out twice; the load itself was up to 1.0 s late |")


def test_a_run_replaces_its_own_rows_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    assert report.read(path) == []
    report.keep(path, {}, [row("frozen", "portero", lost=9), row("500", "nginx")])
    rows = report.merged(
        report.read(path), [row("frozen", "portero")], list(TITLES), ["portero", "nginx", "caddy"]
    )
    assert rows == [row("frozen", "portero"), row("500", "nginx")]


def test_only_what_is_between_the_markers_is_written() -> None:
    page = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    assert report.into(page, "new") == f"above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"
    with pytest.raises(ValueError, match="markers"):
        report.into("above\n", "new")
