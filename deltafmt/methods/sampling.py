"""Drawing and reading the kept entries of a delta.

Compiled: ``kernels/cpu/loops/positions.c``, ``kernels/cpu/loops/nm.c``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.terms.floats import Raw, subtract
from deltafmt.terms.nm.hashing import BLOCK_STEP, ROW_STEP, mix

# Elements of a block of rows for which the reference of `draw` hashes at a time.
_DRAWN_ELEMENTS = 1 << 22


def _uniform(native: Native, seed: int, first: int, count: int, groups: int, n: int, m: int) -> NDArray[np.uint8]:
    out = np.empty((count, groups, n), np.uint8)
    native.uniform(out, seed, first, m)
    return out


@loop(_uniform)
def uniform(seed: int, first: int, count: int, groups: int, n: int, m: int) -> NDArray[np.uint8]:
    """Draw N of M positions for every group, each subset equally likely, ascending; for any M.

    Selection sampling (Knuth, TAOCP 2, algorithm 3.4.2 S): position p is taken with probability
    (still needed) / (still left). Each group has a counter-based random number for each of its positions.

    Returns:
        uint8, shape (count, groups, N), for mask rows ``first`` to ``first + count``.
    """
    rows = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    key = mix(np.uint32(seed) + rows * np.uint32(ROW_STEP))[:, None]
    start = np.arange(groups, dtype=np.uint64)[None, :] * m
    needed = np.full((count, groups), n, np.uint64)
    out = np.zeros((count, groups, n), np.uint8)
    for p in range(m):
        number = mix(key + (start + p).astype(np.uint32) * np.uint32(BLOCK_STEP)).astype(np.uint64)
        taken = number * np.uint64(m - p) >> np.uint64(32) < needed
        row, g = np.nonzero(taken)
        out[row, g, n - needed[row, g].astype(np.intp)] = p
        needed -= taken
    return out


def _draw(native: Native, seed: int, rows: int, columns: int, drop: float) -> NDArray[np.bool_]:
    out = np.empty((rows, columns), np.bool_)
    native.draw(out, seed, 0, round(drop * 2**32))
    return out


@loop(_draw)
def draw(seed: int, rows: int, columns: int, drop: float) -> NDArray[np.bool_]:
    """Tell which elements of a matrix are kept: those whose 32-bit hash of seed, row and column is at least p 2**32.

    Args:
        seed: the tensor's seed, 32 bits.
        rows, columns: the shape of the matrix.
        drop: p, the probability with which an element is dropped.
    """
    least = round(drop * 2**32)
    column = np.arange(columns, dtype=np.uint64).astype(np.uint32) * np.uint32(BLOCK_STEP)
    kept = np.empty((rows, columns), np.bool_)
    step = max(_DRAWN_ELEMENTS // columns, 1)
    for first in range(0, rows, step):
        row = np.arange(first, min(first + step, rows), dtype=np.uint64).astype(np.uint32)
        key = mix(np.uint32(seed) + row * np.uint32(ROW_STEP))
        kept[first : first + step] = mix(key[:, None] + column) >= least
    return kept


def gather(
    delta: NDArray[np.float32], positions: NDArray[np.uint8], m: int, share: int, factor: np.float32
) -> NDArray[np.float32]:
    """Return the kept entries of a run of rows, times ``factor``.

    Args:
        delta: shape (rows, columns).
        positions: shape (mask rows, groups, N).
        m: M.
        share: v; row r uses mask row ``r // share``.
        factor: the rescale M / N, or 1.

    Returns:
        float32, shape (rows, groups * N); NaN where a position lies beyond the last column.
    """
    rows, columns = delta.shape
    groups, n = positions.shape[1:]
    column = positions + (np.arange(groups) * m)[None, :, None]
    column = column.reshape(positions.shape[0], groups * n)[np.arange(rows) // share]
    kept = np.take_along_axis(delta, np.minimum(column, columns - 1), axis=1)
    with np.errstate(over="ignore"):
        return np.where(column < columns, kept * factor, np.float32(np.nan))


def _gather_difference(
    native: Native,
    finetuned: Raw,
    finetuned_dtype: str,
    base: Raw,
    base_dtype: str,
    positions: NDArray[np.uint8],
    m: int,
    share: int,
    factor: np.float32,
) -> tuple[NDArray[np.float32], bool]:
    out = np.empty((base.shape[0], positions.shape[1] * positions.shape[2]), np.float32)
    mine, theirs, at = (np.ascontiguousarray(array) for array in (finetuned, base, positions))
    return out, native.gather(mine, finetuned_dtype, theirs, base_dtype, at, m, share, factor, out)


@loop(_gather_difference)
def gather_difference(
    finetuned: Raw,
    finetuned_dtype: str,
    base: Raw,
    base_dtype: str,
    positions: NDArray[np.uint8],
    m: int,
    share: int,
    factor: np.float32,
) -> tuple[NDArray[np.float32], bool]:
    """Return the kept entries of ``finetuned - base``, and whether every element of it, dropped or kept, is finite."""
    delta, finite = subtract(finetuned, finetuned_dtype, base, base_dtype)
    with np.errstate(invalid="ignore"):
        return gather(delta, positions, m, share, factor), finite
