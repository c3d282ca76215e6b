"""The lowbit kernel: few tokens, every code multiplied with its column's activation (spec, section 12).

A program takes a tile of T tokens of one delta and 32 rows of one part, a lane each, so that a word of all rows is 128
adjacent bytes. All rows meet the same x, so there is no gather: one load of x serves the rows that a thread holds.

As in the gather kernel of ``nm`` terms a code is never converted: field u at bit b of a word, masked and read as a
float32, is the denormal ``u * 2**(b - 149)``. Here the column, and so the bit, of each x is known, and x is scaled by
``2**(64 - b)`` for it. ``value = (u - zero) * scale`` leaves ``y = scale * (sum of u * x - zero * sum of x)`` for each
group of columns; on the symmetric grids ``zero`` is ``top / 2``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import (
    add_token,
    load_address,
    load_aligned_words,
    load_tile,
    record_of,
    select_part,
    token_pointers,
    zeros_tuple,
)
from deltafmt.kernels.lowbit.kind import RECORD

FIELDS = tl.constexpr(len(RECORD))
CODES = tl.constexpr(RECORD.offset("codes"))
ZERO_POINTS = tl.constexpr(RECORD.offset("zero_points"))
SCALES = tl.constexpr(RECORD.offset("scales"))
ROWS = tl.constexpr(RECORD.offset("rows"))


@triton.jit
def load_x(p_x, p_column_scales, column, mask, BY_COLUMN: tl.constexpr, EVEN: tl.constexpr):
    """Return the activations of some columns, float32, times the columns' scales where these have some."""
    if EVEN:
        x = tl.load(p_x + column).to(tl.float32)
    else:
        x = tl.load(p_x + column, mask=mask, other=0).to(tl.float32)
    if BY_COLUMN:
        x *= tl.load(p_column_scales + column, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def multiply_words(
    word, o_word, p_x, p_column_scales, columns,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, BY_COLUMN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return for each token the products of some words' fields, times 2**-85, of the shape of ``word``."""
    HALF: tl.constexpr = 16 // WIDTH
    products = zeros_tuple(TOKENS, word.shape[0], word.shape[1])
    for half in tl.static_range(2):
        shifted = word >> (16 * half)
        for i in tl.static_range(HALF):
            field = (shifted & (((1 << WIDTH) - 1) << (i * WIDTH))).to(tl.float32, bitcast=True)
            column = o_word * (2 * HALF) + (half * HALF + i)
            new_products = ()
            for t in tl.static_range(TOKENS):
                x = load_x(p_x[t], p_column_scales, column, column < columns, BY_COLUMN, EVEN)
                x = (x * (2.0 ** (64 - i * WIDTH)))[:, None].broadcast_to(field.shape)
                new_products = new_products + (tl.fma(field, x, products[t]),)
            products = new_products
    return products


@triton.jit
def add_plane(
    total, p_codes, m_rows, start, words, p_scales, p_zeros, scale_group, p_x, p_column_scales, columns,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, TOP: tl.constexpr, BY_COLUMN: tl.constexpr,
    ZEROS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr = 32,
):  # fmt: skip
    """Return the totals with one plane's part of ``scale * (u - zero) * x`` added; the first plane brings the zeros.

    A row's words and scales lie ``STEP`` elements apart: 32 in a tile, 1 in the vectors of a ``lowrank`` term.
    """
    FIELDS: tl.constexpr = 32 // WIDTH
    for first in range(0, words, WORDS):
        o_word = first + tl.arange(0, WORDS)
        m = (o_word < words)[:, None] & m_rows[None, :]
        word = tl.load(p_codes[None, :] + ((start + o_word) * STEP)[:, None], mask=m, other=0).to(
            tl.uint32, bitcast=True
        )
        products = multiply_words(word, o_word, p_x, p_column_scales, columns, TOKENS, WIDTH, BY_COLUMN, EVEN)
        o_group = (o_word * FIELDS // scale_group * STEP)[:, None]
        if BY_COLUMN:
            scale = 1.0
        else:
            scale = tl.load(p_scales[None, :] + o_group, mask=m, other=0).to(tl.float32)
        if ZEROS:
            zero = tl.load(p_zeros[None, :] + o_group, mask=m, other=0).to(tl.float32)
        else:
            zero = TOP / 2
        column = (first * FIELDS + tl.arange(0, WORDS) * FIELDS)[:, None] + tl.arange(0, FIELDS)[None, :]
        new_total = ()
        for t in tl.static_range(TOKENS):
            value = products[t] * (2.0 ** (85 + LOW))
            if LOW == 0:
                x = load_x(p_x[t], p_column_scales, column, column < columns, BY_COLUMN, EVEN)
                value -= zero * tl.sum(x, 1)[:, None]
            new_total = new_total + (total[t] + value * scale,)
        total = new_total
    return total


@triton.jit
def lowbit_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2,
    columns, code_words, words0, words1, words2, scale_group, scales,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
    BY_COLUMN: tl.constexpr, ZEROS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one tile of tokens and 32 rows; see the module's docstring."""
    slot, first, count = load_tile(tiles_ptr, tl.program_id(1))
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_of(records_ptr, slot, part, PARTS, FIELDS)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    if block * 32 >= rows:
        return
    lane = tl.arange(0, 32)
    row = block * 32 + lane
    m_rows = row < rows
    wide = block.to(tl.int64)
    codes_ptr = load_aligned_words(p_record, CODES)
    p_codes = codes_ptr + wide * code_words * 32 + lane
    p_zeros = load_address(p_record, ZERO_POINTS, tl.uint8) + wide * scales * 32 + lane
    p_column_scales = load_address(p_record, SCALES, SCALE)
    p_scales = p_column_scales + wide * scales * 32 + lane
    p_x = token_pointers(x_ptr, x_stride, order_ptr, first, count, TOKENS)
    total = zeros_tuple(TOKENS, WORDS, 32)
    total = add_plane(
        total, p_codes, m_rows, 0, words0, p_scales, p_zeros, scale_group, p_x, p_column_scales, columns,
        TOKENS, PLANE0, 0, TOP, BY_COLUMN, ZEROS, WORDS, EVEN,
    )  # fmt: skip
    if PLANE1 > 0:
        total = add_plane(
            total, p_codes, m_rows, words0, words1, p_scales, p_zeros, scale_group, p_x, p_column_scales, columns,
            TOKENS, PLANE1, PLANE0, TOP, BY_COLUMN, ZEROS, WORDS, EVEN,
        )  # fmt: skip
    if PLANE2 > 0:
        total = add_plane(
            total, p_codes, m_rows, words0 + words1, words2, p_scales, p_zeros, scale_group, p_x, p_column_scales,
            columns, TOKENS, PLANE2, PLANE0 + PLANE1, TOP, BY_COLUMN, ZEROS, WORDS, EVEN,
        )  # fmt: skip
    for t in tl.static_range(TOKENS):
        add_token(y_ptr, y_stride, order_ptr, first, t, count, row, m_rows, tl.sum(total[t], 0))
