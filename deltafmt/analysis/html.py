"""The report as one HTML page without scripts, fonts and network; it is light or dark as the reader prefers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from deltafmt.analysis import intermediate_results, svg
from deltafmt.analysis.approximation import ratio
from deltafmt.analysis.page import page, save, section
from deltafmt.analysis.quantized import MAX_ROWS, REACH, edges
from deltafmt.analysis.report import Group, Report
from deltafmt.analysis.tables import (
    by_depth,
    comparison_table,
    delta_table,
    depth_table,
    loss_table,
    product_table,
    recommendation_table,
    tensor_table,
)


def write(report: Report, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the page to a file.

    Raises:
        UsageError: the file exists, and ``force`` is not given.
        StorageError: the file cannot be written.
    """
    save(render(report), path, force=force)


def render(report: Report) -> str:
    """Return the page as text."""
    title = f"Delta of {_base_name(report.finetuned)} against {_base_name(report.base)}"
    skipped = "".join(f"<li>{svg.text(name)}: {svg.text(reason)}</li>" for name, reason in report.skipped.items())
    parts = [
        section(delta_table(report), [_norms(report), _energies(report)]),
        section(product_table(report), [_products(report, key) for key in ("variance", "range")]),
        _histogram(report),
        *(section(loss_table(report, i), _losses(report, i)) for i in range(len(report.candidates))),
        section(comparison_table(report), [_comparison(report)]) if len(report.candidates) > 1 else "",
        section(depth_table(report), []),
        section(recommendation_table(report), []),
        f"<details><summary>Every tensor</summary>{section(tensor_table(report), [])}</details>",
        f"<details><summary>Left out</summary><ul>{skipped}</ul></details>" if skipped else "",
    ]
    return page(title, _opening(report), parts)


def _opening(report: Report) -> str:
    return (
        f"{len(report.matrices)} matrices and {len(report.tensors) - len(report.matrices)} other tensors. "
        f"Base: {report.base}. Fine-tune: {report.finetuned}. Inputs: {report.inputs}."
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


def _base_name(path: str) -> str:
    return Path(path).name or path
