"""An evaluation as one HTML page."""

from __future__ import annotations

import os
from pathlib import Path

from deltafmt.analysis import svg
from deltafmt.analysis.evaluation import tables
from deltafmt.analysis.evaluation.figures import Evaluation, ModelFigures
from deltafmt.analysis.page import page, save, section

# Divergences below this are rounding errors of float32, and are drawn here.
LEAST = 1e-8


def write(evaluation: Evaluation, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the page to a file.

    Raises:
        UsageError: the file exists, and ``force`` is not given.
        StorageError: the file cannot be written.
    """
    save(render(evaluation), path, force=force)


def render(evaluation: Evaluation) -> str:
    """Return the page as text."""
    charts = [_sizes(evaluation), _divergences(evaluation), _continuations(evaluation)]
    left_out = "".join(f"<li>{svg.text(name)}: {svg.text(why)}</li>" for name, why in evaluation.left_out.items())
    opening = f"Fine-tune: {evaluation.finetuned.label}. Text: {evaluation.text}."
    parts = [section(tables.table(evaluation), charts), f"<p>Left out:</p><ul>{left_out}</ul>" if left_out else ""]
    return page(f"What deltas of {_name(evaluation.finetuned)} cost", opening, parts)


def _name(model: ModelFigures) -> str:
    return Path(model.label).name or model.label


def _sizes(evaluation: Evaluation) -> str:
    """Return the chart of the divergence over the size; one delta makes none."""
    if len(evaluation.deltas) < 2:
        return ""
    lines = []
    for model in evaluation.deltas:
        assert model.divergence is not None
        lines.append((_name(model), [(evaluation.finetuned_bytes / model.size, max(model.divergence, LEAST))]))
    x = svg.axis_over("times smaller", [a for _, points in lines for a, _ in points], log=True)
    y = svg.axis_over("KL divergence", [b for _, points in lines for _, b in points], log=True)
    return svg.line_chart("Mean KL divergence from the fine-tune, over the size of the file", x, y, lines, dots=True)


def _divergences(evaluation: Evaluation) -> str:
    models = [model for model in evaluation.models if model.role != "finetuned" and model.quantiles]
    if not models:
        return ""
    rows = [[max(value, LEAST) for value in model.quantiles[:5]] for model in models]
    y = svg.axis_over("KL divergence", [value for row in rows for value in row], log=True)
    names = [_name(model) for model in models]
    title = "KL divergence from the fine-tune (5, 25, 50, 75 and 95% of the tokens)"
    return svg.range_chart(title, y, names, [("all tokens", rows)], label="model")


def _continuations(evaluation: Evaluation) -> str:
    """Return the chart of the share of continuations that are still the fine-tune's after so many tokens."""
    if not evaluation.continuations:
        return ""
    longest, count = max(evaluation.continuations), len(evaluation.continuations)
    lines = []
    for model in evaluation.models:
        if model.role == "finetuned":
            continue
        # A continuation that has ended as the fine-tune's did stays the same.
        parted = [
            followed if followed < length else longest + 1
            for followed, length in zip(model.followed, evaluation.continuations, strict=True)
        ]
        lines.append((_name(model), [(float(n), sum(at >= n for at in parted) / count) for n in range(longest + 1)]))
    x = svg.Axis("tokens", 0.0, float(longest))
    return svg.line_chart("Continuations that are still the fine-tune's", x, svg.Axis("share", 0.0, 1.0), lines)
