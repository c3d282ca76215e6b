"""Helpers of methods that keep entries anywhere: the layout for a density, and the arrays of kept entries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.quantize import check_scales, default_grid, quantize
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.sparse.layout import GAP_BITS, SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays
from deltafmt.terms.tiles import SCALE_BYTES

# A block has the slots of its fullest row, which is relatively the less above the mean the longer the block is.
SPAN = 16384
RAW_BITS = {"BF16": 16, "F16": 16, "F32": 32}


def sparse_layout(density: float, bits: int | None, value_dtype: str, scale_dtype: str) -> SparseLayout:
    """Return the layout that takes the fewest bits for entries that stand anywhere with this density.

    With F = 2**g - 1, an entry that follows a geometric gap takes on average 1 / (1 - (1 - density)**F) slots.

    Args:
        density: share of the elements that are kept, above 0 and at most 1.
        bits: width of a code, on the midrise grid for 1 and 2 bits and the midtread grid above; None for values as
            they are.
        value_dtype: dtype of values as they are: ``BF16``, ``F16`` or ``F32``.
        scale_dtype: dtype of the scales of codes.

    Raises:
        UsageError: an argument is out of range.
    """
    if not 0 < density <= 1:
        raise UsageError(f"density {density} is outside 0 to 1")
    if value_dtype not in RAW_BITS:
        raise UsageError(f"value dtype {value_dtype!r} is not one of {', '.join(RAW_BITS)}")
    if scale_dtype not in SCALE_BYTES:
        raise UsageError(f"scale dtype {scale_dtype!r} is not one of {', '.join(SCALE_BYTES)}")
    width = RAW_BITS[value_dtype] if bits is None else bits

    def cost(gap_bits: int) -> float:
        return float((gap_bits + width) / -np.expm1((2.0**gap_bits - 1) * np.log1p(-min(density, 1 - 1e-12))))

    coding = value_dtype if bits is None else Coding(bits, default_grid(bits), scale_dtype)
    return SparseLayout(coding, min(GAP_BITS, key=cost), SPAN)


def sparse_term(layout: SparseLayout, values: NDArray[np.float32], kept: NDArray[np.bool_], rule: str) -> SparseArrays:
    """Return the arrays of a term.

    Args:
        layout: layout of the term.
        values: shape (rows, columns).
        kept: True for values that are kept; of the same shape.
        rule: rule of the scales of codes: ``minmax`` or ``mse``.

    Raises:
        UsageError: a value overflows its dtype.
    """
    counts = kept.sum(axis=1)
    row, columns = np.nonzero(kept)
    ends = np.cumsum(counts)
    chosen, coding = values[kept], layout.values
    if isinstance(coding, str):
        raw = narrow(chosen, coding)
        if not np.isfinite(widen(raw, coding)).all():
            raise UsageError(f"a delta is too large for {coding}")
        return SparseArrays(ends, columns, raw)
    check_scales(chosen)
    packed = np.full((counts.size, max(int(counts.max()), 1)), np.nan, np.float32)
    place = np.arange(row.size) - (ends - counts)[row]
    packed[row, place] = chosen
    codes, scales = quantize(packed, coding.bits, coding.grid, rule, 0, coding.scale_dtype)
    return SparseArrays(ends, columns, codes[row, place], scales)
