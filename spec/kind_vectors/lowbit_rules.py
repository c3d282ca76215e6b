"""Vectors of the rules of ``lowbit`` terms that no other file has: parameters, unused bits, scales (section 12)."""

from __future__ import annotations

from draft import Draft
from vector_tools import change_buffer, layout_is, one_tensor, unchecked, vector

from deltafmt.terms.lowbit.layout import LowbitLayout

SMALL = (4, 8)


@vector("ok", "lowbit 2 bits midtread, one scale a row, columns that fill words")
def lowbit_k2() -> bytes:
    return one_tensor(LowbitLayout(2), 32, 64)


@vector("ok", "lowbit 4 bits midrise, scales for every column, two tiles")
def lowbit_k4_single_groups() -> bytes:
    return one_tensor(LowbitLayout(4, "midrise", "BF16", 1), 33, 9)


@vector("ok", "lowbit 5 bits asymmetric, F32 scales, a scale group larger than the row")
def lowbit_k5_large_group() -> bytes:
    return one_tensor(LowbitLayout(5, "asymmetric", "F32", 2**31 - 1), 40, 13)


@vector("ok", "lowbit 6 bits midtread, scales of columns in F32, two tiles")
def lowbit_k6_columns() -> bytes:
    return one_tensor(LowbitLayout(6, "midtread", "F32", axis="column"), 34, 11)


@vector("ok", "lowbit 8 bits asymmetric, scales for every 7 columns: codes less zero points have either sign")
def lowbit_k8_zero_points() -> bytes:
    return one_tensor(LowbitLayout(8, "asymmetric", "BF16", 7), 35, 33)


@vector("ok", "lowbit 8 bits midtread, one element")
def lowbit_k8_one_element() -> bytes:
    return one_tensor(LowbitLayout(8), 1, 1)


@vector("ok", "lowbit, F32 scales whose products with codes are rounded, subnormal ones among them")
def lowbit_rounded() -> bytes:
    draft = Draft.of(one_tensor(LowbitLayout(7, "midrise", "F32"), 4, 70))
    _, offset, _ = draft.term["buffers"]["scales"]
    for row, bits in enumerate((0x3DCCCCCD, 0x00000007, 0x01000001, 0x3EAAAAAB)):
        place = offset + 4 * row
        draft.raw[0][place : place + 4] = bits.to_bytes(4, "little")
    return draft.build()


@vector("invalid", "a lowbit layout of 9 bits", "bits k = 9")
def lowbit_9_bits() -> bytes:
    return one_tensor(unchecked(LowbitLayout, 9), *SMALL)


@vector("invalid", "a lowbit layout of no bits: a matrix of one value a row", "bits k = 0")
def lowbit_0_bits() -> bytes:
    draft = Draft.of(one_tensor(LowbitLayout(1, "midrise"), *SMALL))
    draft.index["layouts"][0]["bits"] = 0
    buffers = draft.term["buffers"]
    draft.raw[0] = draft.raw[0][buffers["scales"][1] :]
    buffers.update(codes=[0, 0, 0], scales=[0, 0, buffers["scales"][2]])
    return draft.build()


@vector("invalid", "a grid that version 1 does not know", "grid 'uniform'")
def lowbit_grid() -> bytes:
    return layout_is(one_tensor(LowbitLayout(4, "midrise"), *SMALL), grid="uniform")


@vector("invalid", "a lowbit layout with a midtread grid of one bit", "midtread grid of 1 bit")
def lowbit_midtread_1_bit() -> bytes:
    return one_tensor(unchecked(LowbitLayout, 1), *SMALL)


@vector("invalid", "lowbit scales of F16", "scale dtype 'F16'")
def lowbit_scale_dtype() -> bytes:
    return layout_is(one_tensor(LowbitLayout(4), *SMALL), scale_dtype="F16")


@vector("invalid", "a lowbit scale group of 2**31", "scale group 2147483648")
def lowbit_scale_group() -> bytes:
    return layout_is(one_tensor(LowbitLayout(4), *SMALL), scale_group=1 << 31)


@vector("invalid", "scales of an axis that version 1 does not know", "axis 'rows'")
def lowbit_axis() -> bytes:
    return layout_is(one_tensor(LowbitLayout(4), *SMALL), axis="rows")


@vector("invalid", "an asymmetric grid with scales of columns", "an asymmetric grid has its scales along rows")
def lowbit_asymmetric_columns() -> bytes:
    draft = Draft.of(one_tensor(LowbitLayout(4, "midrise", axis="column"), *SMALL))
    draft.index["layouts"][0]["grid"] = "asymmetric"
    draft.raw[0] += bytes(-len(draft.raw[0]) % 256) + bytes(8)
    draft.term["buffers"]["zero_points"] = [0, len(draft.raw[0]) - 8, 8]
    return draft.build()


@vector("invalid", "unused bits of a lowbit row's last word are set", "unused bits of the codes")
def lowbit_unused_bits() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(4), 32, 7), "codes", 3, 0x10)


@vector(
    "invalid", "the highest bit of a lowbit row's last word is set, which no field uses", "unused bits of the codes"
)
def lowbit_highest_unused_bit() -> bytes:
    draft = Draft.of(one_tensor(LowbitLayout(4), 32, 7))
    return change_buffer(draft.build(), "codes", 3, draft.raw[0][3] | 0x80)


@vector("invalid", "unused bits of a lowbit row in the second tile are set", "unused bits of the codes")
def lowbit_unused_bits_of_second_tile() -> bytes:
    draft = Draft.of(one_tensor(LowbitLayout(4), 33, 7))
    return change_buffer(draft.build(), "codes", 128 + 3, draft.raw[0][128 + 3] | 0x10)


@vector("invalid", "unused bits of the second of two planes are set", "unused bits of the codes")
def lowbit_unused_bits_of_last_plane() -> bytes:
    draft = Draft.of(one_tensor(LowbitLayout(3), 32, 15))
    return change_buffer(draft.build(), "codes", 128 + 1, draft.raw[0][128 + 1] | 0x80)


@vector("invalid", "unused bits of the first of two planes are set", "unused bits of the codes")
def lowbit_unused_bits_of_a_plane() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(3), 32, 15), "codes", 3, 0x40)


@vector("invalid", "a row that does not exist has a lowbit word", "unused bits of the codes")
def lowbit_word_of_no_row() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(4), *SMALL), "codes", 4 * 4, 0x01)


@vector("invalid", "a row that does not exist has a lowbit scale", "unused bits of the scales")
def lowbit_scale_of_no_row() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(4), *SMALL), "scales", 2 * 4, 0x01)


@vector("invalid", "a row that does not exist has a lowbit scale of its second group", "unused bits of the scales")
def lowbit_scale_of_no_row_later() -> bytes:
    return change_buffer(one_tensor(LowbitLayout(4, scale_group=4), 4, 8), "scales", 2 * (32 + 31), 0x01)


@vector("invalid", "a lowbit scale is infinite, in the last row's last group", "negative or not finite")
def lowbit_infinite_scale() -> bytes:
    data = one_tensor(LowbitLayout(4, scale_group=4), 32, 8)
    return change_buffer(change_buffer(data, "scales", 126, 0x80), "scales", 127, 0x7F)


@vector("invalid", "a lowbit scale is -0", "negative or not finite")
def lowbit_minus_zero_scale() -> bytes:
    return change_buffer(change_buffer(one_tensor(LowbitLayout(4), *SMALL), "scales", 0, 0), "scales", 1, 0x80)


@vector("invalid", "a field of 2**k - 1 on a midtread grid, in the last of 33 rows", "the grid ends at 2")
def lowbit_field_beyond_grid_late() -> bytes:
    # Tile 1 is the last 128 bytes of a word; row 32 is its lane 0, field 15 the upper bits.
    data = one_tensor(LowbitLayout(2), 33, 16)
    found = Draft.of(data).raw[0][128 + 3]
    return change_buffer(data, "codes", 128 + 3, found | 0xC0)
