"""Device functions that multiply words of codes with activations in column order: for ``lowbit`` and ``lowrank`` terms.

As in the gather kernel of ``nm`` terms a code is never converted: field u at bit b of a word, masked and read as a
float32, is the denormal ``u * 2**(b - 149)``. Here the column of each x is known, and so is the bit b of its field: x
is scaled by ``2**(64 - b)``. ``value = (u - zero) * scale`` leaves ``y = scale * (sum of u * x - zero * sum of x)`` for
each group of columns; on the symmetric grids ``zero`` is ``top / 2``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import zeros_tuple


@triton.jit
def load_x(p_x, p_column_scales, column, mask, BY_COLUMN: tl.constexpr, EVEN: tl.constexpr):
    """Return the activations of some columns, float32, times the scales of the columns if BY_COLUMN."""
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
