"""Pruning by magnitude: the largest N of every M columns, or the largest elements of a tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError

Floats = NDArray[np.float32]


def largest(scores: Floats, n: int, m: int, share: int = 1) -> NDArray[np.uint8]:
    """Choose the N columns of the highest scores in every M; the first columns win among equal scores.

    Args:
        scores: not negative, shape (rows, columns).
        n, m: N and M.
        share: v, consecutive rows that keep the same positions: those of the highest sums over the rows.

    Returns:
        uint8, shape (mask rows, groups, N), ascending. Where the last group is short, positions beyond the last
        column are taken only when there are fewer columns than N.
    """
    rows, columns = scores.shape
    groups = -(-columns // m)
    masks = -(-rows // share)
    padded = np.zeros((masks * share, columns), np.float32)
    padded[:rows] = scores
    summed = np.full((masks, groups * m), -1, np.float32)
    summed[:, :columns] = padded.reshape(masks, share, columns).sum(axis=1)
    best = np.argsort(-summed.reshape(masks, groups, m), axis=2, kind="stable")[:, :, :n]
    return np.sort(best, axis=2).astype(np.uint8)


def keep_largest(delta: Floats, n: int, m: int, share: int = 1) -> NDArray[np.uint8]:
    """Return the positions of the N entries of largest magnitude in every M columns, as :func:`largest` does.

    Rows that share positions keep those of the largest sums of squares.
    """
    return largest(delta * delta if share > 1 else np.abs(delta), n, m, share)


def threshold(delta: Floats, density: float) -> NDArray[np.int64]:
    """Return the flat positions of a share of a tensor's entries: those of the largest magnitudes.

    Exactly ``round(density * size)`` of them, ascending; of equal magnitudes, the first. (The usual rule, "at least the
    k-th largest value", keeps every tie.)

    Raises:
        UsageError: the density is not within 0 to 1.
    """
    if not 0 <= density <= 1:
        raise UsageError(f"density {density} is outside 0 to 1")
    magnitude = np.abs(delta).reshape(-1)
    count = round(density * magnitude.size)
    if count == 0:
        return np.empty(0, np.int64)
    least = np.partition(magnitude, magnitude.size - count)[magnitude.size - count]
    above = np.flatnonzero(magnitude > least)
    ties = np.flatnonzero(magnitude == least)[: count - above.size]
    return np.sort(np.concatenate([above, ties])).astype(np.int64)
