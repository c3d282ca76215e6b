"""Singular vectors as ``lowrank`` terms: their layouts, their arrays and their bytes."""

from __future__ import annotations

import numpy as np

from deltafmt.errors import UsageError
from deltafmt.methods.bands import Band
from deltafmt.methods.factorization import LowRank
from deltafmt.methods.grids import Grid, Quantized
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import MAX_VECTORS, LowRankLayout


def coding_of(grid: Grid) -> Coding:
    """Return how vectors on a grid are coded.

    Raises:
        UsageError: the scale group is outside the specification.
    """
    return Coding(grid.bits, grid.kind, grid.scale_dtype, grid.group)


def vectors_layout(count: int, factors: Coding | str, rows: int, columns: int) -> LowRankLayout:
    """Return the layout of ``count`` vectors; at most as many as a matrix of this shape can have, and at least one."""
    return LowRankLayout(max(min(count, rows, columns, MAX_VECTORS), 1), factors)


def vector_bytes(factors: Coding | str, rows: int, columns: int) -> int:
    """Return the bytes that a vector of either side takes in a file, with scales, zero points and unused bits."""
    return sum(LowRankLayout(1, factors).buffer_lengths(rows, columns).values())


def band_arrays(band: Band) -> LowRankArrays:
    """Return the arrays of a band."""

    def side(factor: Quantized) -> LowbitArrays:
        return LowbitArrays(factor.codes, factor.scales, factor.zeros)

    return LowRankArrays(side(band.left), side(band.right))


def raw_arrays(factors: LowRank, dtype: str) -> LowRankArrays:
    """Return the arrays of vectors that are stored as they are, with the roots of the singular values on either side.

    Raises:
        UsageError: a value overflows the dtype.
    """
    left, right = factors.balanced()
    u, v = (narrow(np.ascontiguousarray(side), dtype) for side in (left.T, right))
    if not (np.isfinite(widen(u, dtype)).all() and np.isfinite(widen(v, dtype)).all()):
        raise UsageError(f"a singular vector is too large for {dtype}")
    return LowRankArrays(u, v)
