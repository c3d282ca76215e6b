"""SparseGPT: N of every M columns are kept and quantized, and the columns after make up for the loss.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv 2301.00774),
algorithm 1 with the mask of section 3.3 and joint quantization (section 3.5), on a delta as in DeltaZip (Yao, Klimovic,
arXiv 2312.05215): w^2 / diag(U)^2 scores an entry, where the inverse Hessian is U^T U; the mask of a group is chosen
when its first column is reached, from the weights as they are by then; a row's scale is fixed before.

Beyond the papers: rows may share their mask, whose scores are then summed; and scales may serve groups of kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods import quantize
from deltafmt.methods.gptq_solver import BLOCK
from deltafmt.methods.hessian import DAMPING, check_hessian, inverse_factor
from deltafmt.methods.largest import largest
from deltafmt.methods.refit import refit_scales, row_errors
from deltafmt.methods.sampling import gather
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout

Floats = NDArray[np.float32]
Positions = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned and quantized matrix and how it was found.

    Attributes:
        arrays: positions, codes and scales.
        damping: share of the mean diagonal that was added to the Hessian.
        error: trace((W - Q) H (W - Q)^T), undamped.
    """

    arrays: NMArrays
    damping: float
    error: float


def sparsegpt(
    delta: Floats,
    hessian: NDArray[np.floating],
    layout: NMLayout,
    *,
    rule: str = "minmax",
    damping: float = DAMPING,
    block: int = BLOCK,
    refits: int = 0,
) -> Pruned:
    """Prune and quantize a delta so that its outputs stay close.

    Args:
        delta: W, float32, shape (rows, columns).
        hessian: H = sum of x x^T over the calibration set, shape (columns, columns).
        layout: N, M, k, grid, shared rows and scales.
        rule: ``minmax`` or ``mse``: how scales fit the entries that would be kept without any error compensation.
        damping: share of the mean diagonal of H that is added to it.
        block: columns whose updates are applied one by one, rounded to whole groups.
        refits: how often the scales are refitted to the codes, as :func:`deltafmt.methods.gptq_solver.gptq` does; the
            positions stay those chosen first.

    Raises:
        UsageError: shapes do not fit, a scale overflows, or H is not positive semidefinite.
        NonFiniteError: H is not finite.
    """
    columns = delta.shape[1]
    check_hessian(hessian, columns)
    factor = inverse_factor(hessian, damping)
    importance = np.diagonal(factor.upper).copy()
    first = largest((delta / importance) ** 2, layout.n, layout.m, layout.share)
    kept = gather(delta, first, layout.m, layout.share, np.float32(1))
    _, scales = quantize.quantize(kept, layout.bits, layout.grid, rule, layout.scale_group, layout.scale_dtype)
    step = max(block // layout.m, 1) * layout.m

    def solve(scales: Floats, positions: Positions | None = None) -> NMArrays:
        walk = _Walk(layout, scales, np.ascontiguousarray(delta.T), factor.upper, importance, positions)
        for start in range(0, columns, step):
            walk.block(start, min(start + step, columns))
        return NMArrays(walk.positions, walk.codes, scales)

    found = solve(scales)
    best, errors = found, row_errors(delta - nm.dense(layout, found, columns), hessian)
    for number in range(refits):
        if number:
            found = solve(found.scales, found.positions)
        found = _refitted(delta, hessian, layout, found)
        now = row_errors(delta - nm.dense(layout, found, columns), hessian)
        better = (now < errors)[:, None]
        errors = np.minimum(now, errors)
        codes, scales = np.where(better, found.codes, best.codes), np.where(better, found.scales, best.scales)
        best = NMArrays(found.positions, codes, scales)
    return Pruned(best, factor.damping, float(errors.sum()))


def _refitted(delta: Floats, hessian: NDArray[np.floating], layout: NMLayout, found: NMArrays) -> NMArrays:
    """Return the same positions and codes with scales of least output error."""
    columns, count = delta.shape[1], found.scales.shape[1]
    size = layout.scale_group or layout.kept(columns)
    groups = []
    for number in range(count):
        one = np.zeros_like(found.scales)
        one[:, number] = 1
        last = min((number + 1) * size, layout.kept(columns)) - 1
        at = slice(number * size // layout.n * layout.m, (last // layout.n + 1) * layout.m)
        levels = nm.dense(layout, NMArrays(found.positions, found.codes, one), columns)[:, at]
        groups.append((levels, slice(at.start, at.start + levels.shape[1])))
    scales = refit_scales(delta, hessian, groups, found.scales, layout.scale_dtype)
    return NMArrays(found.positions, found.codes, scales)


class _Walk:
    """The columns of a delta from the first to the last.

    Attributes:
        positions: positions decided so far; given positions stay.
        codes: codes decided so far.
    """

    def __init__(
        self,
        layout: NMLayout,
        scales: Floats,
        work: Floats,
        upper: Floats,
        importance: Floats,
        positions: Positions | None,
    ) -> None:
        columns, rows = work.shape
        groups = layout.groups(columns)
        self.layout, self.scales, self.work, self.upper, self.importance = layout, scales, work, upper, importance
        self.choose = positions is None
        self.positions = np.zeros((layout.mask_rows(rows), groups, layout.n), np.uint8)
        if positions is not None:
            self.positions[...] = positions
        self.codes = np.zeros((rows, groups * layout.n), np.uint8)

    def block(self, start: int, stop: int) -> None:
        """Decide the columns of a block, and apply their errors to all that follow."""
        errors = np.zeros((stop - start, self.work.shape[1]), np.float32)
        for first in range(start, stop, self.layout.m):
            entry = self._entries(first, min(first + self.layout.m, stop))
            for column in range(first, min(first + self.layout.m, stop)):
                error = self._round(column, entry[column - first]) / self.upper[column, column]
                errors[column - start] = error
                self.work[column + 1 : stop] -= np.outer(self.upper[column, column + 1 : stop], error)
        self.work[stop:] -= self.upper[start:stop, stop:].T @ errors

    def _entries(self, first: int, stop: int) -> NDArray[np.int64]:
        """Decide the mask of a group; return which entry each of its elements is, or -1, shape (columns, rows)."""
        layout, rows = self.layout, self.work.shape[1]
        group = first // layout.m
        if self.choose:
            scores = (self.work[first:stop].T / self.importance[first:stop]) ** 2
            self.positions[:, group] = largest(scores, layout.n, layout.m, layout.share)[:, 0]
        kept = self.positions[np.arange(rows) // layout.share, group]
        entry = np.full((layout.m, rows), -1, np.int64)
        entry[kept.T, np.arange(rows)] = group * layout.n + np.arange(layout.n)[:, None]
        return entry

    def _round(self, column: int, entry: NDArray[np.int64]) -> Floats:
        """Store the codes of a column and return the loss."""
        layout = self.layout
        rows = np.flatnonzero(entry >= 0)
        entry = entry[rows]
        size = layout.scale_group or self.codes.shape[1]
        scales = self.scales[rows, entry // size]
        lost: Floats = self.work[column].copy()
        fields = quantize.assign(lost[rows], scales, layout.bits, layout.grid)
        self.codes[rows, entry] = fields
        lost[rows] -= (2 * fields - layout.top).astype(np.float32) * (scales * np.float32(0.5))
        return lost
