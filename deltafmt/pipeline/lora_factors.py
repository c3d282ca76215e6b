"""LoRA factors as the vectors of a ``lowrank`` term, and back (spec/deltafmt-v1.md, section 13).

A module computes ``y = W x + s B A x``, so its weight's delta is ``s B A``: vector u_r is column r of B, and v_r is row
r of A. Embeddings and Conv1D modules store the transpose of the weight: there u_r is row r of A, and v_r is column r of
B. The scaling s is multiplied into B. If the factors' dtype holds every element of s B exactly, the term keeps that
dtype. This is so for every s that is a power of two, within the dtype's range. Otherwise both factors become float32: A
exactly, and s B rounded once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.adapter import Factors
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import NonFiniteError
from deltafmt.terms.floats import Raw, narrow, widen
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout

Floats = NDArray[np.float32]


def term_of(factors: Factors, scaling: float, *, transposed: bool) -> tuple[LowRankLayout, LowRankArrays]:
    """Return the layout and the arrays of the term that a module's factors become.

    Factors with more vectors than the matrix has rows or columns are multiplied out: their product in float32 becomes
    one factor, and the identity matrix the other.

    Args:
        factors: A and B of the module.
        scaling: the factor s of B A.
        transposed: True if the base stores the transpose of the module's weight.

    Raises:
        NonFiniteError: a factor, or its product with the scaling, has NaN or infinity.
    """
    a, b = _read(factors.a), _read(factors.b)
    wide_a = _finite(widen(a, factors.a.dtype), factors.a)
    exact = _finite(widen(b, factors.b.dtype), factors.b).astype(np.float64).T * scaling
    with np.errstate(over="ignore"):
        wide_b = _finite(exact.astype(np.float32), factors.b, f" times the scaling of {scaling:g}")
    if factors.rank > min(wide_b.shape[1], wide_a.shape[1]):
        u, v, dtype = *_multiplied(wide_a, exact, factors), "F32"
        return LowRankLayout(u.shape[0], dtype), _arrays(u, v, dtype, transposed=transposed)
    dtype = "F32"
    if factors.a.dtype == factors.b.dtype:
        kept = widen(narrow(wide_b, factors.b.dtype), factors.b.dtype)
        if np.array_equal(kept, exact):
            dtype = factors.b.dtype
    return LowRankLayout(factors.rank, dtype), _arrays(wide_b, wide_a, dtype, transposed=transposed)


def factors_of(u: Floats, v: Floats, *, transposed: bool) -> tuple[Floats, Floats]:
    """Return A and B, with a scaling of 1, of a term's vectors; the inverse of :func:`term_of`."""
    return (u, np.ascontiguousarray(v.T)) if transposed else (v, np.ascontiguousarray(u.T))


def _read(tensor: Tensor) -> Raw:
    with tensor.row_range(0, tensor.rows) as raw:
        return raw.copy()


def _arrays(out: Floats, into: Floats, dtype: str, *, transposed: bool) -> LowRankArrays:
    u, v = (narrow(np.ascontiguousarray(side), dtype) for side in ((into, out) if transposed else (out, into)))
    return LowRankArrays(u, v)


def _multiplied(a: Floats, b: NDArray[np.float64], factors: Factors) -> tuple[Floats, Floats]:
    """Return min(rows, columns) vectors with the same product: the rows or columns of the product, and unit vectors."""
    with np.errstate(over="ignore"):
        product = _finite((b.T @ a.astype(np.float64)).astype(np.float32), factors.b, " times the other factor")
    rows, columns = product.shape
    if rows <= columns:
        return np.eye(rows, dtype=np.float32), product
    return np.ascontiguousarray(product.T), np.eye(columns, dtype=np.float32)


def _finite(values: Floats, tensor: Tensor, change: str = "") -> Floats:
    if not np.isfinite(values).all():
        raise NonFiniteError(f'{tensor.file.path}: tensor "{tensor.name}"{change} is not finite')
    return values
