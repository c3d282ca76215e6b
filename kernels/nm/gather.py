"""The gather kernel: few tokens, each kept element multiplied with the activation that its position names.

For a token with the activations x, and row r with its mask row ``q = r // SHARE`` (the SHARE rows that keep the same
positions; Triton's masks, ``m_``, are another thing), over the kept elements e of the row::

    y[r] += scale[r] * (sum of u[r, e] * x[column(q, e)]  -  TOP / 2 * sum of x[column(q, e)])
    column(q, e) = e // N * M + position(q, e)                    u: the code as an unsigned field

The second sum is the same for the SHARE rows of a mask row. So are positions and gathered x.

A program owns a token tile of up to TOKENS tokens of one slot, and ``MASK_ROWS * SHARE`` rows of one part. It goes
through the columns in chunks of STEPS steps. A step is ELEMENTS kept elements of each row: whole words of codes and of
the index, so that every shift is a constant. In registers, but for x::

    x         (CHUNK,) a token                 loaded once a chunk, in shared memory: ``tl.gather`` reads any element
    position  (ELEMENTS, STEPS, MASK_ROWS)     computed from a hash, or unpacked from the index
    gathered  (ELEMENTS, STEPS, MASK_ROWS)     x at these positions, for one token
    words     (STEPS, MASK_ROWS) each          the codes of one of the SHARE rows
    acc       (STEPS, MASK_ROWS) each          TOKENS * SHARE * CLASSES sums

The last dimension lies across the lanes of a warp: lanes are consecutive mask rows in the same group of columns. So a
warp loads 128 adjacent bytes of words (a tile holds word w of 32 rows side by side), and its gathers stay inside M
adjacent elements of x, without bank conflicts for M up to 32.

Codes are multiplied without a conversion (:mod:`deltafmt.kernels.device_functions`). The fields of a word that come to
the same bit by shifts share a sum; a plane has CLASSES such bits, and its sums are weighted at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import (
    TWO_64,
    add_token,
    load_address,
    load_token_tile,
    load_words,
    record_address,
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
    """Return the CLASSES accumulators that begin at AT, each gathered x times its field of one plane added.

    Element ``i * CLASSES + c`` of a step is class c: its field comes to bit ``c * WIDTH`` by a shift of its word that
    serves CLASSES elements.

    Args:
        acc: all sums of the program.
        gathered: x, shape (ELEMENTS, STEPS, MASK_ROWS).
        loaded: the words of a step in this plane, each (STEPS, MASK_ROWS).
        AT: the first of the sums.
        WIDTH: bits of a field in this plane.
    """
    SHIFTS: tl.constexpr = 32 // WIDTH // CLASSES  # of one word
    out = ()
    for c in tl.static_range(CLASSES):
        a = acc[AT + c]
        for i in tl.static_range(ELEMENTS // CLASSES):
            shifted = loaded[i // SHIFTS] >> (i % SHIFTS * CLASSES * WIDTH)
            field = shifted & (((1 << WIDTH) - 1) << (c * WIDTH))
            a = tl.fma(field.to(tl.float32, bitcast=True), pick(gathered, i * CLASSES + c), a)
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
    """Add ``x @ delta.T`` of one token tile and one block of rows; see the module's docstring.

    Args:
        x_ptr, ..., block2: tokens, outputs and blocks, as for all product kernels (``launch_arguments.py``).
        columns, groups: in_features, and groups of M columns in a row.
        code_words, words0, words1: words of a row's codes, and of each of their planes; one plane: words1 is 0.
        index_words, places0, places1, places2: the same of a mask row's stored index; 0 if positions are seeded.
        INDEX, INDEX_BITS: the index encoding (``index.py``).
        PLANE0, PLANE1: bits of a field in each plane of the codes; one plane: PLANE1 is 0.
        EVEN: True if no chunk reaches beyond the row, so that loads of words and x need no predicate of columns.
    """
    GROUPS: tl.constexpr = ELEMENTS // N
    CHUNK: tl.constexpr = (STEPS * GROUPS) << LOG_M
    CLASSES: tl.constexpr = CLASSES0 + CLASSES1
    slot, first, count = load_token_tile(tiles_ptr, tl.program_id(1))
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_address(records_ptr, slot, part, PARTS, FIELDS)
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
            # If the steps divide the row (EVEN), every word of a step exists, and the compiler drops the comparison.
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
            gathered = tl.gather(x[t].to(tl.float32) * TWO_64, position, 0)
            gathered = tl.reshape(gathered, [ELEMENTS, STEPS, MASK_ROWS])
            s = sums[t]
            for e in tl.static_range(ELEMENTS):
                s += pick(gathered, e)
            new_sums = new_sums + (s,)
            for v in tl.static_range(SHARE):
                new_acc = new_acc + multiply_plane(
                    acc, gathered, loaded0[v], (t * SHARE + v) * CLASSES, ELEMENTS, PLANE0, CLASSES0
                )
                if PLANE1 > 0:
                    new_acc = new_acc + multiply_plane(
                        acc, gathered, loaded1[v], (t * SHARE + v) * CLASSES + CLASSES0, ELEMENTS, PLANE1, CLASSES1
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
