"""Low-rank factors of a delta: the singular vectors of the largest singular values.

Exact for small matrices. Larger ones take the randomized range finder with power iterations (Halko, Martinsson, Tropp,
arXiv 0909.4061, algorithms 4.4 and 5.1), whose random numbers depend on the shape alone, so that it is repeatable.

With a calibration set the factors can be those of least error of the *outputs*: for H = sum of x x^T = L L^T, the best
rank-r approximation of W L, times the inverse of L, minimizes trace((W - Q) H (W - Q)^T) among all Q of rank r.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.methods.hessian import DAMPING, check_hessian, factor_damped

Floats = NDArray[np.float32]

# Above this size the exact decomposition is slow, and where the rank is a small part of it, needless.
EXACT_SIZE = 768
OVERSAMPLING = 16
POWER_ITERATIONS = 4
# Of a sketch, whose vectors are only measured: vectors beyond the rank, and rows or columns up to which there is none.
SKETCH_OVERSAMPLING = 8
SKETCHED_SIDE = 256
# Singular values below this share of the largest are rounding of float32.
NULL = 1e-7
SMALL = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class LowRank:
    """A product ``left @ diag(values) @ right``.

    Attributes:
        left: float32, shape (rows, rank); orthonormal columns, but for those of singular values that are 0.
        values: singular values, float32, falling.
        right: float32, shape (rank, columns); likewise orthonormal rows, unless the factors were weighted.
    """

    left: Floats
    values: Floats
    right: Floats

    def dense(self) -> Floats:
        """Return the product, float32, shape (rows, columns)."""
        product: Floats = ((self.left * self.values) @ self.right).astype(np.float32, copy=False)
        return product

    def balanced(self) -> tuple[Floats, Floats]:
        """Return A and B with A @ B the product, the square roots of the singular values in each.

        Neither factor then needs the values beside it, and both have elements of like size.
        """
        root = np.sqrt(self.values)
        return self.left * root, root[:, None] * self.right

    def head(self, rank: int) -> LowRank:
        """Return the first ``rank`` vectors."""
        return LowRank(self.left[:, :rank], self.values[:rank], self.right[:rank])


def factorize(delta: Floats, rank: int, *, hessian: NDArray[np.floating] | None = None) -> LowRank:
    """Return the best approximation of a rank, or of the rank of the matrix if that is smaller.

    Args:
        delta: W, float32, shape (rows, columns).
        rank: number of vectors of the result.
        hessian: H, to weight the columns by their inputs; None for the plain approximation.

    Raises:
        UsageError: the rank is negative, or H does not fit or is not positive semidefinite.
        NonFiniteError: an element is NaN or infinite.
    """
    if rank < 0:
        raise UsageError(f"rank {rank} is negative")
    if not np.isfinite(delta).all():
        raise NonFiniteError("a delta to be factorized is not finite")
    rank = min(rank, *delta.shape)
    if hessian is None:
        return _with_signs(*_decompose(delta, rank))
    check_hessian(hessian, delta.shape[1])
    lower, _, _ = factor_damped(hessian, DAMPING, _lower)
    left, values, right = _decompose((delta.astype(np.float64) @ lower).astype(np.float32), rank)
    right = np.linalg.solve(lower.T, right.T.astype(np.float64)).T.astype(np.float32)
    return _with_signs(left, values, right)


def right_vectors(blocks: Iterable[Floats], rows: int, columns: int, rank: int) -> Floats:
    """Return about the first right singular vectors of a matrix, shape (rank, columns), from one pass over its rows.

    The moments G = D^T D of the columns are multiplied with few random vectors, and G is approximated from the products
    (Nystroem; Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data", algorithm 3). The vectors have a little less of the energy than the best. Where they foretell what
    a method will lose, that does not matter. Matrices of few rows or columns are decomposed exactly.

    Args:
        blocks: consecutive rows of the matrix, float32, finite, shape (any, columns).
        rows, columns: of the matrix.
        rank: number of vectors of the result, or as many as the matrix has rows and columns if that is less.

    Returns:
        Orthonormal rows, but for zeros in the place of vectors whose singular values are 0.
    """
    rank = min(rank, rows, columns)
    if not rank:
        return np.zeros((0, columns), np.float32)
    if rows <= SKETCHED_SIDE:
        return np.ascontiguousarray(_exact(np.concatenate(list(blocks)), rank)[2])
    count = rank + SKETCH_OVERSAMPLING
    if columns <= max(SKETCHED_SIDE, 4 * count):
        moments = np.zeros((columns, columns))
        for block in blocks:
            moments += block.T @ block
        return np.ascontiguousarray(np.linalg.eigh(moments)[1][:, ::-1][:, :rank].T, np.float32)
    test = _test_vectors(columns, count)
    narrow = test.astype(np.float32)
    products = np.zeros((columns, count))
    for block in blocks:
        products += block.T @ (block @ narrow)
    # A little of the identity keeps the small matrix positive definite in float32.
    products += NULL * max(float(np.linalg.norm(products)), float(SMALL)) * narrow
    inner = test.T @ products
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    half = products @ (vectors / np.sqrt(np.maximum(values, max(NULL * values[-1] / 100, SMALL))))
    order = np.linalg.eigh(half.T @ half)[1][:, ::-1]
    found = np.linalg.qr((half @ order).astype(np.float32))[0].T[:rank]
    return np.ascontiguousarray(found)


@functools.lru_cache(16)
def _test_vectors(columns: int, count: int) -> NDArray[np.float64]:
    """Return random orthonormal vectors, shape (columns, count)."""
    found: NDArray[np.float64] = np.linalg.qr(np.random.default_rng(columns).standard_normal((columns, count)))[0]
    return found


def rank_for_energy(values: NDArray[np.floating], share: float) -> int:
    """Return the smallest rank whose squared singular values make up a share of the energy.

    Args:
        values: singular values, falling.
        share: 0 to 1.

    Raises:
        UsageError: the share is out of range.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"a share of {share} of the energy is outside 0 to 1")
    energy = np.concatenate([[0.0], np.cumsum(np.square(values, dtype=np.float64))])
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)).clip(0, values.size))


def _decompose(matrix: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    least = min(matrix.shape)
    if least <= EXACT_SIZE or 4 * (rank + OVERSAMPLING) > least:
        return _exact(matrix, rank)
    rng = np.random.default_rng(matrix.shape)
    basis = matrix @ rng.standard_normal((matrix.shape[1], rank + OVERSAMPLING), np.float32)
    basis = np.linalg.qr(basis)[0]
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(matrix.T @ basis)[0]
        basis = np.linalg.qr(matrix @ basis)[0]
    inner, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ inner)[:, :rank], values[:rank], right[:rank]


def _exact(matrix: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    """Decompose by the eigenvectors of the smaller Gram matrix in float64.

    This is several times as fast as a decomposition in float32, and as accurate: the squares lose digits of float64
    that float32 does not have. Vectors of singular values below NULL of the largest are zero on the longer side.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    wide = (matrix if tall else matrix.T).astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide)
    short = vectors[:, ::-1][:, :rank]
    long = wide @ short
    values = np.sqrt(np.einsum("ij,ij->j", long, long))
    order = np.argsort(-values, kind="stable")
    short, long, values = short[:, order], long[:, order], values[order]
    values[values <= NULL * values.max(initial=0)] = 0
    long = np.where(values > 0, long / np.where(values > 0, values, 1), 0)
    left, right = (long, short) if tall else (short, long)
    return left.astype(np.float32), values.astype(np.float32), right.T.astype(np.float32)


def _with_signs(left: Floats, values: Floats, right: Floats) -> LowRank:
    """Make the largest element of every left vector positive: the decomposition leaves the signs open."""
    if left.size:
        top = np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0)[0]
        signs = np.where(top < 0, np.float32(-1), np.float32(1))
        left, right = left * signs, right * signs[:, None]
    return LowRank(np.ascontiguousarray(left), values, np.ascontiguousarray(right))


def _lower(damped: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the Cholesky factor L of the damped H, or None where that is not positive definite."""
    try:
        return np.linalg.cholesky(damped).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
