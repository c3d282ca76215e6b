"""The tables of a report as rows of cells, for the terminal and for the HTML page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deltafmt.analysis import intermediate_results
from deltafmt.analysis.approximation import Approximation, ratio
from deltafmt.analysis.report import Group, Report, TensorFigures
from deltafmt.pipeline.summary import times

SHOWN_RANKS = (1, 8, 64)
NORMAL = (
    "More than 100% is normal where elements are kept at random (deltadq, residual, dare): such errors average out "
    "over a row, so the figures do not rank methods by accuracy; deltafmt evaluate compares them on a text."
)

KINDS = {
    "same": "nothing has changed",
    "narrow": "narrow rows, in which the errors of random dropout do not average out",
    "small": "a small delta, as an ordinary fine-tune has",
    "middle": "a delta of middle size",
    "large": "a large delta, which breaks many settings",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        title: the table's title.
        note: a sentence or two that explain how to read the table.
        rows: the cells; the first row has the columns' names, the first column the rows' names.
        words: how many columns have words, the first ones; all others have figures.
    """

    title: str
    note: str
    rows: list[list[str]]
    words: int = 1

    @property
    def right(self) -> tuple[bool, ...]:
        """For each column, True if it is aligned to the right."""
        return tuple(column >= self.words for column in range(len(self.rows[0])))


def figure(value: float | None) -> str:
    """Return a number with three digits, or a dash."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Return a share in percent, or a dash."""
    return "-" if value is None else f"{100 * value:.3g}%"


def tables(report: Report) -> list[Table]:
    """Return the tables of a report that have rows. A single candidate is shown at length; several are compared."""
    losses = comparison_table(report) if len(report.candidates) > 1 else loss_table(report, 0)
    found = [delta_table(report), product_table(report), losses, depth_table(report), recommendation_table(report)]
    return [table for table in found if len(table.rows) > 1]


def recommendation_table(report: Report) -> Table:
    """Return what to try first, and why; without rows where nothing was analyzed."""
    rows = [["options of pack", "on deltas like this", "times smaller"]]
    found = report.recommendation
    if found is None:
        return Table("What to try first", "", rows)
    rows += [[setting.options, setting.found, setting.times] for setting in found.settings]
    norm = "unknown" if found.relative_norm is None else percent(found.relative_norm)
    energy = (
        "" if found.energy is None else f", and 8 singular values hold {percent(found.energy)} of a delta's squares"
    )
    note = (
        f"The norm of all deltas is {norm} of the base's, half of their elements are in rows of {found.columns:,} "
        f"columns or fewer{energy}: {KINDS[found.kind]}. What worked on such deltas may not be enough for this one: "
        "deltafmt evaluate compares files by what the restored models predict of your text."
    )
    return Table("What to try first", note, rows, words=2)


def delta_table(report: Report) -> Table:
    """Return the norms and singular values by kind of layer."""
    rows = [["kind of layer", "matrices", "relative norm", "outlier columns"]]
    rows[0] += [f"energy in {count}" for count in SHOWN_RANKS] + ["effective rank"]
    for group in report.by_kind():
        energy = group.energy
        rows.append([group.label, str(len(group.members)), figure(group.relative_norm), f"{group.outlier_columns:,}"])
        rows[-1] += [percent(energy.get(count)) for count in SHOWN_RANKS] + [figure(group.effective_rank)]
    estimated = any(not spectrum.exact for group in report.by_kind() for spectrum in group.spectra)
    how = "estimated from below by randomized projections for large matrices" if estimated else "exact"
    note = (
        "Norm of the deltas over the norm of the base; columns of three times the usual norm; share of a delta's sum "
        f"of squares in its first singular values ({how})."
    )
    return Table("The delta", note, rows)


def product_table(report: Report) -> Table:
    """Return the Balanced Intermediate Results by kind of layer."""
    rows = [["kind of layer"]]
    for what in ("variance", "range"):
        rows[0] += [f"{what}, base", "fine-tune", "delta", "base / delta"]
    for group in report.by_kind():
        if not group.products:
            continue
        found = intermediate_results.summary(group.products)
        row = [group.label]
        for key in ("mean_variance", "mean_range"):
            values = [found[side][key] for side in intermediate_results.SIDES]
            row += [figure(value) for value in values] + [figure(values[0] / values[2] if values[2] else None)]
        rows.append(row)
    note = (
        f"Products x[j] * w[i, j] of an output, over j: mean variance and mean of max - min. Inputs: {report.inputs}."
    )
    return Table("Balanced Intermediate Results", note, rows)


def loss_table(report: Report, candidate: int) -> Table:
    """Return a candidate's losses by kind of layer, in the low, medium and high third of the layers."""
    rows = [["kind of layer", "delta lost", "outputs lost"]]
    bands = ("low", "medium", "high")
    deep = len(report.depths) >= len(bands)
    if deep:
        rows[0] += [f"outputs, {band}" for band in bands] + [f"outliers, {band}" for band in bands]
    for group in report.by_kind():
        lost = group.approximation(candidate)
        if lost is None:
            continue
        row = [group.label, percent(_lost(lost)), percent(_outputs_lost(lost))]
        if deep:
            each = [band.approximation(candidate) for band in report.by_band(group)]
            row += [figure(_mean(one, "outputs")) for one in each] + [figure(_mean(one, "outliers")) for one in each]
        rows.append(row)
    note = f"Sum of squares lost of the delta and of its outputs, in percent of the whole. {NORMAL}"
    if deep:
        note += (
            " Then mean squared errors in three thirds of the layers, of all outputs and of the 1% largest (outliers)."
        )
    return Table(f"What {_label(report, candidate)} loses", note, rows)


def comparison_table(report: Report) -> Table:
    """Return the size of every candidate, and its loss of the outputs by kind of layer."""
    rows = [["delta", "bytes", "times smaller"]]
    kinds = [group for group in report.by_kind() if any(one.pair.is_linear for one in group.members)]
    rows[0] += [group.label for group in kinds]
    for i, candidate in enumerate(report.candidates):
        rows.append([candidate.label, f"{candidate.size:,}", f"{report.finetuned_bytes / candidate.size:.2f}"])
        rows[-1] += [percent(_outputs_lost(group.approximation(i))) for group in kinds]
    note = f"Size of the whole file, and the sum of squares lost of the delta's outputs, in percent. {NORMAL}"
    return Table("Comparison", note, rows)


def _label(report: Report, candidate: int) -> str:
    found = report.candidates[candidate]
    return f"{found.label} ({found.size:,} bytes, {times(report.finetuned_bytes / found.size)})"


def depth_table(report: Report) -> Table:
    """Return the figures by depth."""
    rows = [["layer", "matrices", "relative norm", "energy in 8", "effective rank"]]
    rows[0] += ["delta variance", "delta range", *_numbered(report, "outputs lost")]
    for group in report.by_depth():
        found = intermediate_results.summary(group.products)["delta"] if group.products else {}
        rows.append([group.label, str(len(group.members)), figure(group.relative_norm)])
        rows[-1] += [percent(group.energy.get(8)), figure(group.effective_rank)]
        rows[-1] += [figure(found.get("mean_variance")), figure(found.get("mean_range"))]
        rows[-1] += [percent(_outputs_lost(group.approximation(i))) for i in range(len(report.candidates))]
    return Table("By depth", "The same figures for all matrices of a layer.", rows)


def tensor_table(report: Report) -> Table:
    """Return the figures of every tensor."""
    rows = [["tensor", "shape", "relative norm", "outlier columns", "energy in 8", "effective rank"]]
    rows[0] += _numbered(report, "delta lost")
    for one in report.tensors:
        spectrum = one.spectrum
        rows.append([one.pair.name, "x".join(map(str, one.pair.finetuned.shape)), figure(one.norms.relative)])
        rows[-1] += [_outliers(one), percent(spectrum.energy.get(8) if spectrum else None)]
        rows[-1] += [figure(spectrum.effective_rank if spectrum else None)]
        rows[-1] += [percent(_lost(lost)) for lost in one.approximations]
    return Table("Every tensor", "A dash where a figure does not apply, or the tensor is stored whole.", rows)


def _numbered(report: Report, words: str) -> list[str]:
    """Return a column's name for every candidate."""
    several = len(report.candidates) > 1
    return [f"{words} ({i})" if several else words for i, _ in enumerate(report.candidates, 1)]


def _outliers(one: TensorFigures) -> str:
    return f"{len(one.norms.outlier_columns):,}" if one.pair.is_matrix else "-"


def _lost(lost: Approximation | None) -> float | None:
    return None if lost is None else ratio(lost.lost, lost.squares)


def _outputs_lost(lost: Approximation | None) -> float | None:
    return None if lost is None or not lost.outputs else ratio(lost.output_lost, lost.output_squares)


def _mean(lost: Approximation | None, of: str) -> float | None:
    if lost is None or not lost.outputs:
        return None
    return lost.output_lost / lost.outputs if of == "outputs" else lost.outlier_lost / lost.outliers


def by_depth(report: Report, value: Callable[[Group], float | None]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return a figure by depth for every kind of layer: the kind's name, and the points (depth, figure) of its line."""
    lines = []
    for kind in report.by_kind():
        depths = sorted({one.pair.depth for one in kind.members if one.pair.depth is not None})
        points = []
        for depth in depths:
            found = value(Group(kind.label, [one for one in kind.members if one.pair.depth == depth]))
            if found is not None:
                points.append((float(depth), found))
        if points:
            lines.append((kind.label, points))
    return lines
