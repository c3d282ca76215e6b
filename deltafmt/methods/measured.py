"""Helpers of methods that are being measured: decoding their arrays, and heads of singular vectors that they share.

A target tries some forty methods on a matrix. Those that begin with singular vectors would each factorize it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.bands import quantize_bands
from deltafmt.methods.factorization import LowRank, factorize
from deltafmt.methods.grids import Floats, Grid
from deltafmt.methods.method_routines import Routines
from deltafmt.terms.buffers import blank
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.layout import TermLayout


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


def decoded(layout: TermLayout, arrays: TermArrays, shape: tuple[int, int], seed: int, routines: Routines) -> Floats:
    """Return what a reader makes of the arrays of a term.

    Args:
        layout: the term's layout, as :meth:`deltafmt.methods.base.Method.layouts` gives it.
        arrays: the term's arrays.
        shape: rows and columns of the matrix.
        seed: the tensor's seed, 32 bits.
        routines: the implementation of the hot loops.
    """
    rows, columns = shape
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, seed if layout.seeded else 0, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0, routines.codec)
    return codec.decode(packed, 0, rows, routines.codec)
