"""Curves over the size of a file as an SVG file of its own, light or dark as the reader's page is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltafmt.analysis import svg

LIGHT = ("1f77b4", "d95f02", "1b9e77", "c2255c", "7048e8", "a07000", "0b7285", "868e96", "5c940d", "9c36b5")
DARK = ("6db3f2", "ff9f57", "4fd3a8", "ff7aa2", "a99bff", "e0b83a", "53c7d9", "adb5bd", "a9d65c", "d98be8")
STYLE = """
text { fill: #1c1e21; font: 11px system-ui, sans-serif; } .page { fill: #ffffff; }
.title { font-size: 13px; font-weight: 600; } .label, .tick { text-anchor: middle; }
.tick { fill: #5c6370; } .tick.y { text-anchor: end; }
.grid { stroke: #d9dde3; } .axis { stroke: #5c6370; fill: none; }
.line { fill: none; stroke-width: 1.8; } .dashed { stroke-dasharray: 5 3; }
"""
STYLE_DARK = """
text { fill: #e6e8eb; } .page { fill: #16181c; } .tick { fill: #9aa2ad; }
.grid { stroke: #363b43; } .axis { stroke: #9aa2ad; }
"""


@dataclass(frozen=True, slots=True)
class Octaves(svg.Axis):
    """A logarithmic axis with a tick for every doubling."""

    def ticks(self) -> list[float]:
        """Return the powers of two within the axis."""
        first, last = math.ceil(math.log2(self.low) - 1e-9), math.floor(math.log2(self.high) + 1e-9)
        return [2.0**power for power in range(first, last + 1)]


def octaves_over(label: str, values: Sequence[float]) -> Octaves:
    """Return an axis of whole octaves that holds all values, which are positive."""
    low, high = (2.0 ** round_(math.log2(end)) for round_, end in ((math.floor, min(values)), (math.ceil, max(values))))
    return Octaves(label, low, high if high > low else 2 * low, log=True)


def chart(title: str, x: str, y: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Return an SVG file: shares, 0 to 1, over sizes.

    Args:
        title: of the chart.
        x, y: what the axes show.
        lines: name and points of each, at least one point in all.
    """
    across = octaves_over(x, [size for _, points in lines for size, _ in points])
    drawn = svg.line_chart(title, across, svg.Axis(y, 0.0, 1.02), lines, dots=True)
    style = f"{STYLE}{_colors(LIGHT)}@media (prefers-color-scheme: dark) {{{STYLE_DARK}{_colors(DARK)}}}"
    page = f'<style>{style}</style>\n<rect class="page" width="{svg.WIDTH}" height="{svg.HEIGHT}"/>\n'
    start = drawn.index("\n") + 1
    return drawn[:start].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + page + drawn[start:] + "\n"


def _colors(colors: Sequence[str]) -> str:
    rules = (
        f".line.c{i} {{ stroke: #{color}; }} circle.c{i} {{ fill: #{color}; }}\n" for i, color in enumerate(colors)
    )
    return "".join(rules)
