"""Base and one delta in one kernel, for one token: ``y = x @ (W + D).T``, written and not added.

x has the shape (columns,), W and D (rows, columns) for each of up to three parts; W is the base's weight, plain and
contiguous. A program owns ``MASK_ROWS * SHARE`` rows of one part. It first gathers the delta's products as
``gather.py`` does, for all columns, and then goes through its rows of W in blocks of BLOCK columns.

Decoding one token is bound by the bytes of W. A kernel of its own for the delta costs its launch and three dependent
reads from memory (tile, record, words); here both hide behind the loads of W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.device_functions import TWO_64, load_address, load_words, record_address, select_part, zeros_tuple
from deltafmt.kernels.nm.fields import load_planes
from deltafmt.kernels.nm.gather import multiply_plane, pick
from deltafmt.kernels.nm.positions import chunk_positions, row_index
from deltafmt.kernels.nm.record_fields import CODES, FIELDS, INDEX_WORDS, ROWS, SCALES, SEED


@triton.jit
def interleave_rows(parts, SHARE: tl.constexpr):
    """Return the values of a block's rows in their order; ``parts[v]`` are those of row v of every mask row."""
    if SHARE == 1:
        return parts[0]
    elif SHARE == 2:
        return tl.interleave(parts[0], parts[1])
    elif SHARE == 4:
        return tl.interleave(tl.interleave(parts[0], parts[2]), tl.interleave(parts[1], parts[3]))
    else:
        even = tl.interleave(tl.interleave(parts[0], parts[4]), tl.interleave(parts[2], parts[6]))
        odd = tl.interleave(tl.interleave(parts[1], parts[5]), tl.interleave(parts[3], parts[7]))
        return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["block1", "block2", "slot"])
def fused_kernel(
    x_ptr, weight0_ptr, weight1_ptr, weight2_ptr, y0_ptr, y1_ptr, y2_ptr, rows0, rows1, rows2, block1, block2,
    records_ptr, slot, columns, groups, code_words, words0, words1, index_words, places0, places1, places2,
    PARTS: tl.constexpr,
    N: tl.constexpr, LOG_M: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
    INDEX: tl.constexpr, INDEX_BITS: tl.constexpr, PLANE0: tl.constexpr, CLASSES0: tl.constexpr, PLANE1: tl.constexpr,
    CLASSES1: tl.constexpr, ELEMENTS: tl.constexpr, STEPS: tl.constexpr, MASK_ROWS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write ``y = x @ (weight + delta).T`` of one token, one part and one block of ``MASK_ROWS * SHARE`` rows.

    Args:
        weight0_ptr, ...: of each part, contiguous, shape (rows, columns).
        rows0, ...: of each part.
        slot: the delta.
        BLOCK, STAGES: columns of a block of weights, and how many blocks are loaded ahead.
        others: as for the gather kernel.
    """
    GROUPS: tl.constexpr = ELEMENTS // N
    CHUNK: tl.constexpr = (STEPS * GROUPS) << LOG_M
    # The parts' rows take the places of the strides: the output is one token, and no stride is needed.
    part, block, y_ptr, rows = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, rows0, rows1, rows2, PARTS
    )
    weight_ptr = weight0_ptr
    if PARTS > 1:
        if part == 1:
            weight_ptr = weight1_ptr
    if PARTS > 2:
        if part == 2:
            weight_ptr = weight2_ptr
    # A pointer that comes from memory is not known to be aligned: loads of words then keep a row a lane.
    p_record = record_address(records_ptr, slot, part, PARTS, FIELDS)
    codes_ptr = load_words(p_record, CODES)
    index_ptr = load_words(p_record, INDEX_WORDS)
    scales_ptr = load_address(p_record, SCALES, SCALE)
    seed = tl.load(p_record + SEED).to(tl.uint32)
    delta_rows = tl.load(p_record + ROWS).to(tl.int32)
    mask_row = block * MASK_ROWS + tl.arange(0, MASK_ROWS)
    m_rows = mask_row * SHARE < delta_rows
    o_tile = (mask_row // 32).to(tl.int64) * (SHARE * 32)
    p_codes = codes_ptr + o_tile * code_words + mask_row % 32
    indexed = row_index(index_ptr, seed, mask_row, index_words, INDEX)
    acc = zeros_tuple(SHARE * (CLASSES0 + CLASSES1), STEPS, MASK_ROWS)
    sums = tl.zeros([STEPS, MASK_ROWS], tl.float32)
    o_gather = (tl.arange(0, ELEMENTS) // N)[:, None] + (tl.arange(0, STEPS) * GROUPS)[None, :]
    for chunk in range(tl.cdiv(groups, STEPS * GROUPS)):
        step = chunk * STEPS + tl.arange(0, STEPS)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + column, mask=column < columns, other=0).to(tl.float32) * TWO_64
        position = chunk_positions(
            indexed, places0, places1, places2, step, m_rows, INDEX, ELEMENTS, N, LOG_M, INDEX_BITS
        )
        position = position.to(tl.int32) + (o_gather << LOG_M)[:, :, None]
        gathered = tl.gather(x, tl.reshape(position, [ELEMENTS * STEPS * MASK_ROWS]), 0)
        gathered = tl.reshape(gathered, [ELEMENTS, STEPS, MASK_ROWS])
        for e in tl.static_range(ELEMENTS):
            sums += pick(gathered, e)
        new_acc = ()
        for v in tl.static_range(SHARE):
            p_row = p_codes + v * code_words * 32
            limit0 = 2147483647 if EVEN else words0
            loaded = load_planes(p_row, limit0, 0, step, m_rows, ELEMENTS, PLANE0)
            new_acc = new_acc + multiply_plane(
                acc, gathered, loaded, v * (CLASSES0 + CLASSES1), ELEMENTS, PLANE0, CLASSES0
            )
            if PLANE1 > 0:
                limit1 = 2147483647 if EVEN else words1
                loaded = load_planes(p_row, limit1, words0, step, m_rows, ELEMENTS, PLANE1)
                new_acc = new_acc + multiply_plane(
                    acc, gathered, loaded, v * (CLASSES0 + CLASSES1) + CLASSES0, ELEMENTS, PLANE1, CLASSES1
                )
        acc = new_acc
    deltas = ()
    for v in tl.static_range(SHARE):
        total = tl.zeros([STEPS, MASK_ROWS], tl.float32)
        for c in tl.static_range(CLASSES0):
            total += acc[v * (CLASSES0 + CLASSES1) + c] * (2.0 ** (85 - c * PLANE0))
        for c in tl.static_range(CLASSES1):
            total += acc[v * (CLASSES0 + CLASSES1) + CLASSES0 + c] * (2.0 ** (85 + PLANE0 - c * PLANE1))
        total -= sums * (0.5 * TOP / TWO_64)
        scale = tl.load(scales_ptr + o_tile + v * 32 + mask_row % 32, mask=m_rows, other=0).to(tl.float32)
        deltas = deltas + (tl.sum(total, 0) * scale,)
    row = block * (MASK_ROWS * SHARE) + tl.arange(0, MASK_ROWS * SHARE)
    p_weight = weight_ptr + row.to(tl.int64)[:, None] * columns
    products = tl.zeros([MASK_ROWS * SHARE, BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        m = (row < rows)[:, None] & (column < columns)[None, :]
        weight = tl.load(p_weight + column[None, :], mask=m, other=0, eviction_policy="evict_first")
        x = tl.load(x_ptr + column, mask=column < columns, other=0)
        products += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(products, 1) + interleave_rows(deltas, SHARE)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < rows)
