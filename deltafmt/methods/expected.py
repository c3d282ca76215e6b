"""What a method is expected to keep of a delta, from norms of the whole and the rounding errors of some of its rows.

Dropout keeps N of every M columns at random and multiplies them by c. Of what is kept, rounding returns Q = q(c D).
``docs/expected-errors.md`` derives the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.bands import quantize_bands
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.factorization import LowRank, sketched
from deltafmt.methods.grids import Floats, Grid

# Elements of the rows whose rounding is measured, and consecutive rows among them: rows that share positions stay so.
ROUNDED_ELEMENTS = 1 << 16
RUN = 16
# Strongest directions are the delta itself, and are not left out, where less than this share of its energy remains.
LEAST_REST = 0.02


@dataclass(frozen=True, slots=True)
class Expected:
    """What an approximation Q is expected to be, beside the delta D' that counts.

    Attributes:
        along: <Q, D'>, over the whole matrix.
        squares: |Q - C|^2, for the directions C that are left out of D and Q.
        spread: the variance of <Q, D'>.
    """

    along: float
    squares: float
    spread: float = 0.0

    def loss(self, squares: float, weight: float) -> float:
        """Return the expected loss (1 - kept)^2 + w |noise|^2 / |D'|^2, with kept = <Q, D'> / |D'|^2.

        Args:
            squares: |D'|^2.
            weight: w.
        """
        kept, spread = self.along / squares, self.spread / squares**2
        noise = max(self.squares / squares - kept**2 - spread, 0.0)
        return (1 - kept) ** 2 + spread + weight * noise


@dataclass(frozen=True, slots=True)
class Kept:
    """What rounding makes of kept entries y = c d, in shares of their sum of squares.

    Attributes:
        along: sum of q y over the sum of y^2; 1 without rounding.
        squares: sum of q^2 over the sum of y^2.
        beside: sum of (q - along y) b over the sum of y^2, for the entries b of another matrix: large entries of it may
            stand where rounding clips.
    """

    along: float
    squares: float
    beside: float = 0.0


def kept_of(kept: Floats, rounded: Floats, beside: Floats | None = None) -> Kept:
    """Return what rounding makes of kept entries; NaN marks an entry beyond the last column.

    Args:
        kept, rounded: y and q, of one shape.
        beside: the entries of another matrix at the same places.
    """
    outside = np.isnan(kept)
    y, q = (np.where(outside, np.float32(0), each).reshape(-1) for each in (kept, rounded))
    squares = dot(y, y)
    if not squares:
        return Kept(1.0, 1.0)
    along = dot(q, y) / squares
    other = 0.0
    if beside is not None:
        b = np.where(outside, np.float32(0), beside).reshape(-1)
        other = (dot(q, b) - along * dot(y, b)) / squares
    return Kept(along, dot(q, q) / squares, other)


class Head:
    """The first vectors of a delta on a grid, A B, and their inner products with the delta for every rank.

    Attributes:
        left: A, shape (rows, rank).
        right: B, shape (rank, columns).
    """

    def __init__(self, delta: Floats, factors: LowRank, grid: Grid, common: LowRank | None) -> None:
        (band,) = quantize_bands(factors, [(factors.values.size, grid.bits)], grid)
        self.left = np.ascontiguousarray(band.left.dense().T)
        self.right = band.right.dense()
        # <A_r B_r, D> is a sum over the vectors; |A_r B_r|^2 a sum over their pairs.
        self._along = np.cumsum(np.einsum("ij,ij->j", self.left, delta @ self.right.T, dtype=np.float64))
        pairs = (self.left.T @ self.left).astype(np.float64) * (self.right @ self.right.T)
        self._squares = np.diagonal(pairs.cumsum(0).cumsum(1))
        self._common = np.zeros(len(self._along))
        if common is not None:
            products = (common.left.T @ self.left) * common.values[:, None] * (common.right @ self.right.T)
            self._common = np.cumsum(products.sum(axis=0, dtype=np.float64))

    def products(self, rank: int) -> tuple[float, float, float]:
        """Return <H, D>, |H|^2 and <H, C> of the head H of a rank; ranks above the matrix's are the matrix's."""
        last = min(rank, len(self._along)) - 1
        return float(self._along[last]), float(self._squares[last]), float(self._common[last])


class Sampled:
    """A delta as far as it is looked at to foretell losses.

    Args:
        rows: the rows that are looked at, as a matrix.
        most: the highest rank of a head that will be asked for.
        common: the number of strongest singular directions that are left out.

    Attributes:
        rows: as given.
        delta: these rows, dense.
        numbers: the numbers of some of the rows, evenly spaced, whose rounding is measured.
        some, some_delta: these rows, and dense.
        squares: |D|^2.
        common: |C|^2, for the directions C that are left out; 0 for none.
        some_common: C of the rows whose rounding is measured; None for none.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """

    def __init__(self, rows: DeltaRows, most: int, common: int) -> None:
        self.rows = rows
        self.delta = rows.dense()
        self.numbers = some_rows(*rows.shape)
        self.some = replace(rows, finetuned=rows.finetuned[self.numbers], base=rows.base[self.numbers])
        self.some_delta = self.some.dense()
        self.squares = dot(self.delta, self.delta)
        self._most = max(most, common)
        self._factors: LowRank | None = None
        self._heads: dict[Grid, Head] = {}
        self._left_out: LowRank | None = None
        self.common = 0.0
        self.some_common: Floats | None = None
        if common and self.squares:
            shared = self.factors.head(common)
            energy = float(np.square(shared.values, dtype=np.float64).sum())
            if self.squares - energy >= LEAST_REST * self.squares:
                self._left_out, self.common = shared, energy
                self.some_common = LowRank(shared.left[self.numbers], shared.values, shared.right).dense()

    @property
    def factors(self) -> LowRank:
        """The first singular vectors."""
        if self._factors is None:
            self._factors = sketched(self.delta, self._most)
        return self._factors

    @property
    def rest(self) -> float:
        """|D'|^2, for D' = D - C."""
        return self.squares - self.common

    @property
    def share(self) -> float:
        """The share of the rows whose rounding is measured."""
        return len(self.numbers) / max(len(self.delta), 1)

    def head(self, grid: Grid) -> Head:
        """Return the head on a grid."""
        if grid not in self._heads:
            self._heads[grid] = Head(self.delta, self.factors, grid, self._left_out)
        return self._heads[grid]


def some_rows(rows: int, columns: int) -> NDArray[np.intp]:
    """Return the numbers of evenly spaced runs of rows with about ROUNDED_ELEMENTS elements: all of a small matrix."""
    runs = -(-rows // RUN)
    wanted = max(ROUNDED_ELEMENTS // (columns * RUN), 1)
    if wanted >= runs:
        return np.arange(rows)
    starts = (2 * np.arange(wanted) + 1) * runs // (2 * wanted) * RUN
    numbers = (starts[:, None] + np.arange(RUN)).reshape(-1)
    return numbers[numbers < rows]


def dropped(n: int, m: int, factor: float, kept: Kept, squares: float) -> tuple[float, float, float]:
    """Return what is expected of dropout of a delta D: a, |Q|^2, and <Q, B> - a <D, B> for the matrix B beside it.

    Every entry is kept with probability N / M, whatever its group holds: E <Q, D> = c (N / M) g |D|^2 and
    E |Q|^2 = c^2 (N / M) h |D|^2, so a = c (N / M) g.

    Args:
        n, m: N and M.
        factor: c.
        kept: g and h.
        squares: |D|^2.
    """
    chance = n / m
    energy = factor**2 * chance * squares
    return factor * chance * kept.along, kept.squares * energy, kept.beside * energy


def spread(delta: Floats, n: int, m: int, share: int, factor: float) -> float:
    """Return the variance of <Q, D> under dropout without rounding.

    Of the M sums of squares x_j of a group (over the rows that share its positions), N are drawn without replacement.
    The variance of their sum is N (M - N) / (M (M - 1)) (sum x_j^2 - (sum x_j)^2 / M) (Cochran, "Sampling Techniques",
    3rd edition, theorem 2.2), and the draws of groups are independent.

    Args:
        delta: float32, shape (rows, columns).
        n, m: N and M.
        share: v, rows that share positions.
        factor: c.
    """
    if n == m:
        return 0.0
    rows, columns = delta.shape
    padded = np.zeros((-(-rows // share) * share, -(-columns // m) * m))
    padded[:rows, :columns] = np.square(delta, dtype=np.float64)
    x = padded.reshape(-1, share, padded.shape[1]).sum(axis=1).reshape(-1, m)
    total = float(np.square(x).sum() - np.square(x.sum(axis=1)).sum() / m)
    return factor**2 * n * (m - n) / (m * (m - 1)) * max(total, 0.0)


def dot(a: Floats, b: Floats) -> float:
    """Return the inner product of two matrices."""
    return float(np.vdot(a, b))
