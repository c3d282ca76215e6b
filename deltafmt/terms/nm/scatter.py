"""Codes, scales and positions to a dense float32 delta (spec/deltafmt-v1.md, sections 11.5 and 11.6).

Compiled: ``kernels/cpu/loops/nm.c``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop


def _scatter(
    native: Native,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    positions: NDArray[np.uint8],
    columns: int,
    m: int,
    share: int,
    top: int,
    scale_group: int,
) -> NDArray[np.float32]:
    out = np.empty((codes.shape[0], columns), np.float32)
    kept = max(codes.shape[1], 1)
    fields, steps, at = (np.ascontiguousarray(array) for array in (codes, scales, positions))
    native.scatter(fields, steps, out, at, m, share, top, min(scale_group or kept, kept))
    return out


@loop(_scatter)
def scatter(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    positions: NDArray[np.uint8],
    columns: int,
    m: int,
    share: int,
    top: int,
    scale_group: int,
) -> NDArray[np.float32]:
    """Return the dense delta of a run of rows that starts on a mask row.

    Args:
        codes: fields u, shape (rows, groups * N).
        scales: shape (rows, scales per row).
        positions: shape (mask rows, groups, N); row r uses mask row ``r // share``.
        columns: columns of the tensor; elements beyond them are ignored.
        m: M.
        share: v.
        top: the layout's ``top``, as in ``value = (2u - top) * scale / 2``.
        scale_group: kept elements that share a scale; 0 for all of a row.

    Returns:
        float32, shape (rows, columns).
    """
    rows, kept = codes.shape
    groups, n = positions.shape[1:]
    # "value = float32(2u - top) * float32(scale * 0.5)", one rounding in float32.
    half = scales * np.float32(0.5)
    # A group larger than the row is the row: the parameter never decides how much memory is taken.
    element_scale = np.repeat(half, min(scale_group or kept, kept), axis=1)[:, :kept]
    with np.errstate(over="ignore"):
        values = (2 * codes.astype(np.int32) - top).astype(np.float32) * element_scale
    # "Entry i of group g stands at column g * M + position; entries at or beyond the last column are ignored."
    out = np.zeros((rows, groups, m), np.float32)
    by_row = positions[np.arange(rows) // share].astype(np.intp)
    np.put_along_axis(out, by_row, values.reshape(rows, groups, n), axis=2)
    return np.ascontiguousarray(out.reshape(rows, groups * m)[:, :columns])
