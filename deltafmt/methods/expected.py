"""What a method is expected to keep of a delta, from norms of some rows and the rounding errors of fewer.

Dropout keeps N of every M columns at random and multiplies them by c. Of what is kept, rounding returns Q = q(c D).
``docs/expected-errors.md`` derives the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.bands import quantize_bands
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.factorization import LowRank
from deltafmt.methods.grids import Floats, Grid, Quantized
from deltafmt.methods.quantize import quantize
from deltafmt.terms.floats import widen

# Elements of the rows whose norms and products are taken, and of those whose rounding is measured.
SAMPLED_ELEMENTS = 1 << 19
ROUNDED_ELEMENTS = 1 << 16
# Kept entries that tell what rounding makes of all.
ROUNDED_ENTRIES = 1 << 14
# Consecutive rows among them: rows that share positions stay so.
RUN = 16
# Rows whose inner products tell how many directions a delta uses.
COMPARED_ROWS = 128
# Strongest directions are the delta itself, and are not left out, where less than this share of its energy remains.
LEAST_REST = 0.02
# Evenly spaced rows with less than this part of the energy that they would have in an even delta tell nothing of it.
# Those of most energy are then taken, as many as have the second part of what can be taken.
LEAST_ENERGY, MOST_ENERGY = 0.5, 0.99


@dataclass(frozen=True, slots=True)
class Expected:
    """What an approximation Q is expected to be, beside the delta D' that counts.

    Attributes:
        along: <Q, D'>.
        squares: |Q - C|^2, for the directions C that are left out of D and Q.
        spread: the variance of <Q, D'>.
        drawn: |Q - E Q|^2, what the draw alone adds; the rest of the error is the same for every draw.

    Each is a number, or an array of the numbers of many approximations.
    """

    along: float | NDArray[np.float64]
    squares: float | NDArray[np.float64]
    spread: float | NDArray[np.float64] = 0.0
    drawn: float | NDArray[np.float64] = 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What rounding makes of kept entries d, in shares of their sum of squares. A factor of them does not matter to it.

    Attributes:
        along: sum of q d over the sum of d^2; 1 without rounding.
        squares: sum of q^2 over the sum of d^2.
        beside: sum of (q - along d) b over the sum of d^2, for the entries b of another matrix: large entries of it may
            stand where rounding clips.
    """

    along: float
    squares: float
    beside: float = 0.0


def kept_of(kept: Floats, rounded: Floats, beside: Floats | None = None) -> Kept:
    """Return what rounding makes of kept entries.

    Args:
        kept, rounded: d and q, of one shape.
        beside: the entries of another matrix at the same places.
    """
    squares = dot(kept, kept)
    if not squares:
        return Kept(1.0, 1.0)
    along = dot(rounded, kept) / squares
    other = 0.0 if beside is None else (dot(rounded, beside) - along * dot(kept, beside)) / squares
    return Kept(along, dot(rounded, rounded) / squares, other)


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


class Remainder:
    """What is dropped of the rows whose rounding is measured: the delta itself, or what a head leaves of it.

    Args:
        delta: these rows.
        beside: the entries of the other matrix at the same places, or None.
        order: for each row, a random order of its columns, as places in the flat matrix.
    """

    def __init__(self, delta: Floats, beside: Floats | None, order: NDArray[np.intp]) -> None:
        self._delta = delta
        self._drawn = np.take(delta, order)
        self._beside = None if beside is None else np.take(beside, order)
        self._found: dict[tuple[int, Grid], Kept] = {}
        self._squares: dict[int, NDArray[np.float64]] = {}
        self._spreads: dict[tuple[int, int], float] = {}

    def rounded(self, n: int, m: int, grid: Grid) -> Kept:
        """Return what rounding makes of the entries that dropout keeps.

        Which columns are kept does not matter to it, only how many: N/M of a row, the first in a random order.
        """
        count = max(round(self._drawn.shape[1] * n / m), 1)
        if (count, grid) not in self._found:
            step = max(len(self._drawn) * count // ROUNDED_ENTRIES, 1)
            kept = np.ascontiguousarray(self._drawn[::step, :count])
            beside = None if self._beside is None else np.ascontiguousarray(self._beside[::step, :count])
            codes, scales = quantize(kept, grid.bits, grid.kind, grid.rule, grid.group, grid.scale_dtype)
            self._found[count, grid] = kept_of(kept, Quantized(grid, codes, scales).dense(), beside)
        return self._found[count, grid]

    def spread(self, n: int, m: int, share: int) -> float:
        """Return the variance of <Q, D> under dropout that keeps entries as they are: see :func:`spread`."""
        if (m, share) not in self._spreads:
            if share not in self._squares:
                self._squares[share] = shared_squares(self._delta, share)
            self._spreads[m, share] = within_groups(self._squares[share], m)
        return _drawn_variance(n, m) * self._spreads[m, share]


class Sampled:
    """A delta as far as it is looked at to foretell losses.

    Args:
        rows: the rows that are looked at, as a matrix.
        share: the share of the delta that these are, see :func:`with_energy`.
        vectors: the first right singular vectors of the whole delta, shape (vectors, columns), as many as are needed.
        ranks: the highest rank of the heads on each grid that will be asked for.
        common: the number of strongest singular directions that are left out.
        row_squares: the energy of each row of the whole delta, and not only of those that are looked at.

    Attributes:
        row_squares: as given.
        uneven: True if rows lie between those that are looked at, or rounded, that have far less energy.
        delta: the rows, dense.
        some: some of the rows, whose rounding is measured.
        some_delta: these, dense.
        squares: |D|^2 of the rows.
        strength: |D|^2 / |W|^2 of the rows, for the base's W.
        flatness: share of all directions that D' uses, see :func:`flatness_of`.
        common: |C|^2, for the directions C that are left out; 0 for none.
        some_common: C of the rows whose rounding is measured; None for none.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """

    def __init__(
        self,
        rows: DeltaRows,
        share: float,
        vectors: Floats,
        ranks: Mapping[Grid, int],
        common: int,
        row_squares: NDArray[np.float64],
    ) -> None:
        self.row_squares = row_squares
        self.delta = rows.dense()
        self.squares = dot(self.delta, self.delta)
        self.strength = strength_of(self.squares, widen(rows.base, rows.base_dtype))
        energies = squares_of_rows(self.delta)
        self._numbers, part = with_energy(some_rows(*rows.shape, ROUNDED_ELEMENTS), energies, RUN)
        looked_at, rounded = len(self.delta), len(self._numbers)
        self.uneven = share != looked_at / len(row_squares) or part != rounded / looked_at
        self.some = replace(rows, finetuned=rows.finetuned[self._numbers], base=rows.base[self._numbers])
        self.some_delta = self.delta[self._numbers]
        # Of a variance: from the measured rows to all rows, beside the square of an energy that goes the other way.
        self._times = share / part
        self._ranks = dict(ranks)
        self._factors = along_vectors(self.delta, vectors)
        self._heads: dict[Grid, Head] = {}
        self._remainders: dict[tuple[Grid, int] | None, Remainder] = {}
        self._order = column_orders(*self.some_delta.shape)
        self._left_out: LowRank | None = None
        spaced = np.arange(0, len(self.delta), -(-len(self.delta) // COMPARED_ROWS))
        compared, part = with_energy(spaced, energies, 1)
        few = self.delta[compared]
        self.common = 0.0
        self.some_common: Floats | None = None
        if common and self.squares:
            shared = self._factors.head(common)
            energy = float(np.square(shared.values, dtype=np.float64).sum())
            if self.squares - energy >= LEAST_REST * self.squares:
                self._left_out, self.common = shared, energy
                self.some_common = LowRank(shared.left[self._numbers], shared.values, shared.right).dense()
                few = few - LowRank(shared.left[compared], shared.values, shared.right).dense()
        self.flatness = flatness_of(few, round(len(compared) / (part * share)))

    @property
    def rest(self) -> float:
        """|D'|^2, for D' = D - C."""
        return self.squares - self.common

    def head(self, grid: Grid) -> Head:
        """Return the head on a grid, of the highest rank that is asked for."""
        if grid not in self._heads:
            self._heads[grid] = Head(self.delta, self._factors.head(self._ranks[grid]), grid, self._left_out)
        return self._heads[grid]

    def whole(self) -> Remainder:
        """Return what is dropped without a head."""
        if None not in self._remainders:
            self._remainders[None] = Remainder(self.some_delta, self.some_common, self._order)
        return self._remainders[None]

    def remainder(self, grid: Grid, rank: int) -> Remainder:
        """Return what is dropped behind a head."""
        if (grid, rank) not in self._remainders:
            head = self.head(grid)
            dense = head.left[self._numbers, :rank] @ head.right[:rank]
            beside = dense if self.some_common is None else dense - self.some_common
            self._remainders[grid, rank] = Remainder(self.some_delta - dense, beside, self._order)
        return self._remainders[grid, rank]

    def variance(self, remainder: Remainder, n: int, m: int, share: int, factor: float) -> float:
        """Return the variance of <Q, D> beside :attr:`squares`: both as if the whole delta had the rows' energy."""
        return factor**2 * remainder.spread(n, m, share) * self._times


def some_rows(rows: int, columns: int, elements: int) -> NDArray[np.intp]:
    """Return the numbers of evenly spaced runs of rows with about so many elements: all rows of a small matrix."""
    runs = -(-rows // RUN)
    wanted = max(elements // (columns * RUN), 1)
    if wanted >= runs:
        return np.arange(rows)
    starts = (2 * np.arange(wanted) + 1) * runs // (2 * wanted) * RUN
    numbers = (starts[:, None] + np.arange(RUN)).reshape(-1)
    return numbers[numbers < rows]


def with_energy(numbers: NDArray[np.intp], squares: NDArray[np.float64], run: int) -> tuple[NDArray[np.intp], float]:
    """Return evenly spaced rows, or those of most energy where these have little of it, and the share that they are.

    Of an embedding, a few rows may be trained: rows without a change tell nothing of what a method makes of the others.

    Args:
        numbers: of evenly spaced rows.
        squares: the energy of each row of the delta.
        run: consecutive rows that are taken together.

    Returns:
        The numbers of rows, and the share of the delta that they are: of its rows if these are evenly spaced, or else
        of its energy.
    """
    rows, total = len(squares), float(squares.sum())
    share = len(numbers) / rows
    if not LEAST_ENERGY * share * total > float(squares[numbers].sum()) or not np.isfinite(total):
        return numbers, share
    starts = np.arange(0, rows, run)
    energies = np.add.reduceat(squares, starts)
    most = np.argsort(-energies, kind="stable")[: max(len(numbers) // run, 1)]
    reached = np.cumsum(energies[most])
    most = most[: int(np.searchsorted(reached, MOST_ENERGY * reached[-1])) + 1]
    numbers = (np.sort(starts[most])[:, None] + np.arange(run)).reshape(-1)
    numbers = numbers[numbers < rows]
    return numbers, float(squares[numbers].sum()) / total


def squares_of_rows(delta: Floats) -> NDArray[np.float64]:
    """Return the energy of each row."""
    found: NDArray[np.float64] = np.einsum("ij,ij->i", delta, delta).astype(np.float64)
    return found


@functools.lru_cache(8)
def column_orders(rows: int, columns: int) -> NDArray[np.intp]:
    """Return an order of the columns for each row, as places in the flat matrix: one at random, begun at random."""
    rng = np.random.default_rng((rows, columns))
    order, first = rng.permutation(columns), rng.integers(columns, size=rows)
    places: NDArray[np.intp] = (
        order[(first[:, None] + np.arange(columns)) % columns] + np.arange(rows)[:, None] * columns
    )
    return places


def along_vectors(delta: Floats, vectors: Floats) -> LowRank:
    """Return the projection of rows on orthonormal right vectors, shape (vectors, columns), as factors."""
    along: Floats = delta @ vectors.T
    values: Floats = np.linalg.norm(along, axis=0).astype(np.float32)
    left = (along / np.where(values > 0, values, np.float32(1))).astype(np.float32)
    return LowRank(left, values, vectors)


def dropped(n: int, m: int, factor: float, kept: Kept, squares: float) -> tuple[float, float, float]:
    """Return what is expected of dropout of a delta D: a, |Q|^2, and <Q, B> - a <D, B> for the matrix B beside it.

    Every entry is kept with probability N / M, whatever its group holds: E <Q, D> = c (N / M) g |D|^2 and
    E |Q|^2 = c^2 (N / M) h |D|^2, so a = c (N / M) g.

    Args:
        n, m: N and M.
        factor: c.
        kept: g, h, and what lies beside.
        squares: |D|^2.
    """
    chance = factor * n / m
    return chance * kept.along, factor * chance * kept.squares * squares, chance * kept.beside * squares


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
    return factor**2 * _drawn_variance(n, m) * within_groups(shared_squares(delta, share), m)


def shared_squares(delta: Floats, share: int) -> NDArray[np.float64]:
    """Return the sums of squares of each column over the rows that share positions, shape (mask rows, columns)."""
    squares = np.square(delta, dtype=np.float64)
    return squares if share == 1 else np.add.reduceat(squares, np.arange(0, len(delta), share))


def within_groups(x: NDArray[np.float64], m: int) -> float:
    """Return the sum over groups of M columns, the last padded with zeros, of sum x_j^2 - (sum x_j)^2 / M."""
    sums = np.add.reduceat(x, np.arange(0, x.shape[1], m), axis=1)
    return max(float(np.vdot(x, x) - np.vdot(sums, sums) / m), 0.0)


def _drawn_variance(n: int, m: int) -> float:
    return n * (m - n) / (m * (m - 1)) if n < m else 0.0


def strength_of(squares: float, base: Floats) -> float:
    """Return the strength of a delta of so many squares: |D|^2 / |W|^2, or 1 if that is less."""
    return min(squares / max(dot(base, base), squares, float(np.finfo(np.float32).tiny)), 1.0)


def flatness_of(some: Floats, rows: int) -> float:
    """Return the share of all directions that a matrix D uses: |D|^4 / |D^T D|^2 over the number of its dimensions.

    It is 1 if all singular values are equal, and 1 / min(rows, columns) if there is one. |D^T D|^2 is the sum of the
    squared inner products of all pairs of rows; some rows tell their mean.

    Args:
        some: rows of D, shape (n, columns).
        rows: how many D has.
    """
    products = np.square(some @ some.T, dtype=np.float64)
    count, own = len(some), float(np.trace(products))
    squares = float(np.square(some, dtype=np.float64).sum()) * rows / count
    pairs = (float(products.sum()) - own) * rows * (rows - 1) / max(count * (count - 1), 1)
    fourth = own * rows / count + pairs
    return min(squares**2 / fourth / min(rows, some.shape[1]), 1.0) if fourth else 1.0


def dot(a: Floats, b: Floats) -> float:
    """Return the inner product of two matrices."""
    return float(np.vdot(a, b))
