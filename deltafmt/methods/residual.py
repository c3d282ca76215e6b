"""A low-rank head and what it leaves: the two terms of a sum.

The first singular vectors at 8 bits carry what random dropout hurts most; group-wise dropout of the rest
(:class:`deltafmt.methods.deltadq.DeltaDQ`) then loses far less than dropout of the whole. The residual is taken from
the head *as it is stored*, so that the second term makes up for the first one's rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.bands import GROUP, Band, quantize_bands
from deltafmt.methods.factorization import factorize
from deltafmt.methods.grids import Floats, Grid

HEAD_GRID = Grid(8, "midtread", "minmax", GROUP)


def split_head(
    delta: Floats, rank: int, *, grid: Grid = HEAD_GRID, hessian: NDArray[np.floating] | None = None
) -> tuple[Band, Floats]:
    """Return the quantized head of a delta and the residual.

    Args:
        delta: float32, shape (rows, columns).
        rank: vectors of the head, at most min(rows, columns).
        grid: of both factors.
        hessian: of the inputs: takes the head that leaves the least error of the outputs. None for plain vectors.

    Returns:
        The band, and ``delta - band.dense()`` in float32.

    Raises:
        NonFiniteError: the delta is not finite.
    """
    factors = factorize(delta, rank, hessian=hessian)
    (band,) = quantize_bands(factors, [(factors.values.size, grid.bits)], grid)
    return band, delta - band.dense()
