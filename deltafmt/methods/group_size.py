"""The group size of balanced dropout: its expected error, and the search of the best size (DeltaDQ v2).

arXiv 2410.08666 searches the group size that leaves the least error of attention. The error of a layer's outputs that
random dropout gives can be written down, so the search needs no draws: with N of M entries kept in each group, chosen
uniformly and multiplied by M / N, the outputs W x have the variance of a sum sampled without replacement,

    E |W x - Q x|^2 = sum over rows and groups of (M / N - 1) * M / (M - 1) * sum_i (y_i - mean y)^2,   y_i = w_i x_i,

which summed over the inputs needs only H = sum of x x^T: the last sum is sum_i w_i^2 H_ii - w^T H w / M over a group.
At a fixed density a larger group has more ways to choose (fewer constraints), a smaller one balances better what its
neighbours have in common; which wins is up to H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.hessian import check_hessian

Floats = NDArray[np.float32]


def expected_error(delta: Floats, hessian: NDArray[np.floating] | None, n: int, m: int) -> float:
    """Return the expected squared error of the outputs when N of every M columns are kept at random and rescaled.

    Args:
        delta: W, float32, shape (rows, columns).
        hessian: H, shape (columns, columns); None for inputs of identity second moments.
        n, m: N and M; a short last group counts as if zeros followed.

    Raises:
        UsageError: N is not within 1 to M, or H does not fit.
    """
    if not 1 <= n <= m:
        raise UsageError(f"N = {n} is outside 1 to M = {m}")
    if hessian is not None:
        check_hessian(hessian, delta.shape[1])
    if n == m:
        return 0.0
    wide = delta.astype(np.float64)
    energy = 0.0
    for start in range(0, wide.shape[1], m):
        part = wide[:, start : start + m]
        if hessian is None:
            energy += float((part**2).sum()) * (1 - 1 / m)
            continue
        inner = hessian[start : start + m, start : start + m].astype(np.float64)
        own = float((part**2 @ np.diagonal(inner)).sum())
        energy += own - float(np.einsum("ij,ij->", part @ inner, part)) / m
    return energy * (m / n - 1) * m / (m - 1)


def search_group(loss: Callable[[int, int], float], density: float, groups: Sequence[int]) -> tuple[int, int]:
    """Return the N and M of least loss at a density.

    Args:
        loss: gives the loss for N and M, such as :func:`expected_error` of a layer.
        density: N / M.
        groups: sizes M to try, each of which times the density must be a whole number.

    Raises:
        UsageError: no size is given, or one does not fit the density.
    """
    if not groups:
        raise UsageError("no group size to try")
    candidates = []
    for m in groups:
        n = round(m * density)
        if n < 1 or abs(n - m * density) > 1e-9 * m:
            raise UsageError(f"a group of {m} columns cannot keep a share of {density}")
        candidates.append((n, m))
    return min(candidates, key=lambda pair: loss(*pair))
