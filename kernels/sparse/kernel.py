"""The sparse kernel: few tokens, every entry multiplied with the activation that its gap leads to (spec, section 14).

``y[r] += scale[r] * sum over the entries e of row r of value(r, e) * x[column(r, e)]``. A row is a sequence of slots
(in this file, a slot is never a delta's). A slot has a value and a gap: the columns between the entry before and this
one. So a column is a running sum of gaps. A gap of FILLER means: no entry, skip FILLER columns. The columns are cut
into blocks of ``span``; in each block the sum starts anew at the block's first column. The 32 rows of tile i have the
same slots in block j: from ``starts[i * blocks + j]`` up to the next start.

A program is one warp. It owns a token tile of up to TOKENS tokens of one delta, and the 32 rows of one tile of one
part, a lane each. It goes through the tile's slots in steps of 32, which are whole words of every plane of gaps and
codes; word w of all lanes is 128 adjacent bytes. A step at the edge of a block has slots of another block too: these
are made fillers, a word at a time, before the fields are taken apart.

Here a code becomes a float by lying behind the point of a 1: with k bits it is ``1 + u / 2**k``. Subtracting one
constant leaves ``(u - TOP / 2) / 2**k``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import (
    add_token,
    load_address,
    load_token_tile,
    load_words,
    record_address,
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
def load_step(p_words, step, slots, start, WIDTH: tl.constexpr):
    """Return one plane's words of the 32 slots of a step, each uint32 (32,); the plane begins at word ``start``."""
    loaded = ()
    if WIDTH > 0:
        words = tl.cdiv(slots * WIDTH, 32)
        p_step = p_words + (start + step * WIDTH) * 32
        for n in tl.static_range(WIDTH):
            word = tl.load(p_step + n * 32, mask=step * WIDTH + n < words, other=0)
            loaded = loaded + (word.to(tl.uint32, bitcast=True),)
    return loaded


@triton.jit
def load_planes(p_words, step, slots, PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr):
    """Return the words of the 32 slots of a step, the planes one after the other."""
    start1 = tl.cdiv(slots * PLANE0, 32)
    start2 = start1 + tl.cdiv(slots * PLANE1, 32)
    return (
        load_step(p_words, step, slots, 0, PLANE0)
        + load_step(p_words, step, slots, start1, PLANE1)
        + load_step(p_words, step, slots, start2, PLANE2)
    )


@triton.jit
def outside(first, stop, n, WIDTH: tl.constexpr):
    """Return the bits of a plane's n-th word of a step whose slots are before ``first`` or from ``stop`` on."""
    PER_WORD: tl.constexpr = 32 // WIDTH
    low = tl.minimum(tl.maximum(first - n * PER_WORD, 0), PER_WORD) * WIDTH
    high = tl.minimum(tl.maximum(stop - n * PER_WORD, 0), PER_WORD) * WIDTH
    one = tl.full([], 1, tl.uint64)
    inside = (one << high.to(tl.uint64)) - (one << tl.minimum(low, high).to(tl.uint64))
    return inside.to(tl.uint32) ^ 0xFFFFFFFF


@triton.jit
def fill_outside(gaps, first, stop, PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr):
    """Return the words of a step's gaps with fillers in the slots before ``first`` and from ``stop`` on."""
    filled = ()
    for n in tl.static_range(PLANE0):
        filled = filled + (gaps[n] | outside(first, stop, n, PLANE0),)
    for n in tl.static_range(PLANE1):
        filled = filled + (gaps[PLANE0 + n] | outside(first, stop, n, PLANE1),)
    for n in tl.static_range(PLANE2):
        filled = filled + (gaps[PLANE0 + PLANE1 + n] | outside(first, stop, n, PLANE2),)
    return filled


@triton.jit
def plane_field(words, AT: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr, PLACE: tl.constexpr):
    """Return the part of a slot's field that one plane holds, from bit PLACE on; the plane's words begin at AT."""
    FOUND: tl.constexpr = SLOT * WIDTH % 32
    word = words[AT + SLOT * WIDTH // 32]
    if FOUND < PLACE:
        word = word << (PLACE - FOUND)
    else:
        word = word >> (FOUND - PLACE)
    return word & (((1 << WIDTH) - 1) << PLACE)


@triton.jit
def field_of(
    words, SLOT: tl.constexpr, PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr, PLACE: tl.constexpr
):  # fmt: skip
    """Return the field of a step's slot from bit PLACE on, uint32 (32,)."""
    field = plane_field(words, 0, SLOT, PLANE0, PLACE)
    if PLANE1 > 0:
        field |= plane_field(words, PLANE0, SLOT, PLANE1, PLACE + PLANE0)
    if PLANE2 > 0:
        field |= plane_field(words, PLANE0 + PLANE1, SLOT, PLANE2, PLACE + PLANE0 + PLANE1)
    return field


@triton.jit(do_not_specialize=["block1", "block2"])
def sparse_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2, columns, blocks, span,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    GAP0: tl.constexpr, GAP1: tl.constexpr, GAP2: tl.constexpr, FILLER: tl.constexpr,
    PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr, TOP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one token tile and 32 rows; see the module's docstring.

    Args:
        x_ptr, ..., columns: tokens, outputs and blocks, as for all product kernels (``launch_arguments.py``).
        blocks, span: blocks of columns in a row, and columns of a block.
        GAP0, GAP1, GAP2: bits of a gap in each of its planes; 0: there is no such plane.
        PLANE0, PLANE1, PLANE2: the same of codes; PLANE0 is 0 if values are stored as floats of DTYPE.
    """
    BITS: tl.constexpr = PLANE0 + PLANE1 + PLANE2
    delta, first, count = load_token_tile(tiles_ptr, tl.program_id(1))
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_address(records_ptr, delta, part, PARTS, FIELDS)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    if block * 32 >= rows:
        return
    slots = tl.load(p_record + SLOT_COUNT)
    lane = tl.arange(0, 32)
    row = block * 32 + lane
    p_gaps = load_words(p_record, GAPS) + lane
    p_starts = load_words(p_record, STARTS) + block.to(tl.int64) * blocks
    p_x = token_pointers(x_ptr, x_stride, order_ptr, first, count, TOKENS)
    total = ()
    for _ in tl.static_range(TOKENS):
        total = total + (tl.zeros([32], tl.float32),)
    for i_block in range(blocks):
        start = tl.load(p_starts + i_block).to(tl.uint32, bitcast=True).to(tl.int64)
        stop = tl.minimum(tl.load(p_starts + i_block + 1).to(tl.uint32, bitcast=True).to(tl.int64), slots)
        # The slots of the first step that come before the block's are made fillers, which skip FILLER columns each.
        before = (start % 32).to(tl.int32) * FILLER
        column = tl.zeros([32], tl.int32) + (i_block * span - before - 1)
        for step in range(start // 32, tl.cdiv(stop, 32)):
            gaps = load_planes(p_gaps, step, slots, GAP0, GAP1, GAP2)
            if PLANE0 > 0:
                codes = load_planes(load_words(p_record, VALUES) + lane, step, slots, PLANE0, PLANE1, PLANE2)
            if (step * 32 < start) | (step * 32 + 32 > stop):
                gaps = fill_outside(
                    gaps, (start - step * 32).to(tl.int32), (stop - step * 32).to(tl.int32), GAP0, GAP1, GAP2
                )
            for s in tl.static_range(32):
                gap = field_of(gaps, s, GAP0, GAP1, GAP2, 0).to(tl.int32)
                # An entry's gap does not count its own column, a filler's counts all that it skips.
                column += tl.minimum(gap + 1, FILLER)
                m = (gap != FILLER) & (column.to(tl.uint32, bitcast=True) < columns.to(tl.uint32))
                if PLANE0 == 0:
                    p_value = load_address(p_record, VALUES, DTYPE) + lane + step * 1024 + s * 32
                    value = tl.load(p_value, mask=m, other=0).to(tl.float32)
                else:
                    one = field_of(codes, s, PLANE0, PLANE1, PLANE2, 23 - BITS) | 0x3F800000
                    value = one.to(tl.float32, bitcast=True) - (1 + 0.5 * TOP / (1 << BITS))
                new_total = ()
                for t in tl.static_range(TOKENS):
                    x = tl.load(p_x[t] + column, mask=m, other=0).to(tl.float32)
                    new_total = new_total + (tl.fma(value, x, total[t]),)
                total = new_total
    m_rows = row < rows
    if PLANE0 == 0:
        scale = 1.0
    else:
        scale = tl.load(load_address(p_record, SCALES, DTYPE) + row, mask=m_rows, other=0).to(tl.float32) * (1 << BITS)
    for t in tl.static_range(TOKENS):
        add_token(y_ptr, y_stride, order_ptr, first, t, count, row, m_rows, total[t] * scale)
