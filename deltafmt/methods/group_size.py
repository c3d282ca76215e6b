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


def expected_error(delta: Floats, hessian: NDArray[np.floating] | None, keep: int, group: int) -> float:
    """Return the expected squared error of the outputs when N of every M columns are kept at random and rescaled.

    Args:
        delta: W, float32, shape (rows, columns).
        hessian: H, shape (columns, columns); None for inputs of identity second moments.
        keep, group: N and M; a short last group counts as if zeros followed.

    Raises:
        UsageError: N is not within 1 to M, or H does not fit.
    """
    if not 1 <= keep <= group:
        raise UsageError(f"N = {keep} is outside 1 to M = {group}")
    if hessian is not None:
        check_hessian(hessian, delta.shape[1])
    if keep == group:
        return 0.0
    wide = delta.astype(np.float64)
    energy = 0.0
    for start in range(0, wide.shape[1], group):
        part = wide[:, start : start + group]
        if hessian is None:
            energy += float((part**2).sum()) * (1 - 1 / group)
            continue
        inner = hessian[start : start + group, start : start + group].astype(np.float64)
        own = float((part**2 @ np.diagonal(inner)).sum())
        energy += own - float(np.einsum("ij,ij->", part @ inner, part)) / group
    return energy * (group / keep - 1) * group / (group - 1)


def search_group(loss: Callable[[int, int], float], density: float, groups: Sequence[int]) -> tuple[int, int]:
    """Return the N and M of least loss at a density.

    Args:
        loss: of N and M: :func:`expected_error` of a layer, the error of attention, or any other.
        density: N / M.
        groups: sizes M to try, each of which times the density must be a whole number.

    Raises:
        UsageError: no size is given, or one does not fit the density.
    """
    if not groups:
        raise UsageError("no group size to try")
    candidates = []
    for group in groups:
        keep = round(group * density)
        if keep < 1 or abs(keep - group * density) > 1e-9 * group:
            raise UsageError(f"a group of {group} columns cannot keep a share of {density}")
        candidates.append((keep, group))
    return min(candidates, key=lambda pair: loss(*pair))
