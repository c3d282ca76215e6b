"""The gather kernel: few tokens, each kept element multiplied with the activation that its position names.

A program takes a tile of T tokens of one delta and ``MASK_ROWS * SHARE`` rows of one part. It walks over the columns in
chunks: x of the chunk goes to shared memory, positions become indices into it, and every gathered x meets the codes of
the ``SHARE`` rows that keep the same positions. Lanes of a warp are consecutive mask rows inside one group of columns,
so a warp's words are 128 adjacent bytes and its gathers hit M adjacent elements of x.

A code is never converted: field u at bit b of a word, masked and read as a float32, is the denormal
``u * 2**(b - 149)``. With x scaled by 2**64 the product is a normal number, one multiply-add away; fields at different
bits have accumulators of their own (``CLASSES`` of them a plane), weighted at the end.
``value = (2u - top) * scale / 2`` then leaves ``y = scale * (sum of u * x - top / 2 * sum of x)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import (
    TWO_64,
    add_token,
    load_address,
    load_tile,
    load_words,
    record_of,
    select_part,
    token_pointers,
    zeros_tuple,
)
from deltafmt.kernels.nm.fields import load_planes
from deltafmt.kernels.nm.positions import chunk_positions, row_index
from deltafmt.kernels.nm.record_fields import CODES, FIELDS, INDEX_WORDS, ROWS, SCALES, SEED


@triton.jit
def pick(x, i: tl.constexpr):
    """Return slice i of the first axis, which lies in registers: the compiler folds the selection away."""
    bits = tl.where((tl.arange(0, x.shape[0]) == i)[:, None, None], x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(x.dtype, bitcast=True)


@triton.jit
def multiply_plane(
    acc, gathered, loaded, AT: tl.constexpr, ELEMENTS: tl.constexpr, WIDTH: tl.constexpr, CLASSES: tl.constexpr
):
    """Return the CLASSES accumulators that begin at AT, each gathered x times its field of one plane added."""
    SHIFTS: tl.constexpr = 32 // WIDTH // CLASSES
    out = ()
    for c in tl.static_range(CLASSES):
        a = acc[AT + c]
        for e in tl.static_range(ELEMENTS // CLASSES):
            shifted = loaded[e // SHIFTS] >> (e % SHIFTS * CLASSES * WIDTH)
            field = shifted & (((1 << WIDTH) - 1) << (c * WIDTH))
            a = tl.fma(field.to(tl.float32, bitcast=True), pick(gathered, e * CLASSES + c), a)
        out = out + (a,)
    return out


@triton.jit(do_not_specialize=["block1", "block2"])
def gather_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2,
    columns, groups, code_words, words0, words1, index_words, places0, places1, places2,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, LOG_M: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
    INDEX: tl.constexpr, INDEX_BITS: tl.constexpr, PLANE0: tl.constexpr, CLASSES0: tl.constexpr, PLANE1: tl.constexpr,
    CLASSES1: tl.constexpr, ELEMENTS: tl.constexpr, STEPS: tl.constexpr, MASK_ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one tile of tokens and one block of rows; see the module's docstring."""
    GROUPS: tl.constexpr = ELEMENTS // N
    CHUNK: tl.constexpr = (STEPS * GROUPS) << LOG_M
    CLASSES: tl.constexpr = CLASSES0 + CLASSES1
    slot, first, count = load_tile(tiles_ptr, tl.program_id(1))
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_of(records_ptr, slot, part, PARTS, FIELDS)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    if block * (MASK_ROWS * SHARE) >= rows:
        return
    codes_ptr = load_words(p_record, CODES)
    scales_ptr = load_address(p_record, SCALES, SCALE)

    mask_row = block * MASK_ROWS + tl.arange(0, MASK_ROWS)
    m_rows = mask_row * SHARE < rows
    o_tile = (mask_row // 32).to(tl.int64) * (SHARE * 32)
    p_codes = codes_ptr + o_tile * code_words + mask_row % 32
    scales = ()
    for v in tl.static_range(SHARE):
        scales = scales + (tl.load(scales_ptr + o_tile + v * 32 + mask_row % 32, mask=m_rows, other=0),)
    indexed = row_index(
        load_words(p_record, INDEX_WORDS), tl.load(p_record + SEED).to(tl.uint32), mask_row, index_words, INDEX
    )
    p_x = token_pointers(x_ptr, x_stride, order_ptr, first, count, TOKENS)
    acc = zeros_tuple(TOKENS * SHARE * CLASSES, STEPS, MASK_ROWS)
    sums = zeros_tuple(TOKENS, STEPS, MASK_ROWS)
    o_gather = (tl.arange(0, ELEMENTS) // N)[:, None] + (tl.arange(0, STEPS) * GROUPS)[None, :]
    for chunk in range(tl.cdiv(groups, STEPS * GROUPS)):
        step = chunk * STEPS + tl.arange(0, STEPS)
        loaded0 = ()
        loaded1 = ()
        for v in tl.static_range(SHARE):
            p_row = p_codes + v * code_words * 32
            # Every word of a step exists where the steps divide the row; the compiler then drops the comparison.
            limit0 = 2147483647 if EVEN else words0
            loaded0 = loaded0 + (load_planes(p_row, limit0, 0, step, m_rows, ELEMENTS, PLANE0),)
            if PLANE1 > 0:
                limit1 = 2147483647 if EVEN else words1
                loaded1 = loaded1 + (load_planes(p_row, limit1, words0, step, m_rows, ELEMENTS, PLANE1),)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        x = ()
        for t in tl.static_range(TOKENS):
            if EVEN:
                x = x + (tl.load(p_x[t] + column),)
            else:
                x = x + (tl.load(p_x[t] + column, mask=column < columns, other=0),)
        position = chunk_positions(
            indexed, places0, places1, places2, step, m_rows, INDEX, ELEMENTS, N, LOG_M, INDEX_BITS
        )
        position = position.to(tl.int32) + (o_gather << LOG_M)[:, :, None]
        position = tl.reshape(position, [ELEMENTS * STEPS * MASK_ROWS])
        new_acc = ()
        new_sums = ()
        for t in tl.static_range(TOKENS):
            g = tl.gather(x[t].to(tl.float32) * TWO_64, position, 0)
            g = tl.reshape(g, [ELEMENTS, STEPS, MASK_ROWS])
            s = sums[t]
            for e in tl.static_range(ELEMENTS):
                s += pick(g, e)
            new_sums = new_sums + (s,)
            for v in tl.static_range(SHARE):
                new_acc = new_acc + multiply_plane(
                    acc, g, loaded0[v], (t * SHARE + v) * CLASSES, ELEMENTS, PLANE0, CLASSES0
                )
                if PLANE1 > 0:
                    new_acc = new_acc + multiply_plane(
                        acc, g, loaded1[v], (t * SHARE + v) * CLASSES + CLASSES0, ELEMENTS, PLANE1, CLASSES1
                    )
        acc = new_acc
        sums = new_sums
    for v in tl.static_range(SHARE):
        row = mask_row * SHARE + v
        for t in tl.static_range(TOKENS):
            total = tl.zeros([STEPS, MASK_ROWS], tl.float32)
            for c in tl.static_range(CLASSES0):
                total += acc[(t * SHARE + v) * CLASSES + c] * (2.0 ** (85 - c * PLANE0))
            for c in tl.static_range(CLASSES1):
                total += acc[(t * SHARE + v) * CLASSES + CLASSES0 + c] * (2.0 ** (85 + PLANE0 - c * PLANE1))
            total -= sums[t] * (0.5 * TOP / TWO_64)
            y = tl.sum(total, 0) * scales[v].to(tl.float32)
            add_token(y_ptr, y_stride, order_ptr, first, t, count, row, row < rows, y)
