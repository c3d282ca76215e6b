"""The vectors of ``sparse`` terms, good and bad."""

from __future__ import annotations

import io

import numpy as np
from vector_tools import change, change_buffer, fields, makes_arrays, one_tensor, vector

from deltafmt.delta import DeltaFile
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


@vector("invalid", "more slots than the shape can need", "401 slots are more than 400")
def sparse_too_many_slots() -> bytes:
    return change(thinned(), lambda index: index["tensors"]["w"]["terms"][0].update(slots=401))


@vector("invalid", "blocks of 100 columns", "span 100")
def sparse_span() -> bytes:
    return change(thinned(), lambda index: index["layouts"][0].update(span=100))


@vector("invalid", "sparse values with scales for groups", "one scale a row")
def sparse_scale_group() -> bytes:
    data = one_tensor(SparseLayout(Coding(4), 4, 256), 37, 200)
    return change(data, lambda index: index["layouts"][0]["values"].update(scale_group=8))


@vector("invalid", "the slots of the blocks do not start at 0", "do not ascend from 0")
def sparse_starts() -> bytes:
    return change_buffer(thinned(), "starts", 0, 1)


@vector("invalid", "the slots of a block start behind those of the next", "do not ascend from 0")
def sparse_starts_descend() -> bytes:
    return change_buffer(thinned(), "starts", 5, 0x7F)


@vector("invalid", "the gaps of a row lead beyond the last column", "beyond its block")
def sparse_beyond_columns() -> bytes:
    data = one_tensor(SparseLayout("F32", 8, 256), 32, 40)
    return change_buffer(data, "gaps", 4, 0xFE)


@vector("invalid", "a filler has a value", "a filler has a value")
def sparse_filler_value() -> bytes:
    # Row 0 is empty.
    return change_buffer(thinned(), "values", 2, 0x80)


@vector("invalid", "a row that does not exist has an entry", "a row that does not exist has an entry")
def sparse_entry_of_no_row() -> bytes:
    return change_buffer(one_tensor(SparseLayout("F32", 4, 256), 30, 200), "gaps", 4 * 31, 0xF0)


@vector("invalid", "unused bits of the last word of the gaps are set", "unused bits of the gaps")
def sparse_unused_bits() -> bytes:
    data = one_tensor(SparseLayout("F32", 8, 256), 32, 20)
    with DeltaFile(io.BytesIO(data)) as delta:
        gaps = delta.buffers("w")["gaps"]
        slots = delta["w"].terms[0].slots
    assert slots % 4
    return change_buffer(data, "gaps", gaps.nbytes - 1, 0x01)


@vector("invalid", "a sparse value is NaN", "a value is not finite")
def sparse_nan() -> bytes:
    return change_buffer(change_buffer(thinned(), "values", 4 * 1 + 2, 0xC0), "values", 4 * 1 + 3, 0x7F)
