"""Device functions that multiply words of codes with activations in column order: for ``lowbit`` and ``lowrank`` terms.

What is computed, for each token and each row r (of a ``lowbit`` delta, or a vector of a ``lowrank`` one), with the
codes u as unsigned fields; a group is the columns that share a scale::

    y[r] = sum over groups g of  scale[r, g] * (sum over g's columns c of u[r, c] * x[c]  -  zero[r, g] * sum of x[c])

On the symmetric grids ``zero`` is ``TOP / 2``. Words are blocks of the shape (WORDS, rows): all rows meet the same x,
so there is no gather. Codes are multiplied without a conversion (:mod:`deltafmt.kernels.device_functions`). Here the
bit b of each column's field is known, so x is scaled by ``2**(64 - b)`` at once, and sums by ``2**85`` at the end.
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
    """Return for each token the sums of field times x over each word, times 2**-85, of the shape of ``word``.

    Args:
        word: uint32, shape (WORDS, rows).
        o_word: the words' numbers in a row, shape (WORDS,): word w holds the columns from ``w * 32 / WIDTH`` on.
        p_x, p_column_scales, columns, BY_COLUMN, EVEN: as for :func:`load_x`; ``p_x`` for each token.
        TOKENS: tokens of the tile.
        WIDTH: bits of a field in this plane.
    """
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
    """Return the totals with one plane's part of ``scale * (u - zero) * x`` added.

    Args:
        total: for each token, float32, shape (WORDS, rows): not summed over words yet.
        p_codes, p_scales, p_zeros: addresses of each row's first word, scale and zero point.
        m_rows: which rows exist.
        start, words: the plane's first word in a row, and how many words it has.
        scale_group: columns that share a scale.
        LOW: the lowest bit that this plane holds of a code. The plane with LOW = 0 also subtracts the zeros.
        STEP: how far a row's words, and its scales, lie apart: 32 in a tile, 1 in a vector of a ``lowrank`` term.
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
