"""Base and one delta in one kernel, for one token: the base's weights stream by while the delta is gathered.

Decoding one token is bound by the bytes of the base's weights. A kernel of its own for the delta costs its launch and
three dependent reads from memory; here both hide behind the stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.nm.entries import mix
from deltafmt.kernels.nm.gather import (
    fixed_positions,
    load_planes,
    multiply_plane,
    pick,
    seeded_positions,
    select_part,
)


@triton.jit
def interleave_rows(parts, SHARE: tl.constexpr):
    """Return the rows of a block in their order, from the rows v of all masks, for each v < SHARE."""
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


@triton.jit
def fused_kernel(
    x_ptr, weight0_ptr, weight1_ptr, weight2_ptr, y0_ptr, y1_ptr, y2_ptr, rows0, rows1, rows2, block1, block2,
    table_ptr, slot, columns, groups, code_words, words0, words1, index_words, places0, places1, places2,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr, LOG_GROUP: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
    LANE_BITS: tl.constexpr, PLANE0: tl.constexpr, CLASSES0: tl.constexpr, PLANE1: tl.constexpr,
    CLASSES1: tl.constexpr, ENTRIES: tl.constexpr, STEPS: tl.constexpr, MASK_ROWS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write ``y = x @ (weight + delta).T`` of one token, one part and one block of ``MASK_ROWS * SHARE`` rows.

    Weights are contiguous, shape (rows, columns).
    """
    GROUPS: tl.constexpr = ENTRIES // KEEP
    CHUNK: tl.constexpr = (STEPS * GROUPS) << LOG_GROUP
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
    p_entry = table_ptr + (slot * PARTS + part) * 5
    codes_ptr = tl.load(p_entry).to(tl.pointer_type(tl.int32))
    index_ptr = tl.load(p_entry + 1).to(tl.pointer_type(tl.int32))
    scales_ptr = tl.load(p_entry + 2).to(tl.pointer_type(SCALE))
    seed = tl.load(p_entry + 3).to(tl.uint32)
    delta_rows = tl.load(p_entry + 4).to(tl.int32)
    mask_row = block * MASK_ROWS + tl.arange(0, MASK_ROWS)
    m_rows = mask_row * SHARE < delta_rows
    o_tile = (mask_row // 32).to(tl.int64) * (SHARE * 32)
    p_codes = codes_ptr + o_tile * code_words + mask_row % 32
    p_index = index_ptr + (mask_row // 32).to(tl.int64) * (index_words * 32) + mask_row % 32
    key = mix(mask_row.to(tl.uint32) * 0x9E3779B1 + seed)
    acc = ()
    for _ in tl.static_range(SHARE * (CLASSES0 + CLASSES1)):
        acc = acc + (tl.zeros([STEPS, MASK_ROWS], tl.float32),)
    sums = tl.zeros([STEPS, MASK_ROWS], tl.float32)
    o_gather = (tl.arange(0, ENTRIES) // KEEP)[:, None] + (tl.arange(0, STEPS) * GROUPS)[None, :]
    for chunk in range(tl.cdiv(groups, STEPS * GROUPS)):
        step = chunk * STEPS + tl.arange(0, STEPS)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + column, mask=column < columns, other=0).to(tl.float32) * 18446744073709551616.0
        if LANE_BITS == 0:
            position = fixed_positions(p_index, places0, places1, places2, step, m_rows, ENTRIES, LOG_GROUP)
        else:
            position = seeded_positions(key, step, ENTRIES, KEEP, LOG_GROUP, LANE_BITS)
        position = position.to(tl.int32) + (o_gather << LOG_GROUP)[:, :, None]
        g = tl.gather(x, tl.reshape(position, [ENTRIES * STEPS * MASK_ROWS]), 0)
        g = tl.reshape(g, [ENTRIES, STEPS, MASK_ROWS])
        for e in tl.static_range(ENTRIES):
            sums += pick(g, e)
        new_acc = ()
        for v in tl.static_range(SHARE):
            p_row = p_codes + v * code_words * 32
            limit0 = 2147483647 if EVEN else words0
            loaded = load_planes(p_row, limit0, 0, step, m_rows, ENTRIES, PLANE0)
            new_acc = new_acc + multiply_plane(acc, g, loaded, v * (CLASSES0 + CLASSES1), ENTRIES, PLANE0, CLASSES0)
            if PLANE1 > 0:
                limit1 = 2147483647 if EVEN else words1
                loaded = load_planes(p_row, limit1, words0, step, m_rows, ENTRIES, PLANE1)
                new_acc = new_acc + multiply_plane(
                    acc, g, loaded, v * (CLASSES0 + CLASSES1) + CLASSES0, ENTRIES, PLANE1, CLASSES1
                )
        acc = new_acc
    deltas = ()
    for v in tl.static_range(SHARE):
        total = tl.zeros([STEPS, MASK_ROWS], tl.float32)
        for c in tl.static_range(CLASSES0):
            total += acc[v * (CLASSES0 + CLASSES1) + c] * (2.0 ** (85 - c * PLANE0))
        for c in tl.static_range(CLASSES1):
            total += acc[v * (CLASSES0 + CLASSES1) + CLASSES0 + c] * (2.0 ** (85 + PLANE0 - c * PLANE1))
        total -= sums * (0.5 * TOP / 18446744073709551616.0)
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
