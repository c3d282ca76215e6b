"""Scales of least output error for codes that are given.

Error compensation chooses codes whose *sum* comes close to the weights, on a scale that was fitted to single weights.
At few bits that scale is too short: a sign times the mean magnitude keeps 64% of a normal weight's energy, and GPTQ
cannot make up for it beyond its last level. Once the codes are there, the best scales are those of linear least
squares: a row is w ~ sum over groups of s_g q_g, and (s_g) solves sum_h (q_g H q_h^T) s_h = q_g H w^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.quantize import SMALLEST
from deltafmt.terms.floats import narrow, widen

Floats = NDArray[np.float32]
# The levels of a group of columns in units of its scale, shape (rows, columns of the group), and where these are.
Group = tuple[Floats, slice]


def refit_scales(
    weights: Floats, hessian: NDArray[np.floating], groups: Sequence[Group], scales: Floats, scale_dtype: str
) -> Floats:
    """Return the scales of least output error, rounded to their dtype.

    Args:
        weights: W, float32, shape (rows, columns).
        hessian: H, shape (columns, columns).
        groups: levels and columns of every group.
        scales: float32, shape (rows, groups): they are kept in rows where a better scale would not be positive.
        scale_dtype: ``BF16`` or ``F32``.
    """
    rows, count = scales.shape
    matrix = np.empty((rows, count, count))
    target = np.empty((rows, count))
    moments = hessian.astype(np.float64)
    wide = weights.astype(np.float64)
    for g, (levels, at) in enumerate(groups):
        seen = levels.astype(np.float64) @ moments[at]
        target[:, g] = (seen * wide).sum(axis=1)
        for h, (others, where) in enumerate(groups):
            matrix[:, g, h] = (seen[:, where] * others).sum(axis=1)
    # A group without inputs, or of zero levels only, leaves its equation empty.
    diagonal = np.einsum("rgg->rg", matrix)
    largest = diagonal.max(axis=1, initial=0)
    diagonal += np.where(diagonal <= 0, np.maximum(largest, 1)[:, None], largest[:, None] * 1e-9)
    found = np.linalg.solve(matrix, target[:, :, None])[:, :, 0].astype(np.float32)
    rounded = widen(narrow(found, scale_dtype), scale_dtype)
    usable = (np.isfinite(rounded) & (rounded >= SMALLEST)).all(axis=1, keepdims=True)
    return np.where(usable, rounded, scales)


def row_errors(difference: Floats, hessian: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the part of trace(D H D^T) that every row adds."""
    wide = difference.astype(np.float64)
    errors: NDArray[np.float64] = np.einsum("ij,ij->i", wide @ hessian.astype(np.float64), wide)
    return errors
