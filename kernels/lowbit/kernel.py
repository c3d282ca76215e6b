"""The lowbit kernel: few tokens, every code multiplied with its column's activation (spec, section 12).

``y[r] += sum over the columns c of (u[r, c] - zero[r, g]) * scale[r, g] * x[c]``, with g the group of c; on the
symmetric grids the zero is TOP / 2. With BY_COLUMN there is a scale for each column and not for each row and group.

A program owns a token tile of up to TOKENS tokens of one slot, and the 32 rows of one tile of one part. It goes through
the words of the rows in blocks of the shape (WORDS, 32): a row is a lane, and word w of all 32 rows is 128 adjacent
bytes. All rows meet the same x, so there is no gather: a thread holds the words of four rows, and one load of x serves
them. Each plane of the codes is a pass over x (:mod:`deltafmt.kernels.coded_words`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.coded_words import add_plane
from deltafmt.kernels.device_functions import (
    add_token,
    load_address,
    load_aligned_words,
    load_token_tile,
    record_address,
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


@triton.jit(do_not_specialize=["block1", "block2"])
def lowbit_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2,
    columns, code_words, words0, words1, words2, scale_group, scales,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
    BY_COLUMN: tl.constexpr, ZEROS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one token tile and 32 rows; see the module's docstring.

    Args:
        x_ptr, ..., block2: tokens, outputs and blocks, as for all product kernels (``launch_arguments.py``).
        columns: in_features.
        code_words, words0, words1, words2: words of a row's codes, and of each of their planes.
        scale_group, scales: columns that share a scale, and scales of a row.
        PLANE0, PLANE1, PLANE2: bits of a field in each plane; 0: there is no such plane.
        ZEROS: True if the grid has zero points.
        EVEN: True if no block of words reaches beyond the row.
    """
    slot, first, count = load_token_tile(tiles_ptr, tl.program_id(1))
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_address(records_ptr, slot, part, PARTS, FIELDS)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    if block * 32 >= rows:
        return
    lane = tl.arange(0, 32)
    row = block * 32 + lane
    m_rows = row < rows
    row_tile = block.to(tl.int64)
    codes_ptr = load_aligned_words(p_record, CODES)
    p_codes = codes_ptr + row_tile * code_words * 32 + lane
    p_zeros = load_address(p_record, ZERO_POINTS, tl.uint8) + row_tile * scales * 32 + lane
    p_column_scales = load_address(p_record, SCALES, SCALE)
    p_scales = p_column_scales + row_tile * scales * 32 + lane
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
