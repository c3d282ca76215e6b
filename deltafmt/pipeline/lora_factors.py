"""LoRA factors as the vectors of a ``lowrank`` term, and back (spec/deltafmt-v1.md, section 13).

A module computes ``y = W x + s B A x``, so its weight's delta is ``s B A``: vector u_r is column r of B, and v_r is row
r of A. Embeddings and Conv1D modules store the transpose of the weight: there u_r is row r of A, and v_r is column r of
B. The scaling s is multiplied into B. If the factors' dtype holds every element of s B exactly, the term keeps that
dtype. This is so for every s that is a power of two, within the dtype's range. Otherwise both factors become float32: A
exactly, and s B rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.adapter import Factors
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import NonFiniteError
from deltafmt.terms.floats import RAW_DTYPES, Raw, narrow, widen
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import MAX_VECTORS, LowRankLayout

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Product:
    """The part of a product ``s B A`` that one tensor of the base takes.

    Attributes:
        factors: A and B.
        scaling: the factor s.
        transposed: True if the tensor has the rows and columns of the product exchanged.
        experts: how many matrices the parameter has that the factors belong to; 1 for a matrix.
        expert: which of them the tensor is; None if it is all of them.
        start, stop: the rows of the parameter's matrix that the tensor has.
    """

    factors: Factors
    scaling: float
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    start: int = 0
    stop: int | None = None

    @property
    def rank(self) -> int:
        """The vectors of the product."""
        stored = self.factors.a.shape[0]
        return stored if self.expert is None else stored // self.experts

    def stacked(self) -> tuple[Floats, NDArray[np.float64]]:
        """Return A, shape (experts, rank, in), in float32, and s B, shape (experts, rank, out), in float64.

        Raises:
            NonFiniteError: a factor, or B times the scaling, has NaN or infinity.
        """
        factors = self.factors
        a = _finite(widen(_read(factors.a), factors.a.dtype), factors.a)
        b = _finite(widen(_read(factors.b), factors.b.dtype), factors.b).T.astype(np.float64) * self.scaling
        with np.errstate(over="ignore"):
            _finite(b.astype(np.float32), factors.b, f" times the scaling of {self.scaling:g}")
        # PEFT counts A's rows expert by expert, and B's columns rank by rank.
        by_expert = a.reshape(self.experts, -1, a.shape[1])
        return by_expert, b.reshape(-1, self.experts, b.shape[1]).swapaxes(0, 1)

    def vectors(self) -> tuple[Floats, NDArray[np.float64]]:
        """Return A, shape (rank, in), and s B, shape (rank, out): of one expert, or of all, one after the other."""
        a, b = self.stacked()
        if self.expert is not None:
            return a[self.expert], b[self.expert]
        return a.reshape(-1, a.shape[2]), b.reshape(-1, b.shape[2])

    def sides(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Return the vectors u and v of the tensor's rows and columns; their sum of outer products is the delta."""
        a, b = self.vectors()
        u, v = (a, b) if self.transposed else (b, a)
        u = u[:, self.start : self.stop]
        if self.experts > 1 and self.expert is None:
            # The rows of all experts stand one after the other, and each has vectors of its own.
            each, rows = u.shape[0] // self.experts, u.shape[1]
            spread = np.zeros((u.shape[0], self.experts * rows), u.dtype)
            for expert in range(self.experts):
                mine = slice(expert * each, (expert + 1) * each)
                spread[mine, expert * rows : (expert + 1) * rows] = u[mine]
            u = spread
        return u, v


def term_of(product: Product, rows: int | None = None) -> tuple[LowRankLayout, LowRankArrays]:
    """Return the layout and the arrays of the term that a product becomes.

    Factors with more vectors than the matrix has rows or columns are multiplied out: their product in float32 becomes
    one factor, and the identity matrix the other.

    Args:
        product: the product.
        rows: the first rows of the tensor that the term covers; all if not given.

    Raises:
        NonFiniteError: a factor, or its product with the scaling, has NaN or infinity.
    """
    u, v = product.sides()
    u = u[:, :rows]
    factors = product.factors
    if product.rank > min(u.shape[1], v.shape[1], MAX_VECTORS):
        u, v = _multiplied(u, v, factors)
        return LowRankLayout(u.shape[0], "F32"), _arrays(u, v, "F32")
    dtype = "F32"
    scaled = v if product.transposed else u
    if factors.a.dtype == factors.b.dtype:
        kept = widen(narrow(scaled.astype(np.float32), factors.b.dtype), factors.b.dtype)
        if np.array_equal(kept, scaled):
            dtype = factors.b.dtype
    return LowRankLayout(u.shape[0], dtype), _arrays(u, v, dtype)


def term_bytes(product: Product, rows: int, columns: int) -> int:
    """Return the bytes of the term that a product becomes, at most: in the dtype of the factors, or in F32."""
    vectors = min(product.rank, rows, columns)
    a, b = product.factors.a.dtype, product.factors.b.dtype
    exact = a == b and float(np.frexp(product.scaling)[0]) == 0.5 and vectors == product.rank
    return vectors * (rows + columns) * (RAW_DTYPES[a].itemsize if exact else 4)


def factors_of(u: Floats, v: Floats, *, transposed: bool) -> tuple[Floats, Floats]:
    """Return A and B, with a scaling of 1, of a term's vectors; the inverse of :func:`term_of`."""
    return (u, np.ascontiguousarray(v.T)) if transposed else (v, np.ascontiguousarray(u.T))


def values_of(tensor: Tensor) -> Floats:
    """Return a small tensor's values in float32, with its first dimension as rows.

    Raises:
        NonFiniteError: it has NaN or infinity.
    """
    return _finite(widen(_read(tensor), tensor.dtype), tensor)


def _read(tensor: Tensor) -> Raw:
    """Return a tensor as a raw matrix, with its first dimension as rows."""
    with tensor.row_range(0, tensor.rows) as raw:
        return raw.copy().reshape(tensor.shape[0], -1)


def _arrays(u: NDArray[np.floating], v: NDArray[np.floating], dtype: str) -> LowRankArrays:
    return LowRankArrays(*(narrow(np.ascontiguousarray(side, np.float32), dtype) for side in (u, v)))


def _multiplied(
    u: NDArray[np.floating], v: NDArray[np.floating], factors: Factors
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return min(rows, columns) vectors with the same product: the rows or columns of the product, and unit vectors."""
    with np.errstate(over="ignore"):
        dense = (u.astype(np.float64).T @ v.astype(np.float64)).astype(np.float32)
    product = _finite(dense, factors.b, " times the other factor")
    rows, columns = product.shape
    if rows <= columns:
        return np.eye(rows, dtype=np.float32), product
    return np.ascontiguousarray(product.T), np.eye(columns, dtype=np.float32)


def _finite(values: Floats, tensor: Tensor, change: str = "") -> Floats:
    if not np.isfinite(values).all():
        raise NonFiniteError(f'{tensor.file.path}: tensor "{tensor.name}"{change} is not finite')
    return values
