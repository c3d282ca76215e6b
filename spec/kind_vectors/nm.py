"""The vectors of ``nm`` terms, good and bad."""

from __future__ import annotations

import io

import numpy as np
from vector_tools import POSITIONS, change_buffer, fields, makes_arrays, makes_positions, one_tensor, simple, vector

from deltafmt.delta import DeltaFile
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.hashing import seeded
from deltafmt.terms.nm.index.codec import Positions
from deltafmt.terms.nm.layout import NMLayout


@makes_positions("seeded")
def drawn_positions(layout: NMLayout, seed: int, mask_rows: int, groups: int) -> Positions:
    """Return the positions that a seed gives."""
    return seeded(seed, 0, mask_rows, groups, layout.n, layout.m)


def any_positions(layout: NMLayout, seed: int, mask_rows: int, groups: int) -> Positions:  # noqa: ARG001
    """Return made-up positions in order."""
    keys = np.arange(mask_rows * groups * layout.m, dtype=np.uint64) * 0x9E3779B97F4A7C15 >> np.uint64(20)
    order = np.argsort(keys.reshape(mask_rows, groups, layout.m), axis=2, kind="stable")
    return np.sort(order[:, :, : layout.n], axis=2).astype(np.uint8)


@makes_arrays("nm")
def arrays(layout: NMLayout, rows: int, columns: int, seed: int) -> nm.NMArrays:
    """Return made-up content of an ``nm`` term."""
    groups, kept = layout.groups(columns), layout.kept(columns)
    mask_rows = layout.mask_rows(rows)
    positions = POSITIONS.get(layout.index, any_positions)(layout, seed, mask_rows, groups)
    codes = fields(rows * kept, layout.top, seed).reshape(rows, kept)
    scales = (1 + np.arange(rows * layout.scales_per_row(columns), dtype=np.float32)) / 256
    arrays = nm.NMArrays(positions, codes, scales.reshape(rows, -1))
    arrays.codes[nm.outside(layout, arrays, columns)] = 0
    return arrays


@vector("ok", "seeded 4:16, 4 bits midtread, masks shared by 4 rows, ragged rows")
def seeded_4_16_k4() -> bytes:
    return one_tensor(NMLayout(4, 16, 4, share=4), 70, 64)


@vector("ok", "seeded 1:32, 4 bits: one position a group needs 8 bits of a hash")
def seeded_1_32_k4() -> bytes:
    return one_tensor(NMLayout(1, 32, 4, share=1), 33, 100)


@vector("ok", "seeded 2:128, 8 bits, masks shared by 8 rows: 16 bits of a hash a group")
def seeded_2_128_k8() -> bytes:
    return one_tensor(NMLayout(2, 128, 8, share=8), 9, 300)


@vector("ok", "seeded 1:8, 1 bit midrise: 4 bits of a hash a group")
def seeded_1_8_k1() -> bytes:
    return one_tensor(NMLayout(1, 8, 1, grid="midrise", share=4), 64, 128)


@vector("ok", "seeded 2:16, 2 bits midrise, F32 scales for every 5 entries")
def seeded_2_16_k2_groups() -> bytes:
    return one_tensor(NMLayout(2, 16, 2, grid="midrise", share=2, scale_dtype="F32", scale_group=5), 35, 70)


@vector("ok", "fixed 3:7, 3 bits: M is no power of two, codes and positions in planes of 2 and 1 bits")
def fixed_3_7_k3() -> bytes:
    return one_tensor(NMLayout(3, 7, 3, "fixed", share=2), 37, 45)


@vector("ok", "fixed 5:100, 6 bits, two super-tiles of 128 rows: planes of 4 and 2 bits, of positions 4, 2 and 1")
def fixed_5_100_k6_super_tiles() -> bytes:
    return one_tensor(NMLayout(5, 100, 6, "fixed", share=4, scale_group=4), 130, 320)


@vector("ok", "fixed 16:16, 5 bits: every element is kept")
def fixed_16_16_k5() -> bytes:
    return one_tensor(NMLayout(16, 16, 5, "fixed"), 3, 32)


@vector("ok", "rank 4:16, 6 bits, in a cold file")
def rank_4_16_k6_cold() -> bytes:
    return one_tensor(NMLayout(4, 16, 6, "rank", share=4), 40, 100, "cold")


@vector("ok", "rank 31:66: ranks of 63 bits, in six planes")
def rank_31_66_cold() -> bytes:
    return one_tensor(NMLayout(31, 66, 2, "rank", grid="midrise"), 2, 140, "cold")


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


@vector("invalid", "the positions of a group do not ascend", "not ascending")
def positions_descend() -> bytes:
    data = one_tensor(NMLayout(2, 16, 4, "fixed"), 32, 16)
    return change_buffer(data, "index", 0, 0x00)


@vector("invalid", "a position is not below M", "not ascending and below 7")
def position_above_m() -> bytes:
    # 3 bits in planes of 2 and 1: word 0 and word 1 of the row.
    data = one_tensor(NMLayout(1, 7, 4, "fixed"), 32, 7)
    return change_buffer(change_buffer(data, "index", 0, 0x03), "index", 128, 0x01)
