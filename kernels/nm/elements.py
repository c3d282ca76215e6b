"""Reading an ``nm`` term in kernels one kept element at a time, and the product that does so for any layout.

``y[r] += sum over the kept elements e of value(r, e) * x[column(r, e)]``. A program owns a token tile and BLOCK_ROWS
rows of one part, and reads ELEMENTS kept elements of each row in a turn: blocks of the shape (ELEMENTS, BLOCK_ROWS), in
which each place loads its own word, position and x from global memory. The gather kernel does the same faster, for
layouts whose steps can be unrolled.
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
    token_of,
    zeros_tuple,
)
from deltafmt.kernels.nm.fields import load_field
from deltafmt.kernels.nm.positions import load_position
from deltafmt.kernels.nm.record_fields import CODES, FIELDS, INDEX_WORDS, ROWS, SCALES, SEED


@triton.jit
def load_code(
    codes_ptr, row, element, kept, code_words, mask, BITS: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr
):
    """Section 11.5: return ``2u - top`` of each element, float32."""
    tile = (row // (32 * SHARE)) * SHARE + row % SHARE
    lane = (row % (32 * SHARE)) // SHARE
    p_words = codes_ptr + tile.to(tl.int64) * code_words * 32 + lane
    u = load_field(p_words, element, mask, BITS, kept)
    return (u.to(tl.int32) * 2 - TOP).to(tl.float32)


@triton.jit
def load_scale(scales_ptr, row, number, scales, mask, SHARE: tl.constexpr):
    """Section 11.3: return half of scale ``number`` of each row, float32."""
    tile = (row // (32 * SHARE)) * SHARE + row % SHARE
    lane = (row % (32 * SHARE)) // SHARE
    scale = tl.load(scales_ptr + (tile.to(tl.int64) * scales + number) * 32 + lane, mask=mask, other=0)
    return scale.to(tl.float32) * 0.5


@triton.jit(do_not_specialize=["block1", "block2"])
def element_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2,
    columns, kept, code_words, index_words, scale_group, scales,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr,
    SCALE: tl.constexpr, INDEX: tl.constexpr, INDEX_BITS: tl.constexpr, POSITION_BITS: tl.constexpr,
    SCALED: tl.constexpr, ELEMENTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one token tile and one block of rows, for layouts that are not unrolled."""
    slot, first, count = load_token_tile(tiles_ptr, tl.program_id(1))
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_address(records_ptr, slot, part, PARTS, FIELDS)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    if block * BLOCK_ROWS >= rows:
        return
    codes_ptr = load_words(p_record, CODES)
    index_ptr = load_words(p_record, INDEX_WORDS)
    scales_ptr = load_address(p_record, SCALES, SCALE)
    seed = tl.load(p_record + SEED).to(tl.uint32)
    row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[None, :]
    acc = zeros_tuple(TOKENS, ELEMENTS, BLOCK_ROWS)
    for start in range(0, kept, ELEMENTS):
        element = (start + tl.arange(0, ELEMENTS))[:, None]
        m = (element < kept) & (row < rows)
        position = load_position(
            index_ptr, seed, row // SHARE, element, kept, index_words, m, N, M, INDEX, INDEX_BITS, POSITION_BITS
        )
        value = load_code(codes_ptr, row, element, kept, code_words, m, BITS, SHARE, TOP)
        if SCALED:
            value *= load_scale(scales_ptr, row, element // scale_group, scales, m, SHARE)
        column = element // N * M + position
        m = m & (position < M) & (column < columns)
        new = ()
        for t in tl.static_range(TOKENS):
            token = token_of(order_ptr, first, t, count)
            x = tl.load(x_ptr + token * x_stride + column, mask=m, other=0).to(tl.float32)
            new = new + (acc[t] + x * value,)
        acc = new
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for t in tl.static_range(TOKENS):
        y = tl.sum(acc[t], 0)
        if not SCALED:
            y *= load_scale(scales_ptr, row, 0, 1, row < rows, SHARE)
        add_token(y_ptr, y_stride, order_ptr, first, t, count, row, row < rows, y)
