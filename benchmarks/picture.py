"""A picture of the table: for every row, a bar a peer, as long as its CPU time is beside nginx's.

Hand-written SVG: no script, no font and no colour scheme of the reader's is needed. A bar that is longer
than the picture is cut, and still has its figure beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

#: The ratio at which bars are cut, and pixels.
MOST = 4.0
LABELS = 250
WIDTH = 900
BAR = 13
GAP = 12
TOP = 64

_COLOURS = {
    "nginx": "#8b949e",
    "haproxy": "#5b8def",
    "caddy": "#e0a030",
    "portero": "#2a9d5c",
    "portero-compiled": "#136f63",
}
_UNIT = (WIDTH - LABELS - 70) / MOST


def bars(heading: str, ratios: Mapping[str, Mapping[str, float]]) -> str:
    """The SVG text of `ratios`: a row's title -> a peer's name -> its CPU time a request over nginx's."""
    names = list(dict.fromkeys(name for row in ratios.values() for name in row if name != "nginx"))
    height = TOP + sum(sum(name in row for name in names) * BAR + GAP for row in ratios.values())
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    font = 'font-family="sans-serif" font-size="12" fill="#24292f"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        f"<title>{escape(heading)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(heading)}</text>',
        *_legend(names),
    ]
    y = TOP
    for title, row in ratios.items():
        shown = [name for name in names if name in row]
        middle = y + len(shown) * BAR / 2 + 4
        lines.append(f'<text x="{LABELS - 10}" y="{middle:.0f}" text-anchor="end">{escape(title)}</text>')
        for name in shown:
            lines += _bar(y, name, row[name])
            y += BAR
        y += GAP
    one = LABELS + _UNIT
    place = f'x="{one:.1f}" y="{TOP - 10}" text-anchor="middle"'
    lines += [
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{TOP - 6}" y2="{y - 4}" stroke="{_COLOURS["nginx"]}"/>',
        f'<text {place} font-size="11" fill="#57606a">nginx = 1</text>',
    ]
    return "\n".join([*lines, "</svg>\n"])


# Private


def _legend(names: Sequence[str]) -> list[str]:
    lines, x = [], LABELS + _UNIT + 60
    for name in names:
        lines.append(f'<rect x="{x:.0f}" y="34" width="10" height="10" fill="{_colour(name)}"/>')
        lines.append(f'<text x="{x + 15:.0f}" y="43">{escape(name)}</text>')
        x += 32 + 7 * len(name)
    return lines


def _bar(y: int, name: str, ratio: float) -> list[str]:
    width = min(ratio, MOST) * _UNIT
    figure = f"{ratio:.2f}" + (" (cut)" if ratio > MOST else "")
    return [
        f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{BAR - 2}" fill="{_colour(name)}"/>',
        f'<text x="{LABELS + width + 5:.1f}" y="{y + 10}" font-size="11">{figure}</text>',
    ]


def _colour(name: str) -> str:
    return _COLOURS.get(name, "#a0a0a0")
