"""Vectors that a reader must refuse because of a term: its layout, its numbers, or the bytes of its buffers."""

from __future__ import annotations

import io

import numpy as np
from vector_tools import change, change_buffer, one_tensor, simple, vector

from deltafmt.delta import DeltaFile
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.hashing import seeded
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout


@vector("invalid", "a scale is infinite", "negative or not finite")
def infinite_scale() -> bytes:
    return change_buffer(change_buffer(simple(), "scales", 0, 0x80), "scales", 1, 0x7F)


@vector("invalid", "a field of 15 on a midtread grid of 4 bits", "the grid ends at 14")
def field_beyond_grid() -> bytes:
    return change_buffer(simple(), "codes", 0, 0xFF)


@vector("invalid", "unused bits of a last word are set", "unused bits of the codes")
def unused_bits() -> bytes:
    layout = NMLayout(1, 8, 4)
    data = one_tensor(layout, 32, 24)
    return change_buffer(data, "codes", 3, 0x10)


@vector("invalid", "unused bits of a plane that is not the last are set", "unused bits of the codes")
def unused_bits_of_a_plane() -> bytes:
    # 3 fields of 3 bits: 6 bits in the first word, 3 in the second.
    data = one_tensor(NMLayout(1, 8, 3), 32, 24)
    return change_buffer(data, "codes", 0, 0x40)


@vector("invalid", "a row that does not exist, in a super-tile, has a word", "unused bits of the codes")
def word_of_no_row() -> bytes:
    # 40 rows that share masks by 4: row 40 would be lane 10 of tile 0.
    return change_buffer(simple(), "codes", 4 * 10, 0x01)


@vector("invalid", "a row that does not exist, in a super-tile, has a scale", "unused bits of the scales")
def scale_of_no_row() -> bytes:
    # Row 41 would be lane 10 of tile 1.
    return change_buffer(simple(), "scales", 2 * (32 + 10), 0x01)


@vector("invalid", "an entry beyond the last column has a field", "beyond the last column")
def field_beyond_columns() -> bytes:
    layout = NMLayout(8, 8, 4, share=1)
    data = one_tensor(layout, 32, 7)
    position = int(np.argmax(seeded(7, 0, 32, 1, 8, 8)[0, 0] == 7))
    with DeltaFile(io.BytesIO(data)) as delta:
        byte = delta.buffers("w")["codes"].view(np.uint8).reshape(-1)[position // 2]
    return change_buffer(data, "codes", position // 2, int(byte) | (1 << (4 * (position % 2))))


@vector("invalid", "a scale is negative", "negative or not finite")
def negative_scale() -> bytes:
    return change_buffer(simple(), "scales", 1, 0xBF)


@vector("invalid", "the positions of a group do not ascend", "not ascending")
def positions_descend() -> bytes:
    data = one_tensor(NMLayout(2, 16, 4, "fixed"), 32, 16)
    return change_buffer(data, "index", 0, 0x00)


@vector("invalid", "a position is not below M", "not ascending and below 7")
def position_above_m() -> bytes:
    # 3 bits in planes of 2 and 1: word 0 and word 1 of the row.
    data = one_tensor(NMLayout(1, 7, 4, "fixed"), 32, 7)
    return change_buffer(change_buffer(data, "index", 0, 0x03), "index", 128, 0x01)


@vector("invalid", "a lowbit layout of 9 bits", "bits k = 9")
def lowbit_9_bits() -> bytes:
    return change(one_tensor(LowbitLayout(8), 32, 32), lambda index: index["layouts"][0].update(bits=9))


@vector("invalid", "a lowbit layout with scales of columns and a scale group", "scale group 0")
def lowbit_column_groups() -> bytes:
    data = one_tensor(LowbitLayout(1, "midrise", axis="column"), 32, 32)
    return change(data, lambda index: index["layouts"][0].update(scale_group=8))


@vector("invalid", "a lowbit term, which draws nothing, has a seed", "has seed 0")
def lowbit_seed() -> bytes:
    return change(one_tensor(LowbitLayout(4), 32, 32), lambda index: index["tensors"]["w"]["terms"][0].update(seed=1))


@vector("invalid", "a lowbit field of 7 on a midtread grid of 3 bits", "the grid ends at 6")
def lowbit_field_beyond_grid() -> bytes:
    # Planes of 2 and 1 bits: one word each.
    data = one_tensor(LowbitLayout(3), 32, 4)
    return change_buffer(change_buffer(data, "codes", 0, 0xFF), "codes", 128, 0x0F)


@vector("invalid", "a zero point of 8 on a grid of 3 bits", "a zero point is 8")
def lowbit_zero_point_beyond_grid() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(3, "asymmetric"), 32, 32), "zero_points", 5, 8)


@vector("invalid", "the zero point of a row that does not exist is set", "unused bits of the zero_points")
def lowbit_zero_point_of_no_row() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(3, "asymmetric"), 30, 32), "zero_points", 31, 1)


@vector("invalid", "the scale of a column is negative", "negative or not finite")
def lowbit_negative_column_scale() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(1, "midrise", axis="column"), 32, 32), "scales", 9, 0xBF)


@vector("invalid", "a band of no vectors", "rank R = 0")
def lowrank_of_rank_0() -> bytes:
    return change(one_tensor(LowRankLayout(1, "BF16"), 32, 32), lambda index: index["layouts"][0].update(rank=0))


@vector("invalid", "more vectors than the buffers hold", "where the shape needs")
def lowrank_longer_than_buffers() -> bytes:
    return change(one_tensor(LowRankLayout(1, "BF16"), 32, 32), lambda index: index["layouts"][0].update(rank=32))


@vector("invalid", "more vectors than the matrix has columns", "rank R = 33 is more than a matrix of 40 x 32 has")
def lowrank_above_columns() -> bytes:
    return change(one_tensor(LowRankLayout(1, "BF16"), 40, 32), lambda index: index["layouts"][0].update(rank=33))


@vector("invalid", "unused bits of a vector's last word are set", "unused bits of the u_codes")
def lowrank_unused_bits() -> bytes:
    data = one_tensor(LowRankLayout(2, Coding(4, "midrise")), 33, 32)
    return change_buffer(data, "u_codes", 19, 0x10)


@vector("invalid", "a value of a vector is infinite", "factor v is not finite")
def lowrank_infinite() -> bytes:
    data = one_tensor(LowRankLayout(1, "BF16"), 32, 32)
    return change_buffer(change_buffer(data, "v", 0, 0x80), "v", 1, 0x7F)


def thinned() -> bytes:
    """Return a file with a sparse tensor of 37 rows and 200 columns: F32 values, gaps of 4 bits."""
    return one_tensor(SparseLayout("F32", 4, 256), 37, 200)


@vector("invalid", "a sparse term without its number of slots", "expected the keys")
def sparse_without_slots() -> bytes:
    return change(thinned(), lambda index: index["tensors"]["w"]["terms"][0].pop("slots"))


@vector("invalid", "a lowbit term has a number of slots", "expected the keys")
def lowbit_with_slots() -> bytes:
    return change(one_tensor(LowbitLayout(4), 32, 32), lambda index: index["tensors"]["w"]["terms"][0].update(slots=0))


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
