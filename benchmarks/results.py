"""What was measured, as Markdown and as files: RESULTS.md and results.svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import picture
from benchmarks.rows import Row
from benchmarks.samples import Sample


@dataclass(frozen=True)
class Section:
    """A table of its own below the main one: `note` says how it was measured."""

    title: str
    note: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def table(plan: Sequence[Row], names: Sequence[str], samples: Sequence[Sample]) -> str:
    """The medians as a Markdown table: CPU µs a request, requests/s, and the ratios to nginx and to Caddy."""
    lines = [
        "| row | peer | CPU µs/request | min .. max | requests/s | core | x nginx | x Caddy | failed |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in plan:
        found = {name: [s for s in samples if (s.row, s.peer) == (row.key, name)] for name in names}
        cost = {name: median(s.cpu_us for s in found[name]) for name in names}
        for name in names:
            mine = found[name]
            spread = f"{min(s.cpu_us for s in mine):.1f} .. {max(s.cpu_us for s in mine):.1f}"
            rate = median(s.requests_per_second for s in mine)
            share = median(s.core_share for s in mine)
            ratios = " | ".join(
                f"{cost[name] / cost[to]:.2f}" if to in cost else "" for to in ("nginx", "caddy")
            )
            failed = sum(s.failed for s in mine)
            head = f"| {row.title} | {name} | {cost[name]:.1f} | {spread} | {rate:.0f} | {share:.0%}"
            lines.append(f"{head} | {ratios} | {failed} |")
    return "\n".join(lines)


def section_text(section: Section) -> str:
    """The section as Markdown, its heading included."""
    head = "| " + " | ".join(section.columns) + " |\n|---|" + "--:|" * (len(section.columns) - 1)
    lines = "\n".join("| " + " | ".join(line) + " |" for line in section.lines)
    return f"## {section.title}\n\n{section.note}\n\n{head}\n{lines}"


def ratios(
    plan: Sequence[Row], names: Sequence[str], samples: Sequence[Sample]
) -> dict[str, dict[str, float]]:
    """A row's title -> a peer's name -> its median CPU time a request over nginx's; {} without nginx."""
    found: dict[str, dict[str, float]] = {}
    for row in plan if "nginx" in names else ():
        cost = {
            name: median(s.cpu_us for s in samples if (s.row, s.peer) == (row.key, name)) for name in names
        }
        found[row.title] = {name: cost[name] / cost["nginx"] for name in names}
    return found


def save(
    folder: Path,
    about: Mapping[str, str],
    how: str,
    beside_nginx: Mapping[str, Mapping[str, float]],
    parts: Sequence[str],
) -> None:
    """Write RESULTS.md and, where there is something beside nginx, results.svg. `folder` need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        "# Results",
        f"Written by `make bench` ([how it measures](../docs/benchmarks.md)): {how}.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in about.items())]),
    ]
    if beside_nginx:
        heading = "CPU time a request beside nginx (shorter is better)"
        (folder / "results.svg").write_text(picture.bars(heading, beside_nginx))
        text.append(f"![{heading}](results.svg)")
    (folder / "RESULTS.md").write_text("\n\n".join([*text, *parts]) + "\n")
