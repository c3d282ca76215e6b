"""Residual: a low-rank head, and dropout of the rest; a sum of two terms.

The first singular vectors, at 8 bits, carry the part of a delta that random dropout hurts most. Group-wise dropout of
the rest (:class:`deltafmt.methods.deltadq.DeltaDQ`) then loses far less than dropout of the whole. The rest is taken
from the head *as it is stored*, so that the second term makes up for the rounding of the first.

The method is of this project. As with :mod:`deltafmt.methods.svd`, the bytes of a file depend on the linear algebra
library.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.bands import GROUP, Band, quantize_bands
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import BITS, DROPPED, NM, RANK, SCALE_GROUP
from deltafmt.methods.declare import Needs, option, values_of
from deltafmt.methods.decoded import decoded
from deltafmt.methods.deltadq import DeltaDQ, DropoutOptions
from deltafmt.methods.expected import Expected, Sampled, dropped
from deltafmt.methods.factorization import factorize
from deltafmt.methods.grids import Floats, Grid
from deltafmt.methods.measured import Heads
from deltafmt.methods.quantize import default_grid, default_rule
from deltafmt.methods.sampling import gather
from deltafmt.methods.vectors import band_arrays, coding_of, vectors_layout
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout

HEAD_GRID = Grid(8, "midtread", "minmax", GROUP)


@dataclass(frozen=True)
class HeadOptions:
    """The first singular vectors, and their codes.

    Attributes:
        rank: vectors of the head; a matrix has at most as many as it has rows and columns.
        head_bits: width of their codes: 1 to 8.
        head_scale_group: consecutive codes of a vector that share a scale; 0 for one scale a vector.
    """

    rank: int = option(8, RANK, help="singular vectors of the head")
    head_bits: int = option(8, BITS, help="width of a code of the head's vectors in bits")
    head_scale_group: int = option(
        GROUP, SCALE_GROUP, help="consecutive codes of a vector of the head that share a scale; 0 for all"
    )


@dataclass(frozen=True)
class Residual(DropoutOptions, HeadOptions, Method):
    """The method: the options of :class:`HeadOptions`, then those of dropout, which go for the rest.

    ``scale_dtype`` goes for both terms.

    Raises:
        UsageError: an option is out of range.
    """

    n: int = option(1, NM, help="keep N of every M columns of the rest")
    m: int = 8
    bits: int = option(1, BITS, help="width of a code of the rest in bits", values="1 to 6, or 8")

    name = "residual"
    at_random = True
    summary = "the first singular vectors, and deltadq of what they leave"
    details = (
        "The first singular vectors carry what random dropout hurts most; dropout of the rest then loses far less. The "
        "rest is taken from the vectors as they are stored, so that it makes up for their rounding."
    )
    paper = "of this project"
    stores = "a lowrank term and an nm term"
    example = "residual:rank=4,nm=1:16,bits=2"
    whole = True
    calibration = "optional"
    needs: ClassVar[Needs] = {"rescale": (DROPPED,)}

    def check(self) -> None:
        """Check that the options make layouts."""
        _ = self.dropout, coding_of(self.head_grid)

    @property
    def head_grid(self) -> Grid:
        """The grid of the head's codes and the rule of its scales."""
        return _head_grid(self.head_bits, self.head_scale_group, self.scale_dtype)

    @functools.cached_property
    def dropout(self) -> DeltaDQ:
        """The method of the second term."""
        return DeltaDQ(**values_of(DropoutOptions, self))

    @property
    def head_rank(self) -> int:
        """The number of vectors of the head."""
        return self.rank

    def layouts(self, rows: int, columns: int) -> tuple[LowRankLayout, NMLayout]:
        """Return the layouts of head and residual."""
        return vectors_layout(self.rank, coding_of(self.head_grid), rows, columns), self.dropout.layout

    def describe(self) -> str:
        """Return the method and its options in one line."""
        head = f"rank={self.rank} {coding_of(self.head_grid).describe()} {self.head_grid.rule}"
        return f"residual {head} + {self.dropout.describe()}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowRankArrays, NMArrays]:
        """Split off the head of a matrix, then drop, rescale and quantize with the tensor's seed, 32 bits."""
        band, rest = split_head(rows.dense(), self.rank, grid=self.head_grid, hessian=rows.hessian)
        return band_arrays(band), self._dropped(rest, rows, seed)

    def _dropped(self, rest: Floats, rows: DeltaRows, seed: int) -> NMArrays:
        """Return the arrays of the second term, given what the head leaves."""
        dropout = self.dropout
        positions = dropout.draw(rows, seed)
        kept = gather(rest, positions, self.m, self.share, dropout.factor)
        return dropout.quantize(positions, kept)

    def expected(self, sample: Sampled) -> Expected:
        """Return what is expected of the head, whose vectors are known, and of dropout of the rest R = D - H.

        <Q, D'> = <H, D'> + <Q_R, R> + <Q_R, H - C>, and |Q - C|^2 = |H - C|^2 + 2 <Q_R, H - C> + |Q_R|^2.
        """
        grid, dropout = self.head_grid, self.dropout
        along, squares, common = sample.head(grid).products(self.rank)
        remainder = sample.remainder(grid, self.rank)
        kept = remainder.rounded(self.n, self.m, dropout.code_grid)
        factor = float(dropout.factor)
        rest = max(sample.squares - 2 * along + squares, 0.0)
        share, noisy, more = dropped(self.n, self.m, factor, kept, rest)
        mine = along - common  # <H, D'>
        beside = squares - 2 * common + sample.common  # |H - C|^2
        between = along - squares - sample.common + common  # <H - C, R>
        varied = sample.variance(remainder, self.n, self.m, self.share, factor * kept.along)
        both = beside + 2 * (share * between + more) + noisy
        return Expected(mine + share * (sample.rest - mine) + more, both, varied, (1 - self.n / self.m) * noisy)

    def with_gain(self, gain: float) -> Residual | None:
        """Return the method with a gain; None if it has one."""
        return _with_gain(self, gain) if self.gain is None else None

    def approximate(self, rows: DeltaRows, seed: int, heads: Heads) -> Floats:
        """Return the delta that a reader would decode, with a head that methods share."""
        head = heads.dense(self.rank, self.head_grid)
        arrays = self._dropped(heads.delta - head, rows, seed)
        return head + decoded(self.dropout.layout, arrays, rows.shape, seed)


@functools.lru_cache(4096)
def _with_gain(method: Residual, gain: float) -> Residual:
    return replace(method, gain=gain)


@functools.cache
def _head_grid(bits: int, group: int, scale_dtype: str) -> Grid:
    return Grid(bits, default_grid(bits), default_rule(bits), group, scale_dtype)


def split_head(
    delta: Floats, rank: int, *, grid: Grid = HEAD_GRID, hessian: NDArray[np.floating] | None = None
) -> tuple[Band, Floats]:
    """Return the quantized head of a delta and the residual.

    Args:
        delta: float32, shape (rows, columns).
        rank: vectors of the head, or min(rows, columns) where that is less.
        grid: grid of both factors.
        hessian: second moments of the inputs; the head then leaves the least error of the outputs. None takes plain
            singular vectors.

    Returns:
        The band, and ``delta - band.dense()`` in float32.

    Raises:
        NonFiniteError: the delta is not finite.
    """
    factors = factorize(delta, rank, hessian=hessian)
    (band,) = quantize_bands(factors, [(factors.values.size, grid.bits)], grid)
    return band, delta - band.dense()
