"""The sparse kernel: few tokens, every entry multiplied with the activation that its gap leads to (spec, section 14).

A program is one warp and takes a tile of T tokens of one delta and a tile of 32 rows of one part, a lane each. It goes
through the tile's slots, some at a time: the sum of a lane's gaps up to a slot is where its entry stands, and x is
gathered there. Slots of one block follow each other; every block starts anew at its first column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import (
    add_token,
    load_address,
    load_tile,
    load_words,
    record_of,
    select_part,
    token_pointers,
)
from deltafmt.kernels.sparse.kind import RECORD

FIELDS = tl.constexpr(len(RECORD))
VALUES = tl.constexpr(RECORD.offset("values"))
GAPS = tl.constexpr(RECORD.offset("gaps"))
SCALES = tl.constexpr(RECORD.offset("scales"))
STARTS = tl.constexpr(RECORD.offset("starts"))
SLOT_COUNT = tl.constexpr(RECORD.offset("slots"))
ROWS = tl.constexpr(RECORD.offset("rows"))


@triton.jit
def read_plane(p_words, slot, m, WIDTH: tl.constexpr):
    """Return one plane's part of the fields of some slots, int32, shape (slots, 32)."""
    PER_WORD: tl.constexpr = 32 // WIDTH
    word = tl.load(p_words + (slot // PER_WORD * 32)[:, None], mask=m, other=0).to(tl.uint32, bitcast=True)
    return ((word >> (slot % PER_WORD * WIDTH)[:, None].to(tl.uint32)) & ((1 << WIDTH) - 1)).to(tl.int32)


@triton.jit
def read_fields(
    p_words, slots, slot, m, PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr
):  # fmt: skip
    """Return the fields of some slots of a word stream of one tile, which has ``slots`` of them."""
    field = read_plane(p_words, slot, m, PLANE0)
    if PLANE1 > 0:
        p_words += tl.cdiv(slots * PLANE0, 32) * 32
        field |= read_plane(p_words, slot, m, PLANE1) << PLANE0
    if PLANE2 > 0:
        p_words += tl.cdiv(slots * PLANE1, 32) * 32
        field |= read_plane(p_words, slot, m, PLANE2) << (PLANE0 + PLANE1)
    return field


@triton.jit(do_not_specialize=["block1", "block2"])
def sparse_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2, columns, blocks, span,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    GAP0: tl.constexpr, GAP1: tl.constexpr, GAP2: tl.constexpr, FILLER: tl.constexpr,
    PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr, TOP: tl.constexpr, DTYPE: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one tile of tokens and 32 rows; PLANE0 is 0 where values are stored as they are."""
    owner, first, count = load_tile(tiles_ptr, tl.program_id(1))
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_of(records_ptr, owner, part, PARTS, FIELDS)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    if block * 32 >= rows:
        return
    slots = tl.load(p_record + SLOT_COUNT)
    lane = tl.arange(0, 32)
    row = block * 32 + lane
    p_gaps = load_words(p_record, GAPS) + lane[None, :]
    p_starts = load_words(p_record, STARTS) + block.to(tl.int64) * blocks
    p_x = token_pointers(x_ptr, x_stride, order_ptr, first, count, TOKENS)
    total = ()
    for _ in tl.static_range(TOKENS):
        total = total + (tl.zeros([32], tl.float32),)
    for i_block in range(blocks):
        start = tl.load(p_starts + i_block).to(tl.uint32, bitcast=True).to(tl.int64)
        stop = tl.load(p_starts + i_block + 1).to(tl.uint32, bitcast=True).to(tl.int64)
        after = tl.zeros([32], tl.int32) + i_block * span
        for some in range(start, tl.minimum(stop, slots), SLOTS):
            slot = some + tl.arange(0, SLOTS).to(tl.int64)
            m = (slot < stop)[:, None] & (slot < slots)[:, None] & (row < rows)[None, :]
            gap = read_fields(p_gaps, slots, slot, m, GAP0, GAP1, GAP2)
            gap = tl.where(m, gap, FILLER)
            ends = tl.cumsum(gap + (gap != FILLER), 0)
            column = after[None, :] + ends - 1
            m &= (gap != FILLER) & (column >= 0) & (column < columns)
            if PLANE0 == 0:
                p_values = load_address(p_record, VALUES, DTYPE) + lane[None, :]
                value = tl.load(p_values + (slot * 32)[:, None], mask=m, other=0).to(tl.float32)
            else:
                p_codes = load_words(p_record, VALUES) + lane[None, :]
                code = read_fields(p_codes, slots, slot, m, PLANE0, PLANE1, PLANE2)
                value = (2 * code - TOP).to(tl.float32)
            new_total = ()
            for t in tl.static_range(TOKENS):
                x = tl.load(p_x[t] + column, mask=m, other=0).to(tl.float32)
                new_total = new_total + (total[t] + tl.sum(value * x, 0),)
            total = new_total
            after += tl.sum(gap + (gap != FILLER), 0)
    m_rows = row < rows
    if PLANE0 == 0:
        scale = 1.0
    else:
        scale = tl.load(load_address(p_record, SCALES, DTYPE) + row, mask=m_rows, other=0).to(tl.float32) * 0.5
    for t in tl.static_range(TOKENS):
        add_token(y_ptr, y_stride, order_ptr, first, t, count, row, m_rows, total[t] * scale)
