"""GPTQ: quantization column by column, and the columns after it make up for each column's error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323), algorithm 1. Column q of W is rounded; its error, divided by the diagonal of the
Cholesky factor U of the inverse Hessian, times row q of U is taken from the columns that are not yet rounded (eq. 2 and
3, in the form of section 3.3 step 3). Updates beyond a block of columns are made at once (eq. 4 and 5, step 2).

Beyond the paper: a column whose inputs were always zero keeps its nearest level (the authors' code sets its weights to
zero, which is as good for the calibration set and worse for any input that it lacks); and the scales can be refitted to
the codes (:mod:`deltafmt.methods.refit`), which at 1 and 2 bits matters more than the compensation itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.grids import Fields, Floats, Grid, Quantized, Steps
from deltafmt.methods.hessian import DAMPING, check_hessian, inverse_factor, output_error
from deltafmt.methods.refit import refit_scales, row_errors

BLOCK = 128

# Scale and zero point of every row for one column, in the order in which columns are rounded.
ColumnSteps = Callable[[int], tuple[Floats, Fields | None]]


@dataclass(frozen=True, slots=True)
class Solved:
    """A quantized matrix and how it was found.

    Attributes:
        quantized: codes, scales and zero points, columns in their own order.
        damping: share of the mean diagonal that was added to the Hessian.
        error: trace((W - Q) H (W - Q)^T), undamped.
    """

    quantized: Quantized
    damping: float
    error: float


def gptq(
    weights: Floats,
    hessian: NDArray[np.floating],
    grid: Grid,
    *,
    damping: float = DAMPING,
    act_order: bool = False,
    block: int = BLOCK,
    refits: int = 0,
) -> Solved:
    """Quantize a matrix so that its outputs, rather than its elements, stay close.

    Args:
        weights: W, float32, shape (rows, columns).
        hessian: H = sum of x x^T over the calibration set, shape (columns, columns).
        grid: bits, kind and scales. Scales of a group are fitted when its first column is reached, to the weights as
            they are by then; with ``act_order`` they are fitted beforehand, to the weights as given.
        damping: share of the mean diagonal of H that is added to it.
        act_order: round the columns by falling diagonal of H. Groups stay those of the columns' own order.
        block: columns whose updates are applied one by one.
        refits: how often the scales are refitted to the codes; between two times the codes are solved for again. Each
            row keeps the best of all it has had. 0 is the paper's method.

    Raises:
        UsageError: shapes do not fit, or H is not positive semidefinite.
        NonFiniteError: H is not finite.
    """
    rows, columns = weights.shape
    check_hessian(hessian, columns)
    if block < 1:
        raise UsageError(f"a block of {block} columns is not positive")
    order = _order(hessian, act_order)
    work = np.ascontiguousarray(weights.T[order])
    size = grid.size(columns)
    if act_order:
        steps = grid.fit(weights)
        codes, used = _walk(work, hessian, order, grid, _static(steps, order // size), damping, block)
    else:
        steps = Steps(
            np.zeros((rows, grid.groups(columns)), np.float32),
            np.zeros((rows, grid.groups(columns)), np.uint8) if grid.kind == "asymmetric" else None,
        )
        if size < columns:
            block = max(block // size, 1) * size  # a group's scales want all updates of the blocks before it
        codes, used = _walk(work, hessian, order, grid, _fitted(steps, grid, work), damping, block)
    best = _Best(weights, hessian, Quantized(grid, np.ascontiguousarray(codes.T), steps.scales, steps.zeros))
    found = best.quantized
    for number in range(refits):
        if number:
            steps = Steps(found.scales, found.zeros)
            work = np.ascontiguousarray(weights.T[order])
            codes, _ = _walk(work, hessian, order, grid, _static(steps, order // size), damping, block)
            found = Quantized(grid, np.ascontiguousarray(codes.T), steps.scales, steps.zeros)
        found = _refitted(weights, hessian, found)
        best.offer(found)
    return Solved(best.quantized, used, output_error(weights - best.quantized.dense(), hessian))


def gptq_columns(weights: Floats, hessian: NDArray[np.floating], grid: Grid) -> Solved:
    """Quantize as :func:`gptq` does with ``act_order``, with scales that run down the columns.

    The transpose of W is what is stored: ``quantized`` has shape (columns, rows), and ``grid.group`` counts rows of W.
    A factor of few columns then has few scales.
    """
    check_hessian(hessian, weights.shape[1])
    across = np.ascontiguousarray(weights.T)
    steps = grid.fit(across)
    scales, zeros = steps.spread(across.shape[1], grid)
    order = _order(hessian, act_order=True)

    def column_steps(column: int) -> tuple[Floats, Fields | None]:
        return scales[order[column]], None if zeros is None else zeros[order[column]]

    codes, used = _walk(across[order], hessian, order, grid, column_steps, DAMPING, BLOCK)
    quantized = Quantized(grid, codes, steps.scales, steps.zeros)
    return Solved(quantized, used, output_error((across - quantized.dense()).T, hessian))


class _Best:
    """The best codes that each row has had so far.

    Attributes:
        quantized: the rows with these codes.
    """

    def __init__(self, weights: Floats, hessian: NDArray[np.floating], first: Quantized) -> None:
        self.quantized = first
        self._weights, self._hessian = weights, hessian
        self._errors = row_errors(weights - first.dense(), hessian)

    def offer(self, other: Quantized) -> None:
        """Take the rows that are better in another solution."""
        errors = row_errors(self._weights - other.dense(), self._hessian)
        better = (errors < self._errors)[:, None]
        self._errors = np.minimum(errors, self._errors)
        codes = np.where(better, other.codes, self.quantized.codes)
        scales = np.where(better, other.scales, self.quantized.scales)
        self.quantized = Quantized(other.grid, codes, scales, other.zeros)


def _refitted(weights: Floats, hessian: NDArray[np.floating], found: Quantized) -> Quantized:
    """Return the same codes with scales of least output error."""
    grid, columns = found.grid, weights.shape[1]
    size = grid.size(columns)
    levels = Quantized(grid, found.codes, np.ones_like(found.scales), found.zeros).dense()
    groups = [(levels[:, start : start + size], slice(start, start + size)) for start in range(0, columns, size)]
    scales = refit_scales(weights, hessian, groups, found.scales, grid.scale_dtype)
    return Quantized(grid, found.codes, scales, found.zeros)


def _order(hessian: NDArray[np.floating], act_order: bool) -> NDArray[np.intp]:
    """Return the columns in the order in which they are rounded."""
    return np.argsort(-np.diagonal(hessian), kind="stable") if act_order else np.arange(hessian.shape[0])


def _static(steps: Steps, at: NDArray[np.intp]) -> ColumnSteps:
    """Give the scales of the group of a column."""
    return lambda column: (steps.scales[:, at[column]], None if steps.zeros is None else steps.zeros[:, at[column]])


def _fitted(steps: Steps, grid: Grid, work: Floats) -> ColumnSteps:
    """Fit the scales of a group when its first column is reached, to what ``work``, transposed, holds then."""
    size = grid.size(work.shape[0])

    def column_steps(column: int) -> tuple[Floats, Fields | None]:
        group = column // size
        if column % size == 0:
            found = grid.fit(np.ascontiguousarray(work[column : column + size].T))
            steps.scales[:, group] = found.scales[:, 0]
            if steps.zeros is not None and found.zeros is not None:
                steps.zeros[:, group] = found.zeros[:, 0]
        return steps.scales[:, group], None if steps.zeros is None else steps.zeros[:, group]

    return column_steps


def _walk(
    work: Floats,
    hessian: NDArray[np.floating],
    order: NDArray[np.intp],
    grid: Grid,
    column_steps: ColumnSteps,
    damping: float,
    block: int,
) -> tuple[Fields, float]:
    """Round the columns of W one after the other.

    Args:
        work: W transposed, its columns in ``order``; it is changed.
        hessian: H, in the columns' own order.
        order: order in which columns are rounded.
        grid, column_steps: the levels.
        damping, block: arguments of :func:`gptq`.

    Returns:
        The transposed codes, columns in their own order, and the damping that was used.
    """
    factor = inverse_factor(hessian[np.ix_(order, order)], damping)
    upper = factor.upper
    columns = work.shape[0]
    codes = np.empty(work.shape, np.uint8)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = np.empty((stop - start, work.shape[1]), np.float32)
        for column in range(start, stop):
            scales, zeros = column_steps(column)
            fields = grid.assign(work[column], scales, zeros)
            codes[order[column]] = fields
            error = (work[column] - grid.values(fields, scales, zeros)) / upper[column, column]
            errors[column - start] = error
            work[column + 1 : stop] -= np.outer(upper[column, column + 1 : stop], error)
        work[stop:] -= upper[start:stop, stop:].T @ errors
    return codes, factor.damping
