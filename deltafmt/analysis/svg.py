"""Charts as inline SVG: lines, and ranges by category. The page's style sheet gives the colors, by class.

A chart has a title, labelled axes with ticks, and a legend. NaN and infinity are left out, and on a logarithmic axis
also zero and negative numbers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 340
LEFT, TOP, BOTTOM, LEGEND = 72, 34, 48, 170
COLORS = 10

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its label, its lowest and highest value, and its scale."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the place of a value on the axis, from 0 to 1."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return round values on the axis."""
        if self.log:
            lowest, highest = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(lowest, highest + 1, max((highest - lowest) // 6, 1))]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def axis_over(label: str, values: Sequence[float], *, log: bool = False, zero: bool = False) -> Axis:
    """Return an axis for all values; a logarithmic one has whole decades, and with ``zero`` it starts at zero."""
    good = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(good), max(good)) if good else (1.0, 10.0) if log else (0.0, 1.0)
    if log:
        low, high = (10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))
        return Axis(label, low, high if high > low else low * 10, log=True)
    low = min(low, 0.0) if zero else low
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(label, low if zero else low - margin, high + margin)


def text(line: str) -> str:
    """Return text that is safe in a page and in an attribute: names come from files that anyone may have made."""
    printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return html.escape(printable)


def number(value: float) -> str:
    """Return a short form of a number."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def line_chart(
    title: str,
    x: Axis,
    y: Axis,
    lines: Sequence[tuple[str, Points]],
    *,
    names: Sequence[str] = (),
    steps: bool = False,
    dots: bool = False,
) -> str:
    """Return a chart of named lines.

    Args:
        title: the chart's title.
        x, y: the chart's axes.
        lines: the name and the points of each line.
        names: all names of lines in a fixed order, which gives each name the same color in several charts; if empty,
            the order of the lines gives the colors.
        steps: draw steps, as in a histogram.
        dots: mark the points.
    """
    across, up = _scales(x, y)
    parts = _frame(title, x, y, across, up, x.ticks())
    order = list(names) or [name for name, _ in lines]
    for name, points in lines:
        i = order.index(name)
        good = [(across(a), up(b)) for a, b in points if _fits(x, a) and _fits(y, b)]
        path = ""
        for j, (a, b) in enumerate(good):
            path += f"M{a:.1f} {b:.1f}" if not j else f"H{a:.1f}V{b:.1f}" if steps else f"L{a:.1f} {b:.1f}"
        parts.append(f'<path class="line c{i % COLORS}{_dash(i)}" d="{path}"/>')
        if dots:
            parts += [f'<circle class="c{i % COLORS}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in good]
    return _svg(title, parts + _legend([(order.index(name), name) for name, _ in lines], _line_key))


def range_chart(
    title: str,
    y: Axis,
    categories: Sequence[str],
    groups: Sequence[tuple[str, Sequence[Sequence[float]]]],
    *,
    label: str = "kind of layer",
) -> str:
    """Return a chart of five quantiles (5, 25, 50, 75, 95%) for every category and group: whiskers, box and median.

    Args:
        title: the chart's title.
        y: the vertical axis.
        categories: the labels along the horizontal axis.
        groups: the name of each group, and five ascending numbers for each category.
        label: the label of the horizontal axis.
    """
    x = Axis(label, 0.0, float(max(len(categories), 1)))
    across, up = _scales(x, y)
    parts = _frame(title, x, y, across, up, ())
    room = (across(1) - across(0)) / (len(groups) + 1)
    for j, category in enumerate(categories):
        middle = across(j + 0.5)
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}">{text(category)}</text>')
        for i, (_, rows) in enumerate(groups):
            if not all(_fits(y, value) for value in rows[j]):
                continue
            center = across(j) + room * (i + 1)
            low, first, median, third, high = (up(value) for value in rows[j])
            half = min(room * 0.35, 14)
            parts.append(f'<path class="line c{i}" d="M{center:.1f} {low:.1f}V{high:.1f}"/>')
            box = f'x="{center - half:.1f}" y="{third:.1f}" width="{2 * half:.1f}" height="{max(first - third, 1):.1f}"'
            parts.append(f'<rect class="c{i}" {box}/>')
            parts.append(f'<path class="median" d="M{center - half:.1f} {median:.1f}h{2 * half:.1f}"/>')
    return _svg(title, parts + _legend(list(enumerate(name for name, _ in groups)), _box_key))


def _fits(axis: Axis, value: float) -> bool:
    return math.isfinite(value) and (not axis.log or value > 0)


def _scales(x: Axis, y: Axis) -> tuple[Callable[[float], float], Callable[[float], float]]:
    wide, high = WIDTH - LEFT - LEGEND, HEIGHT - TOP - BOTTOM
    return (lambda value: LEFT + wide * x.place(value)), (lambda value: HEIGHT - BOTTOM - high * y.place(value))


def _frame(
    title: str,
    x: Axis,
    y: Axis,
    across: Callable[[float], float],
    up: Callable[[float], float],
    x_ticks: Sequence[float],
) -> list[str]:
    right, floor = WIDTH - LEGEND, HEIGHT - BOTTOM
    parts = [f'<text class="title" x="{LEFT}" y="20">{text(title)}</text>']
    for value in y.ticks():
        at = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 6}" y="{at + 4:.1f}">{number(value)}</text>')
    for value in x_ticks:
        at = across(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{floor}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{floor + 16}">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}"/>')
    parts.append(f'<text class="label" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 10}">{text(x.label)}</text>')
    turned = f"translate(16 {(TOP + floor) / 2:.0f}) rotate(-90)"
    parts.append(f'<text class="label" transform="{turned}">{text(y.label)}</text>')
    return parts


def _legend(entries: Sequence[tuple[int, str]], key: Callable[[int, float, float], str]) -> list[str]:
    left = WIDTH - LEGEND + 14
    parts = []
    for place, (color, name) in enumerate(entries):
        at = TOP + 8 + 17.0 * place
        parts.append(key(color, left, at))
        parts.append(f'<text class="key" x="{left + 26}" y="{at + 4:.0f}">{text(_short(name))}</text>')
    return parts


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"…{name[-21:]}"


def _line_key(i: int, left: float, at: float) -> str:
    return f'<path class="line c{i % COLORS}{_dash(i)}" d="M{left} {at:.0f}h20"/>'


def _box_key(i: int, left: float, at: float) -> str:
    return f'<rect class="c{i % COLORS}" x="{left + 3}" y="{at - 5:.0f}" width="14" height="10"/>'


def _dash(i: int) -> str:
    return " dashed" if i // COLORS % 2 else ""


def _svg(title: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    label = text(title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n{body}\n</svg>'
