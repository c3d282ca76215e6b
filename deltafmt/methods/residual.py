"""A low-rank head and what it leaves: a sum of two terms.

The first singular vectors at 8 bits carry what random dropout hurts most; group-wise dropout of the rest
(:class:`deltafmt.methods.deltadq.DeltaDQ`) then loses far less than dropout of the whole. The residual is taken from
the head *as it is stored*, so that the second term makes up for the first one's rounding.

Of this project. As with :mod:`deltafmt.methods.svd`, the bytes of a file depend on the linear algebra library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.bands import GROUP, Band, quantize_bands
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.deltadq import DeltaDQ, read_nm
from deltafmt.methods.factorization import factorize
from deltafmt.methods.grids import Floats, Grid
from deltafmt.methods.options import option
from deltafmt.methods.quantize import default_grid, default_rule
from deltafmt.methods.sampling import gather
from deltafmt.methods.vectors import band_arrays, coding_of, vectors_layout
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout

HEAD_GRID = Grid(8, "midtread", "minmax", GROUP)


@dataclass(frozen=True, slots=True)
class Residual(Method):
    """Options of the method; those of the second term are DeltaDQ's.

    Attributes:
        rank: vectors of the head; a matrix has at most as many as it has rows and columns.
        head_bits: width of their codes: 1 to 8.
        head_scale_group: consecutive codes of a vector that share a scale; 0 for one scale a vector.
        n, m: N and M: entries of the residual kept in each group of M columns.
        bits: k, width of their codes.
        index, share, grid, scale, scale_group, rescale: as :class:`deltafmt.methods.deltadq.DeltaDQ` takes them.
        scale_dtype: of both terms: ``BF16`` or ``F32``.

    Raises:
        UsageError: an option is out of range.
    """

    rank: int = option(8, "vectors of the head (8)", "R")
    head_bits: int = option(8, "bits of the vectors' codes: 1-8 (8)", "K")
    head_scale_group: int = option(GROUP, "codes of a vector that share a scale; 0: all (128)", "G")
    n: int = option(1, "keep N of every M columns of the residual (1:8)", "N:M", key="nm", parse=read_nm)
    m: int = 8
    bits: int = option(1, "bits of a code of the residual: 1-6 or 8 (1)", "K")
    index: str = option("seeded", "seeded (no index bytes), fixed, or rank (cold files)", "KIND")
    share: int = option(4, "rows that share positions: 1, 2, 4, 8 (4)", "V")
    grid: str | None = option(None, "midtread or midrise (midrise for 1 and 2 bits)", "KIND")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_group: int = option(0, "kept entries that share a scale (a whole row)", "G")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")
    rescale: bool = option(True, "multiply what is kept by M/N (yes)")

    name = "residual"
    at_random = True
    summary = "the first singular vectors, and dropout of what they leave"
    whole = True
    calibration = "optional"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank {self.rank} is not positive")
        _ = self.dropout, coding_of(self.head_grid)

    @property
    def head_grid(self) -> Grid:
        """The grid of the head's codes and the rule of its scales."""
        kind, rule = default_grid(self.head_bits), default_rule(self.head_bits)
        return Grid(self.head_bits, kind, rule, self.head_scale_group, self.scale_dtype)

    @property
    def dropout(self) -> DeltaDQ:
        """The method of the second term."""
        return DeltaDQ(
            self.n,
            self.m,
            self.bits,
            self.index,
            self.share,
            self.grid,
            self.scale,
            self.scale_group,
            self.scale_dtype,
            self.rescale,
        )

    def layouts(self, rows: int, columns: int) -> tuple[LowRankLayout, NMLayout]:
        """Return the layouts of head and residual."""
        return vectors_layout(self.rank, coding_of(self.head_grid), rows, columns), self.dropout.layout

    def describe(self) -> str:
        """Return the method and its options in one line."""
        head = f"rank={self.rank} {coding_of(self.head_grid).describe()} {self.head_grid.rule}"
        return f"residual {head} + {self.dropout.describe()}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowRankArrays, NMArrays]:
        """Split off the head of a matrix, then drop, rescale and quantize with the tensor's seed, 32 bits."""
        dropout = self.dropout
        band, rest = split_head(rows.dense(), self.rank, grid=self.head_grid, hessian=rows.hessian)
        positions = dropout.draw(rows, seed)
        kept = gather(rest, positions, self.m, self.share, dropout.factor)
        return band_arrays(band), dropout.quantize(positions, kept, rows.routines)


def split_head(
    delta: Floats, rank: int, *, grid: Grid = HEAD_GRID, hessian: NDArray[np.floating] | None = None
) -> tuple[Band, Floats]:
    """Return the quantized head of a delta and the residual.

    Args:
        delta: float32, shape (rows, columns).
        rank: vectors of the head, or min(rows, columns) where that is less.
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
