"""The singular values of a delta: how fast they fall, and so how well low rank can hold it (Delta-CoMe, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.analysis.pairs import Block, Floats, TensorPair

EXACT = 1024  # all singular values are computed if the smaller side of the matrix is at most this
KNOWN = 128  # otherwise so many singular values are estimated
_OVERSAMPLING = 16
_POWER_STEPS = 2


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of a delta D.

    Attributes:
        values: the singular values, descending, in float64: all of them, or the first ones.
        squares: the sum of squares of all singular values, which equals the sum of squares of D's elements.
        exact: True if ``values`` are all of them, computed from the eigenvalues of D D^T or D^T D. Otherwise they are
            estimated from below by a randomized projection (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """

    values: NDArray[np.float64]
    squares: float
    exact: bool

    @property
    def energy(self) -> dict[int, float]:
        """The share of the sum of squares in the first 1, 2, 4, 8, ... singular values; empty for a delta of zeros.

        If all singular values are known, the last count is at least their number. Otherwise it is the last power of two
        up to the number of known values.
        """
        if not self.squares:
            return {}
        sums = np.minimum(np.cumsum(np.square(self.values)) / self.squares, 1.0)
        last = len(sums) - 1 if self.exact else len(sums)
        return {1 << i: float(sums[min(1 << i, len(sums)) - 1]) for i in range(last.bit_length() + self.exact)}

    @property
    def effective_rank(self) -> float | None:
        """The exponential of the entropy of the singular values over their sum (Roy and Vetterli 2007).

        None if not all singular values are known, or all are zero.
        """
        total = self.values.sum()
        if not self.exact or not total:
            return None
        shares = self.values[self.values > 0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def stable_rank(self) -> float | None:
        """The sum of squares of all singular values over the square of the largest; None for a delta of zeros."""
        return float(self.squares / self.values[0] ** 2) if self.squares else None

    def rank_of(self, share: float) -> int | None:
        """Return how many singular values hold a share of the sum of squares; None if the known ones do not."""
        if not self.squares:
            return 0
        sums = np.cumsum(np.square(self.values)) / self.squares
        count = int(np.searchsorted(sums, share - 1e-12)) + 1
        return count if count <= len(sums) else None

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        return {
            "exact": self.exact,
            "largest": float(self.values[0]) if len(self.values) else 0.0,
            "energy": {str(count): share for count, share in self.energy.items()},
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "rank_90": self.rank_of(0.9),
            "rank_99": self.rank_of(0.99),
        }


def spectrum_of(pair: TensorPair, squares: float, seed: int = 0) -> Spectrum:
    """Return the singular values of a matrix's delta.

    Args:
        pair: the matrix in both checkpoints.
        squares: the sum of squares of its delta.
        seed: the seed of the random projection.
    """
    if min(pair.rows, pair.columns) <= EXACT:
        return Spectrum(_exact(pair), squares, True)
    return Spectrum(_randomized(pair, seed), squares, False)


def _exact(pair: TensorPair) -> NDArray[np.float64]:
    if pair.columns <= pair.rows:
        gram = np.zeros((pair.columns, pair.columns))
        for block in pair.blocks():
            delta = block.delta.astype(np.float64)
            gram += delta.T @ delta
    else:
        # With few rows, each block of rows is multiplied with each other; only two blocks at a time are in float64.
        gram = np.zeros((pair.rows, pair.rows))
        for block in pair.blocks():
            left = block.delta.astype(np.float64)
            for other in pair.blocks():
                if other.first <= block.first:
                    product = left @ other.delta.T.astype(np.float64)
                    own, its = _span(block), _span(other)
                    gram[own, its] = product
                    gram[its, own] = product.T
    squares = np.linalg.eigvalsh(gram)[::-1]
    # A tiny eigenvalue is the rounding error of zero, not a singular value.
    noise = squares[0] * len(squares) * np.finfo(np.float64).eps
    return np.sqrt(np.where(squares > noise, squares, 0.0))


def _span(block: Block) -> slice:
    return slice(block.first, block.first + len(block.delta))


def _randomized(pair: TensorPair, seed: int) -> NDArray[np.float64]:
    start = np.random.default_rng(seed).standard_normal((pair.columns, KNOWN + _OVERSAMPLING), np.float32)
    basis = _orthonormal(_apply(pair, start))
    for _ in range(_POWER_STEPS):
        basis = _orthonormal(_apply(pair, _orthonormal(_apply_transposed(pair, basis))))
    values = np.linalg.svd(_apply_transposed(pair, basis), compute_uv=False)
    return values[:KNOWN].astype(np.float64)


def _orthonormal(matrix: Floats) -> Floats:
    q: Floats = np.linalg.qr(matrix)[0]
    return q


def _apply(pair: TensorPair, right: Floats) -> Floats:
    """Return D @ right."""
    return np.concatenate([block.delta @ right for block in pair.blocks()])


def _apply_transposed(pair: TensorPair, left: Floats) -> Floats:
    """Return D^T @ left."""
    total = np.zeros((pair.columns, left.shape[1]), np.float32)
    for block in pair.blocks():
        total += block.delta.T @ left[_span(block)]
    return total
