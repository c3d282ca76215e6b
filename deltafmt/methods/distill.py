"""Scales of signs that are learnt from a text (BitDelta, arXiv 2402.10193, section 3.1, "scale distillation").

The paper trains the scales of all matrices end to end, by gradient descent on the difference of logits. Here each
matrix's are those of least squared error of *its* outputs over the text, for which there is a closed form: with D the
delta, S the signs and H = sum of x x^T over the inputs, the error is trace((D - Q) H (D - Q)^T), and

    one level a for the matrix          a = <S, D H> / <S, S H>
    a level for every row, or group     linear least squares of a row (:mod:`deltafmt.methods.refit`)
    a level for every column            (S^T S o H) a = diag(S^T D H),  o the elementwise product

so nothing is trained, and one matrix is handled at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.hessian import DAMPING, check_hessian
from deltafmt.methods.refit import refit_scales

Floats = NDArray[np.float32]


def distilled_rows(delta: Floats, hessian: NDArray[np.floating], scales: Floats, size: int, scale_dtype: str) -> Floats:
    """Return scales of rows, or of groups of ``size`` columns of a row; two levels lie half a scale from zero.

    Args:
        delta: D, float32, shape (rows, columns).
        hessian: H, shape (columns, columns).
        scales: scales before distillation, float32, shape (rows, groups); kept where no positive scale is better.
        size: columns of a group.
        scale_dtype: ``BF16`` or ``F32``, to which the result is rounded.

    Raises:
        UsageError: H is of another shape.
        NonFiniteError: H is not finite.
    """
    check_hessian(hessian, delta.shape[1])
    levels = signs(delta) / np.float32(2)
    places = [slice(start, start + size) for start in range(0, delta.shape[1], size)]
    return refit_scales(delta, hessian, [(levels[:, at], at) for at in places], scales, scale_dtype)


def distilled_level(delta: Floats, hessian: NDArray[np.floating], level: float) -> float:
    """Return the level of a whole matrix, or ``level`` where no positive level is better; arguments as above."""
    check_hessian(hessian, delta.shape[1])
    sign = signs(delta)
    seen = sign.astype(np.float64) @ hessian.astype(np.float64)
    along, length = float(np.einsum("ij,ij->", seen, delta)), float(np.einsum("ij,ij->", seen, sign))
    return along / length if along > 0 and length > 0 else level


def distilled_columns(delta: Floats, hessian: NDArray[np.floating], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return levels of columns, pulled a little towards ``levels``, and never below zero; arguments as above."""
    check_hessian(hessian, delta.shape[1])
    sign, moments = signs(delta).astype(np.float64), hessian.astype(np.float64)
    matrix = (sign.T @ sign) * moments
    target = np.einsum("ij,ij->j", sign, delta @ moments)
    pull = DAMPING * np.diagonal(matrix).mean()
    if not pull > 0:
        return levels
    found = np.linalg.solve(matrix + pull * np.eye(len(levels)), target + pull * levels)
    return np.where(found > 0, found, levels)


def signs(delta: Floats) -> Floats:
    """Return +1 or -1 for every element; +1 for 0."""
    return np.where(delta >= 0, np.float32(1), np.float32(-1))
