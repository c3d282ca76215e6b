"""Vectors of the rules of ``sparse`` terms that no other file has: parameters, starts, slots, values (section 14)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from draft import Draft
from vector_tools import change_buffer, layout_is, one_tensor, unchecked, vector

from deltafmt.terms import words
from deltafmt.terms.coding import Coding
from deltafmt.terms.sparse.layout import SparseLayout

SMALL = (4, 8)
GAP_BITS = 4
FILLER = 15


def slots_of(
    entries: Mapping[tuple[int, int], int], starts: list[int], rows: int, columns: int, *, slots: int | None = None
) -> bytes:
    """Return a file with a sparse term of F32 values, gaps of 4 bits and blocks of 256 columns.

    Args:
        entries: the gap of every slot that has an entry, by lane and slot; their values are 1.5.
        starts: the first slot of each block.
        rows, columns: the shape, of one tile.
        slots: the number of slots; the last of the starts if not given.
    """
    count = starts[-1] if slots is None else slots
    gaps = np.full((32, count), FILLER, np.uint8)
    values = np.zeros((count, 32), np.float32)
    for (lane, slot), gap in entries.items():
        gaps[lane, slot] = gap
        values[slot, lane] = 0.0 if gap == FILLER else 1.5
    draft = Draft.of(one_tensor(SparseLayout("F32", GAP_BITS, 256), rows, columns))
    draft.term["slots"], draft.raw[0] = count, bytearray()
    buffers = {"gaps": words.pack(gaps, GAP_BITS), "starts": np.array(starts, "<u4"), "values": values}
    for name, array in buffers.items():
        draft.raw[0] += bytes(-len(draft.raw[0]) % 256)
        draft.term["buffers"][name] = [0, len(draft.raw[0]), array.nbytes]
        draft.raw[0] += array.tobytes()
    return draft.build()


@vector("ok", "sparse, two tiles and three blocks: F16 values, gaps of 2 bits, which need fillers")
def sparse_f16_tiles_and_blocks() -> bytes:
    return one_tensor(SparseLayout("F16", 2, 256), 40, 530)


@vector("ok", "sparse, two tiles and two blocks: 5 bits midrise in two planes, gaps of 3 bits in two planes")
def sparse_k5_tiles_and_blocks() -> bytes:
    return one_tensor(SparseLayout(Coding(5, "midrise"), 3, 256), 35, 300)


for _bits in (5, 6, 7, 8):
    vector("ok", f"sparse, 2 bits midtread, gaps of {_bits} bits, two blocks", name=f"sparse-gaps-{_bits}")(
        lambda bits=_bits: one_tensor(SparseLayout(Coding(2), bits, 256), 8, 270)  # type: ignore[misc]
    )


@vector("ok", "sparse, no entry at all: no slots, and buffers of no bytes")
def sparse_empty() -> bytes:
    return one_tensor(SparseLayout("F32", 4, 256), 1, 8)


@vector("ok", "sparse, a block without slots between two that have some")
def sparse_empty_block() -> bytes:
    return slots_of({(0, 0): 3, (1, 1): 14, (2, 0): 0, (2, 1): 0}, [0, 1, 1, 2], 4, 600)


@vector("ok", "sparse, entries in the first and in the last column of a block, one behind another, and behind fillers")
def sparse_bounds() -> bytes:
    first = {(0, 0): 0, (0, 1): 0, (1, 17): 0, (2, 0): 14}
    return slots_of(first, [0, 18], 3, 256)


@vector("ok", "sparse values that are -0 and subnormal: -0 is the value of an entry")
def sparse_minus_zero() -> bytes:
    data = slots_of({(0, 0): 0, (1, 0): 2}, [0, 1], 2, 8)
    data = change_buffer(change_buffer(data, "values", 2, 0x00), "values", 3, 0x80)
    return change_buffer(change_buffer(change_buffer(data, "values", 4, 0x01), "values", 6, 0x00), "values", 7, 0x00)


@vector("invalid", "gaps of 9 bits", "gap bits 9")
def sparse_gap_bits_9() -> bytes:
    return one_tensor(unchecked(SparseLayout, "F32", 9, 256), 5, 40)


@vector("invalid", "gaps of no bits: a value for every row", "gap bits 0")
def sparse_gap_bits_0() -> bytes:
    return layout_is(one_tensor(SparseLayout("F32", 1, 256), 1, 8), gap_bits=0)


@vector("invalid", "blocks of 100 columns", "span 100")
def sparse_span() -> bytes:
    return one_tensor(unchecked(SparseLayout, "F32", 4, 100), 5, 120)


@vector("invalid", "blocks of 128 columns", "span 128")
def sparse_span_128() -> bytes:
    return one_tensor(unchecked(SparseLayout, "F32", 4, 128), 5, 140)


@vector("invalid", "blocks of 131072 columns", "span 131072")
def sparse_span_131072() -> bytes:
    return layout_is(one_tensor(SparseLayout("F32", 4, 256), 5, 40), span=131072)


@vector("invalid", "sparse values of F64", "dtype of values 'F64'")
def sparse_f64() -> bytes:
    return layout_is(one_tensor(SparseLayout("F32", 4, 256), *SMALL), values="F64")


def coded(**parameters: Any) -> bytes:
    """Return a file with coded sparse values, whose coding has other parameters."""
    coding = Coding(4, "midrise")
    return layout_is(one_tensor(SparseLayout(coding, 4, 256), 5, 40), values={**coding.to_obj(), **parameters})


@vector("invalid", "sparse values with scales for groups", "one scale a row")
def sparse_scale_group() -> bytes:
    return coded(scale_group=8)


@vector("invalid", "sparse values on an asymmetric grid", "no zero points")
def sparse_asymmetric() -> bytes:
    return coded(grid="asymmetric")


@vector("invalid", "sparse values on a grid that version 1 does not know", "grid 'uniform'")
def sparse_grid() -> bytes:
    return coded(grid="uniform")


@vector("invalid", "sparse values of 9 bits", "bits k = 9")
def sparse_9_bits() -> bytes:
    return one_tensor(SparseLayout(unchecked(Coding, 9), 4, 256), 5, 40)


@vector("invalid", "sparse values with scales of F16", "scale dtype 'F16'")
def sparse_scale_dtype() -> bytes:
    return coded(scale_dtype="F16")


@vector("invalid", "a sparse term, which draws nothing, has a seed", "has seed 0")
def sparse_seed() -> bytes:
    draft = Draft.of(one_tensor(SparseLayout("F32", 4, 256), *SMALL))
    draft.term["seed"] = 1
    return draft.build()


@vector("invalid", "more slots than the shape can need", "9 slots are more than 8")
def sparse_too_many_slots() -> bytes:
    return slots_of({(0, 8): 0}, [0, 9], *SMALL)


@vector("invalid", "the slots of the blocks do not start at 0: the first slot is of no block", "do not ascend from 0")
def sparse_starts() -> bytes:
    return slots_of({(0, 1): 0}, [1, 2], *SMALL)


@vector("invalid", "the slots of the blocks end before the last one, which is of no block", "do not ascend from 0")
def sparse_starts_end() -> bytes:
    return slots_of({(0, 0): 0}, [0, 1], *SMALL, slots=2)


@vector("invalid", "the slots of a block start behind those of the next", "do not ascend from 0")
def sparse_starts_descend() -> bytes:
    return slots_of({(0, 0): 0, (0, 1): 0, (0, 2): 0}, [0, 2, 1, 3], 4, 600)


@vector("invalid", "the gaps of a row lead beyond the last column", "beyond its block")
def sparse_beyond_columns() -> bytes:
    return slots_of({(1, 0): 8}, [0, 1], *SMALL)


@vector("invalid", "the gaps of a row lead beyond its block, into the next one", "beyond its block")
def sparse_beyond_block() -> bytes:
    # 17 fillers pass 255 columns.
    return slots_of({(0, 17): 1}, [0, 18, 18], 4, 300)


@vector("invalid", "two entries of a row, of which the second lies beyond the last column", "beyond its block")
def sparse_second_beyond_columns() -> bytes:
    return slots_of({(0, 0): 7, (0, 1): 0}, [0, 2], *SMALL)


@vector(
    "invalid", "the gaps of a row lead beyond the last column, in the second block, which is short", "beyond its block"
)
def sparse_beyond_columns_of_last_block() -> bytes:
    # Columns 256 to 259; three fillers pass 45 columns.
    return slots_of({(0, 0): 0, (1, 1): 4}, [0, 1, 2], 4, 260)


@vector("invalid", "a row that does not exist has an entry", "a row that does not exist has an entry")
def sparse_entry_of_no_row() -> bytes:
    return slots_of({(0, 0): 0, (4, 0): 0}, [0, 1], *SMALL)


@vector("invalid", "a row that does not exist has an entry in the last block", "a row that does not exist has an entry")
def sparse_entry_of_no_row_late() -> bytes:
    return slots_of({(0, 0): 0, (0, 1): 0, (31, 1): 0}, [0, 1, 2], 4, 300)


@vector("invalid", "the last slot of a block has no entry in any row", "a block has a slot that no row needs")
def sparse_unneeded_slot() -> bytes:
    return slots_of({(0, 0): 0}, [0, 2], *SMALL)


@vector("invalid", "the last slot of the first of two blocks has no entry in any row", "a slot that no row needs")
def sparse_unneeded_slot_of_first_block() -> bytes:
    return slots_of({(0, 0): 0, (0, 2): 0}, [0, 2, 3], 4, 300)


@vector("invalid", "a filler before an entry has a value", "a filler has a value")
def sparse_filler_value() -> bytes:
    return change_buffer(slots_of({(0, 1): 0}, [0, 2], 4, 40), "values", 2, 0x80)


@vector("invalid", "a filler has the value -0", "a filler has a value")
def sparse_filler_minus_zero() -> bytes:
    return change_buffer(slots_of({(0, 0): 0}, [0, 1], *SMALL), "values", 4 * 3 + 3, 0x80)


def an_entry(draft: Draft) -> tuple[int, int]:
    """Return lane and slot of the first entry of a term with gaps of 4 bits, of one tile."""
    _, offset, length = draft.term["buffers"]["gaps"]
    packed = np.frombuffer(bytes(draft.raw[0][offset : offset + length]), "<u4").reshape(1, -1, 32)
    gaps = words.unpack(packed, 32, draft.term["slots"], GAP_BITS)
    lane, slot = np.argwhere(gaps != FILLER)[0]
    return int(lane), int(slot)


def with_codes() -> bytes:
    """Return a file of codes of 4 bits midtread, 40 columns; row 0 is empty."""
    return one_tensor(SparseLayout(Coding(4), 4, 256), 5, 40)


@vector("invalid", "a filler has a code", "a filler has a value")
def sparse_filler_code() -> bytes:
    return change_buffer(with_codes(), "codes", 0, 0x03)


@vector("invalid", "a code of sparse values is beyond its grid", "the grid ends at 14")
def sparse_code_beyond_grid() -> bytes:
    data = with_codes()
    draft = Draft.of(data)
    lane, slot = an_entry(draft)
    place = 128 * (slot // 8) + 4 * lane + slot % 8 // 2
    code = draft.raw[0][draft.term["buffers"]["codes"][1] + place]
    return change_buffer(data, "codes", place, code | 15 << 4 * (slot % 2))


@vector("invalid", "unused bits of the last word of the gaps are set", "unused bits of the gaps")
def sparse_unused_bits() -> bytes:
    return change_buffer(slots_of({(0, 0): 0}, [0, 1], *SMALL), "gaps", 1, 0x01)


@vector("invalid", "unused bits of the first of two planes of gaps are set", "unused bits of the gaps")
def sparse_unused_bits_of_a_plane() -> bytes:
    data = one_tensor(SparseLayout("F32", 3, 256), 5, 20)
    # Planes of 2 bits and of 1; the lanes of the first plane's last word.
    used = 2 * Draft.of(data).term["slots"]
    assert used % 32
    return change_buffer(data, "gaps", 128 * (used // 32) + 4 * 31 + 3, 0x80)


@vector("invalid", "unused bits of the last word of the codes are set", "unused bits of the codes")
def sparse_unused_bits_of_codes() -> bytes:
    data = one_tensor(SparseLayout(Coding(4), 4, 256), 5, 30)
    draft = Draft.of(data)
    assert draft.term["slots"] % 8
    return change_buffer(data, "codes", draft.term["buffers"]["codes"][2] - 1, 0x10)


@vector("invalid", "a row that does not exist has a sparse scale", "unused bits of the scales")
def sparse_scale_of_no_row() -> bytes:
    return change_buffer(with_codes(), "scales", 2 * 5, 0x01)


@vector("invalid", "a scale of sparse values is negative", "negative or not finite")
def sparse_negative_scale() -> bytes:
    return change_buffer(with_codes(), "scales", 2 * 4 + 1, 0xBF)


@vector("invalid", "a scale of sparse values is -0, of a row without an entry", "negative or not finite")
def sparse_minus_zero_scale() -> bytes:
    return change_buffer(change_buffer(with_codes(), "scales", 0, 0), "scales", 1, 0x80)


VALUES = {"bf16": (2, b"\x80\xff"), "f16": (2, b"\x01\x7c"), "f32": (4, b"\x00\x00\xc0\x7f")}
for _dtype, (_size, _bytes) in VALUES.items():

    @vector("invalid", f"a value of {_dtype.upper()} is not finite", "is not finite", f"sparse-{_dtype}-not-finite")
    def _not_finite(dtype: str = _dtype, size: int = _size, bits: bytes = _bytes) -> bytes:
        draft = Draft.of(one_tensor(SparseLayout(dtype.upper(), 4, 256), 5, 40))
        _, offset, _ = draft.term["buffers"]["values"]
        lane, slot = an_entry(draft)
        place = offset + (32 * slot + lane) * size
        draft.raw[0][place : place + size] = bits
        return draft.build()
