"""The report as one HTML page without scripts, fonts and network; it is light or dark as the reader prefers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from deltafmt.analysis import intermediate_results, svg
from deltafmt.analysis.approximation import ratio
from deltafmt.analysis.quantized import MAX_ROWS, REACH, edges
from deltafmt.analysis.report import Group, Report
from deltafmt.analysis.tables import (
    Table,
    by_depth,
    comparison_table,
    delta_table,
    depth_table,
    loss_table,
    product_table,
    tensor_table,
)
from deltafmt.errors import Remedy, UsageError
from deltafmt.output import OutputLock, storage_error, sync_folder

_LIGHT = ["1f77b4", "d95f02", "1b9e77", "c2255c", "7048e8", "a07000", "0b7285", "868e96", "5c940d", "9c36b5"]
_DARK = ["6db3f2", "ff9f57", "4fd3a8", "ff7aa2", "a99bff", "e0b83a", "53c7d9", "adb5bd", "a9d65c", "d98be8"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --line: #d9dde3; --page: #ffffff; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa2ad; --line: #363b43; --page: #16181c; DARK }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p { max-width: 46rem; } .note { color: var(--soft); }
svg { width: 100%; height: auto; max-width: 52rem; display: block; margin: 1rem 0; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .title { font-size: 13px; font-weight: 600; } svg .label, svg .tick { text-anchor: middle; }
svg .tick { fill: var(--soft); } svg .tick.y { text-anchor: end; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 1.8; } svg .dashed { stroke-dasharray: 5 3; }
svg .median { stroke: var(--page); stroke-width: 2; } svg circle, svg rect { stroke: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
COLORS"""


def write(report: Report, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the page to a file.

    Raises:
        UsageError: the file exists, and ``force`` is not given.
        StorageError: the file cannot be written.
    """
    text, target = render(report), Path(path)
    if not force and os.path.lexists(target):
        raise UsageError(f"{path} exists", Remedy("force"))
    # The page appears whole or not at all.
    partial = target.parent / f".{target.name}.partial"
    try:
        lock = OutputLock(target.parent / f".{target.name}.partial.lock", target)
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)
            lock.remove()
    except OSError as error:
        raise storage_error("cannot write", path, error) from error


def render(report: Report) -> str:
    """Return the page as text."""
    title = f"Delta of {_base_name(report.finetuned)} against {_base_name(report.base)}"
    skipped = "".join(f"<li>{svg.text(name)}: {svg.text(reason)}</li>" for name, reason in report.skipped.items())
    parts = [
        f"<h1>{svg.text(title)}</h1>",
        f'<p class="note">{svg.text(_opening(report))}</p>',
        _section(delta_table(report), [_norms(report), _energies(report)]),
        _section(product_table(report), [_products(report, key) for key in ("variance", "range")]),
        _histogram(report),
        *(_section(loss_table(report, i), _losses(report, i)) for i in range(len(report.candidates))),
        _section(comparison_table(report), [_comparison(report)]) if len(report.candidates) > 1 else "",
        _section(depth_table(report), []),
        f"<details><summary>Every tensor</summary>{_section(tensor_table(report), [])}</details>",
        f"<details><summary>Left out</summary><ul>{skipped}</ul></details>" if skipped else "",
    ]
    head = f'<meta charset="utf-8"><title>{svg.text(title)}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    head += f"<style>{_style()}</style>"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _opening(report: Report) -> str:
    return (
        f"{len(report.matrices)} matrices and {len(report.tensors) - len(report.matrices)} other tensors. "
        f"Base: {report.base}. Fine-tune: {report.finetuned}. Inputs: {report.inputs}."
    )


def _section(table: Table, charts: list[str]) -> str:
    if len(table.rows) < 2:
        return ""
    head = "".join(f"<th>{svg.text(cell)}</th>" for cell in table.rows[0])
    rows = "".join("<tr>" + "".join(f"<td>{svg.text(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows[1:])
    drawn = "\n".join(charts)
    return (
        f'<h2>{svg.text(table.title)}</h2>\n<p class="note">{svg.text(table.note)}</p>\n{drawn}\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
    )


def _norms(report: Report) -> str:
    return _depth_chart("Relative norm of the delta", "norm of delta / norm of base", report, _relative_norm)


def _relative_norm(group: Group) -> float | None:
    return group.relative_norm


def _losses(report: Report, candidate: int) -> list[str]:
    return [
        _depth_chart("Share of the delta's sum of squares that is lost", "lost / whole", report, _lost(candidate)),
        _depth_chart("Mean squared error of the outputs", "mean squared error", report, _output_error(candidate)),
    ]


def _lost(candidate: int) -> Callable[[Group], float | None]:
    def value(group: Group) -> float | None:
        lost = group.approximation(candidate)
        return None if lost is None else ratio(lost.lost, lost.squares)

    return value


def _output_error(candidate: int) -> Callable[[Group], float | None]:
    def value(group: Group) -> float | None:
        lost = group.approximation(candidate)
        return lost.output_lost / lost.outputs if lost and lost.outputs else None

    return value


def _comparison(report: Report) -> str:
    lines = []
    for i, candidate in enumerate(report.candidates):
        found = ((float(group.label), _output_error(i)(group)) for group in report.by_depth())
        lines.append((candidate.label, [(depth, error) for depth, error in found if error is not None]))
    if not any(points for _, points in lines):
        return ""
    x = svg.axis_over("layer", [depth for _, points in lines for depth, _ in points])
    y = svg.axis_over("mean squared error", [error for _, points in lines for _, error in points], zero=True)
    return svg.line_chart("Mean squared error of the outputs, all kinds of layers", x, y, lines, dots=True)


def _depth_chart(title: str, label: str, report: Report, value: Callable[[Group], float | None]) -> str:
    lines = by_depth(report, value)
    if not lines:
        return ""
    x = svg.axis_over("layer", [depth for _, points in lines for depth, _ in points])
    y = svg.axis_over(label, [number for _, points in lines for _, number in points], zero=True)
    return svg.line_chart(title, x, y, lines, names=_names(report), dots=True)


def _names(report: Report) -> list[str]:
    return [group.label for group in report.by_kind()]


def _energies(report: Report) -> str:
    lines = [
        (group.label, [(float(count), share) for count, share in group.energy.items()]) for group in report.by_kind()
    ]
    lines = [(label, points) for label, points in lines if points]
    if not lines:
        return ""
    x = svg.axis_over("singular values", [count for _, points in lines for count, _ in points], log=True)
    y = svg.Axis("share of the sum of squares", 0.0, 1.0)
    return svg.line_chart("Energy in the first singular values", x, y, lines, names=_names(report), dots=True)


def _products(report: Report, key: str) -> str:
    groups = [group for group in report.by_kind() if group.products]
    found = [intermediate_results.summary(group.products) for group in groups]
    if not found:
        return ""
    names = {"base": "base", "finetuned": "fine-tune", "delta": "delta"}
    sides = [(names[side], [one[side][f"{key}_quantiles"] for one in found]) for side in intermediate_results.SIDES]
    y = svg.axis_over(key, [value for _, rows in sides for row in rows for value in row], log=True)
    title = f"{key.capitalize()} of the products of an output (5, 25, 50, 75 and 95% of the outputs)"
    return svg.range_chart(title, y, [group.label for group in groups], sides)


def _histogram(report: Report) -> str:
    histogram = report.histogram
    if not histogram.all.sum():
        return ""
    n, m, bits = report.quantization
    left = edges()[:-1]
    lines = []
    for name, counts in (("all", histogram.all), ("kept", histogram.kept), (f"kept, {bits} bits", histogram.quantized)):
        shares = counts[1:-1] / max(counts.sum(), 1)
        lines.append((name, list(zip(left.tolist(), shares.tolist(), strict=True))))
    x = svg.Axis("value / root mean square of its matrix", -REACH, REACH)
    y = svg.axis_over("share of values", [share for _, points in lines for _, share in points if share], log=True)
    chart = svg.line_chart("Values of the delta before and after quantization", x, y, lines, steps=True)
    note = (
        f"All values, those kept at random ({n} of {m}), and these after {bits}-bit min-max quantization with a scale "
        f"for each row; up to {MAX_ROWS} rows of every matrix."
    )
    return f'<h2>Quantization</h2>\n<p class="note">{svg.text(note)}</p>\n{chart}'


def _style() -> str:
    light, dark = (" ".join(f"--c{i}: #{color};" for i, color in enumerate(colors)) for colors in (_LIGHT, _DARK))
    rules = "".join(
        f"svg .line.c{i} {{ stroke: var(--c{i}); }} svg circle.c{i}, svg rect.c{i} {{ fill: var(--c{i}); }}\n"
        for i in range(svg.COLORS)
    )
    return STYLE.replace("LIGHT", light).replace("DARK", dark).replace("COLORS", rules)


def _base_name(path: str) -> str:
    return Path(path).name or path
