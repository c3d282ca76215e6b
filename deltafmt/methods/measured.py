"""Heads of singular vectors that methods share while they are being measured.

A target tries some forty methods on a matrix. Those that begin with singular vectors would each factorize it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.bands import quantize_bands
from deltafmt.methods.factorization import LowRank, factorize
from deltafmt.methods.grids import Floats, Grid


class Heads:
    """Quantized heads of one delta, computed when first asked for.

    Args:
        delta: float32, shape (rows, columns).
        most: the highest rank that will be asked for.
        hessian: second moments of the inputs, shape (columns, columns), for heads of least error of the outputs.
    """

    def __init__(self, delta: Floats, most: int, hessian: NDArray[np.floating] | None = None) -> None:
        self.delta = delta
        self._most = most
        self._hessian = hessian
        self._factors: LowRank | None = None
        self._heads: dict[tuple[int, Grid], Floats] = {}

    def dense(self, rank: int, grid: Grid) -> Floats:
        """Return the head of a rank on a grid, decoded, of the delta's shape."""
        if (rank, grid) not in self._heads:
            if self._factors is None:
                self._factors = factorize(self.delta, self._most, hessian=self._hessian)
            factors = self._factors.head(rank)
            (band,) = quantize_bands(factors, [(factors.values.size, grid.bits)], grid)
            self._heads[rank, grid] = band.dense()
        return self._heads[rank, grid]
