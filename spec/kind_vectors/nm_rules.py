"""Vectors of the rules of ``nm`` terms: parameters, unused bits, positions, scales (section 11)."""

from __future__ import annotations

import numpy as np
from draft import Draft
from vector_tools import change_buffer, layout_is, one_tensor, unchecked, vector

from deltafmt.terms import words
from deltafmt.terms.nm.layout import NMLayout

SMALL = (4, 8)


@vector("invalid", "an nm layout that keeps no element", "N = 0 is outside 1 to M")
def nm_keeps_none() -> bytes:
    draft = Draft.of(one_tensor(NMLayout(1, 4, 4), *SMALL))
    draft.index["layouts"][0]["keep"] = 0
    buffers = draft.term["buffers"]
    scales = draft.raw[0][buffers["scales"][1] :]
    buffers.update(codes=[0, 0, 0], scales=[0, 0, buffers["scales"][2]])
    draft.raw[0] = scales
    return draft.build()


@vector("invalid", "an nm layout with groups of one column", "M = 1 is outside 2 to 255")
def nm_m_1() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 1, 4, "fixed"), *SMALL)


@vector("invalid", "an nm layout with groups of 256 columns", "M = 256 is outside 2 to 255")
def nm_m_256() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 256, 4, "fixed"), 2, 256)


@vector("invalid", "N is larger than M", "outside 1 to M")
def n_above_m() -> bytes:
    return one_tensor(unchecked(NMLayout, 9, 8, 4), 4, 16)


@vector("invalid", "a seeded index with M = 12", "power of two")
def seeded_m_12() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 12, 4), 4, 24)


@vector("invalid", "nm codes of 7 bits, which no kernel reads", "bits k = 7")
def nm_7_bits() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 4, 7), *SMALL)


@vector("invalid", "nm codes of 9 bits", "bits k = 9")
def nm_9_bits() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 4, 9), *SMALL)


@vector("invalid", "an index encoding that version 1 does not know", "index encoding 'drawn'")
def nm_index() -> bytes:
    return layout_is(one_tensor(NMLayout(1, 4, 4), *SMALL), index="drawn")


@vector("invalid", "an nm layout with an asymmetric grid, which only other kinds have", "grid 'asymmetric'")
def nm_grid() -> bytes:
    return layout_is(one_tensor(NMLayout(1, 4, 4, grid="midrise"), *SMALL), grid="asymmetric")


@vector("invalid", "a midtread grid of one bit", "midtread grid of 1 bit")
def nm_midtread_1_bit() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 4, 1), *SMALL)


@vector("invalid", "masks are shared by three rows", "share v = 3")
def nm_share_3() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 4, 4, share=3), *SMALL)


@vector("invalid", "masks are shared by 16 rows", "share v = 16")
def nm_share_16() -> bytes:
    return one_tensor(unchecked(NMLayout, 1, 4, 4, share=16), *SMALL)


@vector("invalid", "nm scales of F16", "scale dtype 'F16'")
def nm_scale_dtype() -> bytes:
    return layout_is(one_tensor(NMLayout(1, 4, 4), *SMALL), scale_dtype="F16")


@vector("invalid", "an nm scale group of 2**31", "scale group 2147483648")
def nm_scale_group() -> bytes:
    return layout_is(one_tensor(NMLayout(1, 4, 4), *SMALL), scale_group=1 << 31)


@vector("invalid", "an nm scale group of -1", "scale group -1")
def nm_scale_group_negative() -> bytes:
    return layout_is(one_tensor(NMLayout(1, 4, 4), *SMALL), scale_group=-1)


@vector("ok", "an nm scale group of 2**31 - 1, which is larger than the row")
def nm_scale_group_most() -> bytes:
    return one_tensor(NMLayout(1, 4, 4, scale_group=2**31 - 1), *SMALL)


@vector("invalid", "a rank index in a hot file", "a rank index stands in a hot file")
def rank_in_hot_file() -> bytes:
    draft = Draft.of(one_tensor(NMLayout(2, 4, 4, "rank"), *SMALL, "cold"))
    draft.index["profile"] = "hot"
    draft.index["sections"][0]["codec"] = 0
    return draft.build()


@vector("invalid", "a rank index whose ranks do not fit 64 bits", "C(M, N) below 2**64")
def rank_of_65_bits() -> bytes:
    return one_tensor(unchecked(NMLayout, 33, 68, 4, "rank"), 2, 68, "cold")


@vector("ok", "nm, N = M seeded: every element is kept, in an order that the seed gives")
def seeded_8_8_k4() -> bytes:
    return one_tensor(NMLayout(8, 8, 4, share=2), 5, 24)


@vector("ok", "nm, N = M with a rank index: ranks of no bits, and an index of no bytes")
def rank_8_8_cold() -> bytes:
    return one_tensor(NMLayout(8, 8, 4, "rank"), 5, 20, "cold")


@vector("ok", "nm, rank 1:7 in a cold file: an odd number of sets, three bits")
def rank_1_7_cold() -> bytes:
    return one_tensor(NMLayout(1, 7, 4, "rank", share=8), 70, 30, "cold")


# N, M and columns: more groups than one hash serves, for lanes of 4, 8 and 16 bits and for every M.
SEEDED = [(1, 2, 40), (1, 4, 80), (2, 4, 79), (1, 16, 300), (2, 8, 100), (4, 16, 300), (1, 32, 330), (1, 64, 640)]
SEEDED += [(2, 32, 320), (1, 128, 1280), (3, 64, 400), (5, 128, 700)]
for _n, _m, _columns in SEEDED:
    vector("ok", f"seeded {_n}:{_m} with more groups than one hash serves", name=f"seeded-{_n}-{_m}-many-groups")(
        lambda n=_n, m=_m, columns=_columns: one_tensor(NMLayout(n, m, 2), 3, columns)  # type: ignore[misc]
    )


@vector("ok", "seeded 1:4, masks shared by 8 rows, three super-tiles: 70 mask rows", name="seeded-1-4-super-tiles")
def seeded_super_tiles() -> bytes:
    return one_tensor(NMLayout(1, 4, 2, share=8), 555, 8)


@vector("ok", "seeded 1:128, masks shared by 2 rows, so many rows that a reader may decode them in runs")
def seeded_1_128_long() -> bytes:
    return one_tensor(NMLayout(1, 128, 1, grid="midrise", share=2), 900, 640)


@vector("ok", "seeded 1:4 with the highest seed: the arithmetic wraps", name="seeded-highest-seed")
def seeded_highest() -> bytes:
    return one_tensor(NMLayout(1, 4, 4, share=2), 9, 40, seed=2**32 - 1)


@vector("ok", "fixed 1:2, masks shared by 2 rows, one bit a position, two tiles of the index")
def fixed_1_2() -> bytes:
    return one_tensor(NMLayout(1, 2, 4, "fixed", share=2), 70, 70)


@vector("ok", "fixed 3:255: the largest M")
def fixed_3_255() -> bytes:
    return one_tensor(NMLayout(3, 255, 8, "fixed", scale_group=4), 3, 600)


def with_scales(dtype: str, scales: np.ndarray) -> bytes:
    """Return a file of six rows with these scales, midrise codes of two bits: -3, -1, 1 and 3 halves."""
    draft = Draft.of(one_tensor(NMLayout(1, 4, 2, grid="midrise", scale_dtype=dtype), 6, 32))
    _, offset, _ = draft.term["buffers"]["scales"]
    draft.raw[0][offset : offset + scales.nbytes] = scales.tobytes()
    return draft.build()


@vector("ok", "nm, scales that are subnormal or zero, and the largest one: half a scale is rounded, too")
def nm_subnormal_scales() -> bytes:
    return with_scales("BF16", np.array([0x0001, 0x0003, 0x007F, 0x0080, 0x0000, 0x7F7F], "<u2"))


@vector("ok", "nm, F32 scales that are subnormal or zero, and the largest one: half of the smallest one is zero")
def nm_subnormal_f32_scales() -> bytes:
    scales = [0x00000001, 0x00000003, 0x00800000, 0x00800001, 0x00000000, 0x7F7FFFFF]
    return with_scales("F32", np.array(scales, "<u4"))


def bad_scale(bits: int, dtype: str = "BF16") -> bytes:
    """Return a file of which one scale has these bits."""
    size = 2 if dtype == "BF16" else 4
    draft = Draft.of(one_tensor(NMLayout(1, 4, 4, scale_dtype=dtype), *SMALL))
    _, offset, _ = draft.term["buffers"]["scales"]
    draft.raw[0][offset + size : offset + 2 * size] = bits.to_bytes(size, "little")
    return draft.build()


SCALES = {
    "infinite": ("infinite", 0x7F80, 0x7F800000),
    "nan": ("not a number", 0x7FC0, 0x7F800001),
    "negative": ("negative", 0xBF80, 0xBF800000),
    "minus-zero": ("-0", 0x8000, 0x80000000),
}
for _name, (_what, _bf16, _f32) in SCALES.items():
    for _dtype, _bits in (("BF16", _bf16), ("F32", _f32)):
        _key = f"{_name}-scale" if _dtype == "BF16" else f"{_name}-f32-scale"
        vector("invalid", f"a scale of {_dtype} is {_what}", "negative or not finite", _key)(
            lambda bits=_bits, dtype=_dtype: bad_scale(bits, dtype)  # type: ignore[misc]
        )


@vector("invalid", "unused bits of the last word of a fixed index are set", "unused bits of the index")
def fixed_unused_bits() -> bytes:
    # 6 positions of 2 bits in a word.
    return change_buffer(one_tensor(NMLayout(1, 4, 4, "fixed"), 32, 24), "index", 2, 0x01)


@vector("invalid", "a mask row that does not exist has a word of a fixed index", "unused bits of the index")
def fixed_word_of_no_row() -> bytes:
    return change_buffer(one_tensor(NMLayout(1, 4, 4, "fixed", share=2), 6, 8), "index", 4 * 3, 0x01)


@vector("invalid", "unused bits of the last word of a rank index are set", "unused bits of the index")
def rank_unused_bits() -> bytes:
    # 2 ranks of 2 bits in a word.
    return change_buffer(one_tensor(NMLayout(1, 4, 4, "rank"), 32, 8, "cold"), "index", 1, 0x01)


@vector("invalid", "a mask row that does not exist has a rank", "unused bits of the index")
def rank_word_of_no_row() -> bytes:
    return change_buffer(one_tensor(NMLayout(1, 4, 4, "rank", share=2), 6, 8, "cold"), "index", 4 * 3, 0x01)


@vector("invalid", "two positions of a group are equal", "not ascending")
def positions_equal() -> bytes:
    return change_buffer(one_tensor(NMLayout(2, 16, 4, "fixed"), 32, 16), "index", 0, 0x33)


@vector("invalid", "the positions of a group descend, in the last group of the last row", "not ascending")
def positions_descend_late() -> bytes:
    # 34 rows of 3 groups: 6 positions of 4 bits in a word of row 33, lane 1 of tile 1.
    return change_buffer(one_tensor(NMLayout(2, 16, 4, "fixed"), 34, 48), "index", 128 + 4 + 2, 0x12)


@vector("invalid", "a rank is C(M, N)", "rank 6 is not below 6")
def rank_beyond() -> bytes:
    # 3 bits in planes of 2 and 1: word 0 and word 1 of the row.
    data = one_tensor(NMLayout(2, 4, 4, "rank"), 32, 4, "cold")
    return change_buffer(change_buffer(data, "index", 0, 0x02), "index", 128, 0x01)


def beyond(index: str, profile: str = "hot") -> bytes:
    """Return a file in which the entry beyond the last column, position 7 of 7 columns, has a code."""
    data = one_tensor(NMLayout(8, 8, 4, index), 32, 7, profile)
    return change_buffer(data, "codes", 3, 0x30 | (Draft.of(data).raw[0][3] & 0x0F))


@vector("invalid", "an entry of a fixed index beyond the last column has a field", "beyond the last column")
def field_beyond_columns_fixed() -> bytes:
    return beyond("fixed")


@vector("invalid", "an entry of a rank index beyond the last column has a field", "beyond the last column")
def field_beyond_columns_rank() -> bytes:
    return beyond("rank", "cold")


@vector("invalid", "an entry beyond the last column, in the last of three groups, row 69", "beyond the last column")
def field_beyond_columns_late() -> bytes:
    layout = NMLayout(4, 4, 4, "fixed", share=2)
    draft = Draft.of(one_tensor(layout, 70, 10))
    _, offset, length = draft.term["buffers"]["codes"]
    fields = words.unpack(np.frombuffer(draft.raw[0][offset : offset + length], "<u4").reshape(-1, 2, 32), 70, 12, 4, 2)
    fields = fields.copy()
    assert fields[69, 11] == 0
    fields[69, 11] = 5
    draft.raw[0][offset : offset + length] = words.pack(fields, 4, 2).tobytes()
    return draft.build()


@vector("invalid", "a word of a row that does not exist, in the second super-tile", "unused bits of the codes")
def word_of_no_row_late() -> bytes:
    # 37 rows: row 37 would be lane 5 of tile 1.
    return change_buffer(one_tensor(NMLayout(1, 4, 4), 37, 8), "codes", 128 + 4 * 5, 0x01)
