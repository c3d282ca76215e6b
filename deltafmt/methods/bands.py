"""Delta-CoMe: bands of singular vectors, the first at many bits and the later ones at few.

Ping et al., "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models"
(arXiv 2406.08903), sections 3.2 and 3.3. For each band of vectors, eq. 5: V^T is quantized with the Hessian of the
inputs X, then U with that of what it is given, S V^T X with the *quantized* V. Without calibration both are rounded to
nearest.

Here the singular values are folded into both factors (their square roots), which changes nothing but the damping and
saves storing them; and a group of scales runs along a vector in both factors, not across the few vectors of a band as
GPTQ on U would have it, where a band of two vectors would store a scale for every two codes.

Beyond the paper: ``refit`` replaces the left factor of a band, before it is quantized, by the one of least error given
the quantized right factor and what earlier bands left over, so that it makes up for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.factorization import LowRank
from deltafmt.methods.gptq_solver import gptq, gptq_columns
from deltafmt.methods.grids import Floats, Grid, Quantized
from deltafmt.methods.hessian import check_hessian

GROUP = 128
# Candidates in each generation of the search.
POPULATION = 16


@dataclass(frozen=True, slots=True)
class Band:
    """Consecutive singular vectors of one width.

    Attributes:
        left: A transposed, shape (vectors, rows).
        right: B, shape (vectors, columns).
    """

    left: Quantized
    right: Quantized

    def dense(self) -> Floats:
        """Return the band's share of the delta, float32, shape (rows, columns)."""
        return self.left.dense().T @ self.right.dense()

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points, without any padding."""
        return self.left.stored_bits + self.right.stored_bits


def band_grid(grid: Grid, bits: int) -> Grid:
    """Return the grid of a band. A band of one bit is a sign (section 3.3: BitDelta), whatever the other bands are."""
    return replace(grid, bits=bits, kind="midrise" if bits == 1 else grid.kind)


def fill(
    widths: Sequence[tuple[int | None, int]], vectors: int, budget: float, cost: Callable[[int], int]
) -> list[tuple[int, int]]:
    """Cut bands so that they take no more bytes than a budget.

    Args:
        widths: (vectors, bits) pairs, first vectors first; None takes all vectors that are left.
        vectors: number of vectors that there are.
        budget: bytes that all vectors may take, or infinity.
        cost: gives the bytes of a vector of either side, for its number of bits.

    Returns:
        (vectors, bits) pairs without empty ones, with at most ``vectors`` vectors together.
    """
    found = []
    for count, bits in widths:
        each = cost(bits)
        taken = int(min(vectors if count is None else count, budget / each, vectors))
        if taken:
            found.append((taken, bits))
        budget -= taken * each
        vectors -= taken
    return found


def quantize_bands(
    factors: LowRank,
    widths: Sequence[tuple[int, int]],
    grid: Grid,
    *,
    hessian: NDArray[np.floating] | None = None,
    delta: Floats | None = None,
) -> list[Band]:
    """Quantize the first singular vectors, band by band.

    Args:
        factors: singular vectors of the delta.
        widths: (vectors, bits) pairs.
        grid: kind, rule, group and scale dtype of every band; its bits do not count.
        hessian: H of the delta's inputs, for GPTQ by eq. 5; None rounds to nearest.
        delta: the matrix itself, if left factors are to be refitted to it.

    Raises:
        UsageError: more vectors than there are, or a wrong number of bits, or shapes that do not fit.
    """
    if sum(count for count, _ in widths) > factors.values.size:
        raise UsageError(f"bands of {sum(count for count, _ in widths)} vectors where there are {factors.values.size}")
    left, right = factors.balanced()
    if hessian is not None:
        check_hessian(hessian, right.shape[1])
    rest = None if delta is None else delta.astype(np.float64)
    bands: list[Band] = []
    first = 0
    for count, bits in widths:
        own = band_grid(grid, bits)
        part = slice(first, first + count)
        first += count
        a, b = left[:, part], np.ascontiguousarray(right[part])
        if hessian is None:
            coded = own.quantize(b)
        else:
            coded = gptq(b, hessian, own, act_order=True).quantized
        decoded = coded.dense().astype(np.float64)
        seen = decoded if hessian is None else decoded @ hessian.astype(np.float64)
        moments = seen @ decoded.T  # second moments of B x, the left factor's input
        if rest is not None:
            a = _refit(rest, seen, moments)
        if hessian is None:
            band = Band(own.quantize(np.ascontiguousarray(a.T)), coded)
        else:
            band = Band(gptq_columns(a, moments, own).quantized, coded)
        if rest is not None:
            rest -= band.dense()
        bands.append(band)
    return bands


def dense(bands: Sequence[Band], shape: tuple[int, int]) -> Floats:
    """Return the sum of bands, float32, shape (rows, columns)."""
    total = np.zeros(shape, np.float32)
    for band in bands:
        total += band.dense()
    return total


def search_bands(
    loss: Callable[[tuple[int, ...]], float],
    bits: Sequence[int],
    costs: Sequence[int],
    budget: int,
    vectors: int,
    *,
    start: Sequence[tuple[int, ...]] = (),
    generations: int = 20,
    seed: int = 0,
) -> tuple[tuple[int, ...], float]:
    """Search the numbers of vectors at each width that give the least loss (Delta-CoMe, appendix B).

    A genetic search: the better half of a population breeds, a child takes each count from either parent and changes
    some, and the cheapest width is filled to the budget. Every candidate is evaluated once; the same seed and loss give
    the same result.

    Args:
        loss: gives the loss of a tuple of counts, such as the perplexity of a text; lower is better, NaN is the worst.
        bits: widths, falling.
        costs: cost of one vector at each width.
        budget: cost that all vectors together may have.
        vectors: largest number of vectors.
        start: candidates to begin with, such as those of :func:`fill`.
        generations: number of generations.
        seed: seed of the search's random numbers.

    Returns:
        The best counts and their loss.

    Raises:
        UsageError: no widths, costs that do not match or are not positive.
    """
    if not bits or len(bits) != len(costs) or min(costs) < 1:
        raise UsageError(f"{len(bits)} widths and {len(costs)} costs, which must be as many and positive")
    rng = np.random.default_rng(seed)
    known: dict[tuple[int, ...], float] = {}

    def repair(counts: Sequence[int]) -> tuple[int, ...]:
        """Keep counts within the budget, first widths first, and fill the last width."""
        money, room = budget, vectors
        fixed = []
        for number, (count, cost) in enumerate(zip(counts, costs, strict=True)):
            most = min(money // cost, room)
            taken = most if number == len(counts) - 1 else min(max(int(count), 0), most)
            fixed.append(taken)
            money -= taken * cost
            room -= taken
        return tuple(fixed)

    def score(candidate: tuple[int, ...]) -> float:
        if candidate not in known:
            found = float(loss(candidate))
            known[candidate] = found if np.isfinite(found) else np.inf
        return known[candidate]

    def chance() -> tuple[int, ...]:
        """Spread a random share of the budget over the widths."""
        shares = rng.dirichlet(np.ones(len(bits)))
        return repair([int(share * budget // cost) for share, cost in zip(shares, costs, strict=True)])

    pool = [repair(candidate) for candidate in start][:POPULATION]
    pool += [chance() for _ in range(POPULATION - len(pool))]
    for _ in range(generations):
        parents = sorted(set(pool), key=lambda c: (score(c), c))[: POPULATION // 2]
        children = []
        for _ in range(POPULATION - len(parents)):
            one, other = (parents[int(i)] for i in rng.integers(0, len(parents), 2))
            mixed = np.where(rng.random(len(bits)) < 0.5, one, other)
            changed = rng.random(len(bits)) < 1 / len(bits)
            factor = np.exp(rng.normal(0, 0.5, len(bits)))
            step = rng.integers(-2, 3, len(bits))
            children.append(repair(np.where(changed, np.rint(mixed * factor) + step, mixed).astype(int).tolist()))
        pool = [*parents, *children]
    best = min(set(pool), key=lambda c: (score(c), c))
    return best, score(best)


def vector_errors(factors: LowRank, grid: Grid, hessian: NDArray[np.floating] | None = None) -> NDArray[np.float64]:
    """Return the error of each singular vector when both sides are rounded to nearest, shape (vectors,).

    The error is that of the outer product, in squares of weights, or of outputs if moments of the inputs are given.
    Vectors are orthogonal, so the errors of several vectors add up, except for the part that rounding mixes.
    """
    left, right = (side.astype(np.float64) for side in factors.balanced())
    sides = left.T, right
    coded = [grid.quantize(np.ascontiguousarray(side, np.float32)).dense().astype(np.float64) for side in sides]

    def moments(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        seen = a if hessian is None else a @ hessian.astype(np.float64)
        products: NDArray[np.float64] = np.einsum("ij,ij->i", seen, b)
        return products

    (u, v), (p, q) = sides, coded
    whole, mixed, rounded = (np.einsum("ij,ij->i", a, b) for a, b in ((u, u), (u, p), (p, p)))
    found: NDArray[np.float64] = whole * moments(v, v) - 2 * mixed * moments(v, q) + rounded * moments(q, q)
    return np.maximum(found, 0)


def searched(
    factors: LowRank,
    widths: Sequence[tuple[int, int]],
    grid: Grid,
    budget: float,
    cost: Callable[[int], int],
    *,
    hessian: NDArray[np.floating] | None = None,
    seed: int = 0,
) -> list[tuple[int, int]]:
    """Return the bands of least error at a budget, by :func:`search_bands`; each keeps at least a vector.

    The paper searches one list for the whole model, by what the model then says of a text; here every matrix has its
    own list, by the sum of :func:`vector_errors`. No candidate has to be quantized for that.

    Args:
        factors: singular vectors of the delta, as many as the budget could pay for.
        widths: (vectors, bits) pairs to begin with.
        grid: kind, rule, group and scale dtype of every band.
        budget: bytes that all vectors may take.
        cost: gives the bytes of a vector of either side, for its number of bits.
        hessian: second moments of the inputs.
        seed: seed of the search.
    """
    bits = [width for _, width in widths]
    costs = [cost(width) for width in bits]
    count = factors.values.size
    lost = np.concatenate([[0], np.cumsum(_energies(factors, hessian))])
    sums = [np.concatenate([[0], np.cumsum(vector_errors(factors, band_grid(grid, width), hessian))]) for width in bits]

    def loss(extra: tuple[int, ...]) -> float:
        ends = np.cumsum(np.array(extra) + 1)
        if ends[-1] > count:
            return np.inf
        starts = np.concatenate([[0], ends[:-1]])
        kept = sum(float(total[end] - total[start]) for total, start, end in zip(sums, starts, ends, strict=True))
        return kept + float(lost[-1] - lost[ends[-1]])

    rest = int(budget) - sum(costs)
    if rest < 0 or count < len(bits):
        return list(widths)
    begin = [tuple(max(number - 1, 0) for number, _ in widths)]
    best, _ = search_bands(loss, bits, costs, rest, count - len(bits), start=begin, generations=60, seed=seed)
    return [(number + 1, width) for number, width in zip(best, bits, strict=True)]


def _energies(factors: LowRank, hessian: NDArray[np.floating] | None) -> NDArray[np.float64]:
    """Return the error of leaving out each vector."""
    left, right = (side.astype(np.float64) for side in factors.balanced())
    seen = right if hessian is None else right @ hessian.astype(np.float64)
    found: NDArray[np.float64] = np.einsum("ij,ij->j", left, left) * np.einsum("ij,ij->i", seen, right)
    return found


def _refit(rest: NDArray[np.float64], seen: NDArray[np.float64], moments: NDArray[np.float64]) -> Floats:
    """Return the left factor A that minimizes trace((R - A B) H (R - A B)^T): R (B H)^T (B H B^T)^-1.

    Args:
        rest: R, shape (rows, columns).
        seen: B H.
        moments: B H B^T.
    """
    solved: Floats = np.linalg.lstsq(moments, seen @ rest.T, rcond=1e-7)[0].T.astype(np.float32)
    return solved
