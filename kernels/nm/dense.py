"""Decoding into dense blocks: for ``tl.dot`` when a delta has many tokens, and for writing a delta out.

:func:`dense_tile` decodes a block of the shape (rows, GROUPS * PADDED) into registers: GROUPS groups of M columns, each
padded to PADDED places, the power of two at or above M. Kept element i of every group is compared with all places of
its group (a select and no scatter), so that each is decoded where it is used.

- ``dot_kernel``: ``y += x @ D.T`` for many tokens. A program owns a token tile of TOKENS tokens and BLOCK_ROWS rows of
  one part; in each turn it decodes a block and multiplies: (TOKENS, GROUPS * PADDED) @ (GROUPS * PADDED, BLOCK_ROWS).
- ``expand_kernel``: ``out = D`` or ``out = base + D``. A program owns BLOCK_ROWS rows and GROUPS groups.
- ``embedding_kernel``: ``y[t, :] += D[slot of t][id of t, :]``. A program owns ELEMENTS kept elements of a token's row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import (
    add_to_rows,
    load_address,
    load_token_tile,
    load_words,
    record_address,
    select_part,
    token_of,
)
from deltafmt.kernels.nm.elements import load_code, load_scale
from deltafmt.kernels.nm.positions import load_position
from deltafmt.kernels.nm.record_fields import CODES, FIELDS, INDEX_WORDS, ROWS, SCALES, SEED


@triton.jit
def dense_tile(
    codes_ptr, index_ptr, scales_ptr, seed, row, group, rows, kept, code_words, index_words, scale_group, scales,
    N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr,
    TOP: tl.constexpr, INDEX: tl.constexpr, INDEX_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return ``2u - top`` (times half the scale if SCALED), float32, shape (rows, groups * PADDED); 0 if not kept.

    Args:
        codes_ptr, index_ptr, scales_ptr, seed: of the term.
        row, group: numbers of the rows and groups to decode, each 1-d.
        rows, kept: of the delta, and kept elements of a row.
        code_words, index_words, scale_group, scales: words of a row's codes and of a mask row's index, kept elements
            that share a scale, and scales of a row.
    """
    place = tl.arange(0, PADDED)[None, None, :]
    tile = tl.zeros([row.shape[0], group.shape[0], PADDED], tl.float32)
    r = row[:, None]
    for i in range(N):
        element = (group * N + i)[None, :]
        m = (element < kept) & (r < rows)
        position = load_position(
            index_ptr, seed, r // SHARE, element, kept, index_words, m, N, M, INDEX, INDEX_BITS, POSITION_BITS
        )
        value = load_code(codes_ptr, r, element, kept, code_words, m, BITS, SHARE, TOP)
        if SCALED:
            value *= load_scale(scales_ptr, r, element // scale_group, scales, m, SHARE)
        value = tl.where(m, value, 0.0)
        tile = tl.where(position[:, :, None] == place, value[:, :, None], tile)
    return tl.reshape(tile, [row.shape[0], group.shape[0] * PADDED])


@triton.jit(do_not_specialize=["block1", "block2"])
def dot_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2,
    columns, groups, kept, code_words, index_words, scale_group, scales,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr,
    TOP: tl.constexpr, SCALE: tl.constexpr, INDEX: tl.constexpr, INDEX_BITS: tl.constexpr, POSITION_BITS: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one token tile and one block of rows; the delta is decoded block by block.

    If a row has one scale, a decoded block holds the integers ``2u - top``, which every dtype of x represents exactly,
    and the scale is applied to the sums.
    """
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
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i_token = tl.arange(0, TOKENS)
    token = token_of(order_ptr, first, i_token, count)
    p_x = x_ptr + token[:, None] * x_stride
    place = tl.arange(0, GROUPS * PADDED)
    acc = tl.zeros([TOKENS, BLOCK_ROWS], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        delta = dense_tile(
            codes_ptr, index_ptr, scales_ptr, seed, row, group, rows, kept, code_words, index_words, scale_group,
            scales, N, M, PADDED, BITS, SHARE, TOP, INDEX, INDEX_BITS, POSITION_BITS, SCALED,
        )  # fmt: skip
        column = (start + place // PADDED) * M + place % PADDED
        m = (place % PADDED < M) & (column < columns)
        x = tl.load(p_x + column[None, :], mask=m[None, :], other=0)
        acc = tl.dot(x, tl.trans(delta).to(x.dtype), acc, input_precision=PRECISION)
    if not SCALED:
        acc *= load_scale(scales_ptr, row, 0, 1, row < rows, SHARE)[None, :]
    p_y = y_ptr + token[:, None] * y_stride + row[None, :]
    m = (i_token < count)[:, None] & (row < rows)[None, :]
    add_to_rows(p_y, acc, m)


# Seeds are hashes: a variant for a seed of 1, which Triton would make a constant, helps nobody.
@triton.jit(do_not_specialize=["seed", "first_row", "rows"])
def expand_kernel(
    codes_ptr, index_ptr, scales_ptr, seed, base_ptr, base_stride, out_ptr, out_stride, first_row, rows,
    columns, kept, code_words, index_words, scale_group, scales,
    N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr,
    TOP: tl.constexpr, INDEX: tl.constexpr, INDEX_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, BASE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write rows ``first_row`` to ``rows`` of the delta, or of base + delta, rounded to the output's dtype once."""
    row = first_row + tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    delta = dense_tile(
        codes_ptr, index_ptr, scales_ptr, seed.to(tl.uint32), row, group, rows, kept, code_words, index_words,
        scale_group, scales, N, M, PADDED, BITS, SHARE, TOP, INDEX, INDEX_BITS, POSITION_BITS, True,
    )  # fmt: skip
    place = tl.arange(0, GROUPS * PADDED)
    column = (tl.program_id(1) * GROUPS + place // PADDED) * M + place % PADDED
    m = (row < rows)[:, None] & ((place % PADDED < M) & (column < columns))[None, :]
    o = (row - first_row).to(tl.int64)[:, None]
    if BASE:
        delta += tl.load(base_ptr + o * base_stride + column[None, :], mask=m, other=0).to(tl.float32)
    tl.store(out_ptr + o * out_stride + column[None, :], delta.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["slot_count"])
def embedding_kernel(
    ids_ptr, slots_ptr, slot_count, records_ptr, y_ptr, y_stride, columns, kept, code_words, index_words, scale_group,
    scales,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr,
    SCALE: tl.constexpr, INDEX: tl.constexpr, INDEX_BITS: tl.constexpr, POSITION_BITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Add row ``id`` of a token's delta onto its embedding; kept elements of a row stand in different columns."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if (slot < 0) | (slot >= slot_count):
        return
    p_record = record_address(records_ptr, slot, 0, 1, FIELDS)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    number = tl.load(ids_ptr + token).to(tl.int64)
    if (number < 0) | (number >= rows):
        return
    row = number.to(tl.int32)
    codes_ptr = load_words(p_record, CODES)
    index_ptr = load_words(p_record, INDEX_WORDS)
    scales_ptr = load_address(p_record, SCALES, SCALE)
    seed = tl.load(p_record + SEED).to(tl.uint32)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    m = element < kept
    position = load_position(
        index_ptr, seed, row // SHARE, element, kept, index_words, m, N, M, INDEX, INDEX_BITS, POSITION_BITS
    )
    value = load_code(codes_ptr, row, element, kept, code_words, m, BITS, SHARE, TOP)
    value *= load_scale(scales_ptr, row, element // scale_group, scales, m, SHARE)
    column = element // N * M + position
    m = m & (position < M) & (column < columns)
    p_y = y_ptr + token * y_stride + column
    add_to_rows(p_y, value, m)
