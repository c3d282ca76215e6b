"""Codes, scales and zero points to values, and sums of outer products (spec/deltafmt-v1.md, sections 12.3 and 13.3).

Compiled: ``kernels/cpu/loops/lowbit.c``, ``kernels/cpu/loops/lowrank.c``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop

Floats = NDArray[np.float32]


def _dequantize(
    native: Native, codes: NDArray[np.uint8], step: int, offsets: NDArray[np.int32], factors: Floats, group: int
) -> Floats:
    out = np.empty(codes.shape, np.float32)
    size = max(min(group, codes.shape[1]), 1)
    arrays = (np.ascontiguousarray(array) for array in (codes, offsets, factors))
    fields, offset, factor = arrays
    native.dequantize(fields, step, offset, factor, size, out)
    return out


@loop(_dequantize)
def dequantize(codes: NDArray[np.uint8], step: int, offsets: NDArray[np.int32], factors: Floats, group: int) -> Floats:
    """Return ``float32(step * u - offset) * factor`` for every field u, with one rounding.

    Args:
        codes: fields u, shape (rows, n).
        step: 2 on the symmetric grids, whose offset is ``top`` and whose factor is half a scale; 1 on the
            asymmetric one, whose offset is the zero point.
        offsets, factors: shape (rows, ceil(n / group)).
        group: consecutive fields that share an offset and a factor, at least 1.

    Returns:
        float32, shape (rows, n).
    """
    count = codes.shape[1]
    # A group larger than the row is the row: the parameter never decides how much memory is taken.
    size = max(min(group, count), 1)
    offset = np.repeat(offsets, size, axis=1)[:, :count]
    factor = np.repeat(factors, size, axis=1)[:, :count]
    with np.errstate(over="ignore"):
        return (step * codes.astype(np.int32) - offset).astype(np.float32) * factor


def _add_outer(native: Native, u: Floats, v: Floats, out: Floats) -> None:
    native.add_outer(np.ascontiguousarray(u), np.ascontiguousarray(v), out)


@loop(_add_outer)
def add_outer(u: Floats, v: Floats, out: Floats) -> None:
    """Add the outer products of vectors, in their order, to ``out``.

    Every product is rounded to float32, then every sum; nothing is fused, so any implementation gives the same bits.

    Args:
        u: shape (vectors, rows).
        v: shape (vectors, columns).
        out: shape (rows, columns); changed.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for left, right in zip(u, v, strict=True):
            # "The product of the r-th vectors is rounded, then added to the sum of those before it."
            out += left[:, None] * right
