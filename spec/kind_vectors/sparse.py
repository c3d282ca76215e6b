"""The vectors of ``sparse`` terms, good and bad."""

from __future__ import annotations

import numpy as np
from vector_tools import change, fields, makes_arrays, one_tensor, vector

from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow
from deltafmt.terms.sparse.codec import SparseArrays
from deltafmt.terms.sparse.layout import SparseLayout


@makes_arrays("sparse")
def arrays(layout: SparseLayout, rows: int, columns: int, seed: int) -> SparseArrays:  # noqa: ARG001
    """Return made-up content of a ``sparse`` term: about one entry of eleven, some rows empty."""
    kept = fields(rows * columns, 10, 5).reshape(rows, columns) == 3
    kept[::7] = False
    row, column = np.nonzero(kept)
    ends = np.cumsum(kept.sum(axis=1))
    coding = layout.values
    if isinstance(coding, Coding):
        scales = ((1 + np.arange(rows, dtype=np.float32)) / 256)[:, None]
        return SparseArrays(ends, column, fields(row.size, coding.top, 2), scales)
    values = fields(row.size, 254, 2).astype(np.float32) / 64 - 2
    return SparseArrays(ends, column, narrow(values, coding))


@vector("ok", "sparse, 4 bits midtread, gaps of 4 bits, two tiles, the second ragged, and empty rows")
def sparse_k4_gaps_4() -> bytes:
    return one_tensor(SparseLayout(Coding(4), 4, 256), 37, 200)


@vector("ok", "sparse, BF16 values, gaps of 1 bit: a map of bits; three blocks of 256 columns, the last of 88")
def sparse_bf16_bitmap() -> bytes:
    return one_tensor(SparseLayout("BF16", 1, 256), 20, 600)


@vector("ok", "sparse, 1 bit midrise, gaps of 16 bits, F32 scales, in a cold file")
def sparse_k1_gaps_16_cold() -> bytes:
    return one_tensor(SparseLayout(Coding(1, "midrise", "F32"), 16, 65536), 40, 300, "cold")


def thinned() -> bytes:
    """Return a file with a sparse tensor of 37 rows and 200 columns: F32 values, gaps of 4 bits."""
    return one_tensor(SparseLayout("F32", 4, 256), 37, 200)


@vector("invalid", "a sparse term without its number of slots", "expected the keys")
def sparse_without_slots() -> bytes:
    return change(thinned(), lambda index: index["tensors"]["w"]["terms"][0].pop("slots"))
