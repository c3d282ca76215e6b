"""The gather kernel: few tokens, each kept entry multiplied with the activation that its position names.

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

from deltafmt.kernels.nm.entries import load_code, load_position, load_scale, mix, mix64


@triton.jit
def pick(x, i: tl.constexpr):
    """Return slice i of the first axis, which lies in registers: the compiler folds the selection away."""
    bits = tl.where((tl.arange(0, x.shape[0]) == i)[:, None, None], x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(x.dtype, bitcast=True)


@triton.jit
def load_planes(p_words, words, start, step, m_rows, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """Return one plane's words of a chunk: a tuple over the words of a step, each uint32 (steps, mask rows).

    ``start`` is the plane's first word and ``words`` the number of its words; a step takes ENTRIES fields.
    """
    WORDS: tl.constexpr = ENTRIES * WIDTH // 32
    loaded = ()
    for n in tl.static_range(WORDS):
        m = (step * WORDS + n < words)[:, None] & m_rows[None, :]
        word = tl.load(p_words[None, :] + ((start + step * WORDS + n) * 32)[:, None], mask=m, other=0)
        loaded = loaded + (word.to(tl.uint32, bitcast=True),)
    return loaded


@triton.jit
def spread_fields(loaded, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """Return the fields of one plane's words, uint32, shape (ENTRIES, steps, mask rows)."""
    FIELDS: tl.constexpr = 32 // WIDTH
    e = tl.arange(0, ENTRIES)
    fields = tl.zeros([ENTRIES, loaded[0].shape[0], loaded[0].shape[1]], tl.uint32)
    for n in tl.static_range(ENTRIES // FIELDS):
        shifted = loaded[n][None, :, :] >> ((e % FIELDS) * WIDTH).to(tl.uint32)[:, None, None]
        fields |= tl.where((e // FIELDS == n)[:, None, None], shifted & ((1 << WIDTH) - 1), 0)
    return fields


@triton.jit
def seeded_positions(
    key, step, ENTRIES: tl.constexpr, KEEP: tl.constexpr, LOG_GROUP: tl.constexpr, LANE_BITS: tl.constexpr
):
    """Section 11.4: return positions, uint32, shape (ENTRIES, steps, mask rows); a hash serves several groups."""
    LANES: tl.constexpr = 32 // LANE_BITS  # of one half
    HASHES: tl.constexpr = ENTRIES // (KEEP * LANES * 2)
    MASK: tl.constexpr = (1 << LOG_GROUP) - 1
    number = step[None, :] * HASHES + tl.arange(0, HASHES)[:, None]
    low, high = mix64(key[None, None, :] + (number.to(tl.uint32) * 0x85EBCA6B)[:, :, None])
    half = tl.where((tl.arange(0, 2) == 0)[None, :, None, None], low[:, None], high[:, None])
    lane = half[:, :, None, :, :] >> (tl.arange(0, LANES).to(tl.uint32) * LANE_BITS)[None, None, :, None, None]
    lane = tl.reshape(lane, [HASHES, LANES * 2, step.shape[0], key.shape[0]])
    b = lane & MASK
    if KEEP == 1:
        return tl.reshape(b, [ENTRIES, step.shape[0], key.shape[0]])
    else:
        a = ((lane >> (LOG_GROUP - 1)) & MASK) | 1
        i = tl.arange(0, KEEP).to(tl.uint32)
        p = (a[:, :, None] * i[None, None, :, None, None] + b[:, :, None]) & MASK
        return tl.reshape(p, [ENTRIES, step.shape[0], key.shape[0]])


@triton.jit
def fixed_positions(p_words, words0, words1, words2, step, m_rows, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """Section 11.4: return the positions of a ``fixed`` index, uint32, shape (ENTRIES, steps, mask rows)."""
    W0: tl.constexpr = 4 if WIDTH >= 4 else 2 if WIDTH >= 2 else 1
    p = spread_fields(load_planes(p_words, words0, 0, step, m_rows, ENTRIES, W0), ENTRIES, W0)
    LEFT: tl.constexpr = WIDTH - W0
    if LEFT > 0:
        W1: tl.constexpr = 2 if LEFT >= 2 else 1
        loaded = load_planes(p_words, words1, words0, step, m_rows, ENTRIES, W1)
        p |= spread_fields(loaded, ENTRIES, W1) << W0
        if LEFT > W1:
            loaded = load_planes(p_words, words2, words0 + words1, step, m_rows, ENTRIES, 1)
            p |= spread_fields(loaded, ENTRIES, 1) << (W0 + W1)
    return p


@triton.jit
def multiply_plane(
    acc, gathered, loaded, AT: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr, CLASSES: tl.constexpr
):
    """Return the CLASSES accumulators that begin at AT, each gathered x times its field of one plane added."""
    SHIFTS: tl.constexpr = 32 // WIDTH // CLASSES
    out = ()
    for c in tl.static_range(CLASSES):
        a = acc[AT + c]
        for e in tl.static_range(ENTRIES // CLASSES):
            shifted = loaded[e // SHIFTS] >> (e % SHIFTS * CLASSES * WIDTH)
            field = shifted & (((1 << WIDTH) - 1) << (c * WIDTH))
            a = tl.fma(field.to(tl.float32, bitcast=True), pick(gathered, e * CLASSES + c), a)
        out = out + (a,)
    return out


@triton.jit
def select_part(block, block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS: tl.constexpr):
    """Return the part that a block of rows belongs to, its number within the part, and the part's output."""
    part = 0
    start = 0
    y_ptr = y0_ptr
    y_stride = y0_stride
    if PARTS > 1:
        if block >= block1:
            part = 1
            start = block1
            y_ptr = y1_ptr
            y_stride = y1_stride
    if PARTS > 2:
        if block >= block2:
            part = 2
            start = block2
            y_ptr = y2_ptr
            y_stride = y2_stride
    return part, block - start, y_ptr, y_stride


@triton.jit
def gather_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, table_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2,
    columns, groups, code_words, words0, words1, index_words, places0, places1, places2,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    KEEP: tl.constexpr, LOG_GROUP: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
    LANE_BITS: tl.constexpr, PLANE0: tl.constexpr, CLASSES0: tl.constexpr, PLANE1: tl.constexpr,
    CLASSES1: tl.constexpr, ENTRIES: tl.constexpr, STEPS: tl.constexpr, MASK_ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add ``x @ delta.T`` of one tile of tokens and one block of rows; see the module's docstring."""
    GROUPS: tl.constexpr = ENTRIES // KEEP
    CHUNK: tl.constexpr = (STEPS * GROUPS) << LOG_GROUP
    CLASSES: tl.constexpr = CLASSES0 + CLASSES1
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + tile * 3)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_entry = table_ptr + (slot * PARTS + part) * 5
    rows = tl.load(p_entry + 4).to(tl.int32)
    if block * (MASK_ROWS * SHARE) >= rows:
        return
    codes_ptr = tl.load(p_entry).to(tl.pointer_type(tl.int32))
    scales_ptr = tl.load(p_entry + 2).to(tl.pointer_type(SCALE))

    mask_row = block * MASK_ROWS + tl.arange(0, MASK_ROWS)
    m_rows = mask_row * SHARE < rows
    o_tile = (mask_row // 32).to(tl.int64) * (SHARE * 32)
    p_codes = codes_ptr + o_tile * code_words + mask_row % 32
    scales = ()
    for v in tl.static_range(SHARE):
        scales = scales + (tl.load(scales_ptr + o_tile + v * 32 + mask_row % 32, mask=m_rows, other=0),)
    if LANE_BITS == 0:
        index_ptr = tl.load(p_entry + 1).to(tl.pointer_type(tl.int32))
        p_index = index_ptr + (mask_row // 32).to(tl.int64) * (index_words * 32) + mask_row % 32
    else:
        key = mix(mask_row.to(tl.uint32) * 0x9E3779B1 + tl.load(p_entry + 3).to(tl.uint32))
    p_x = ()
    for t in tl.static_range(TOKENS):
        token = tl.load(order_ptr + first + tl.minimum(t, count - 1)).to(tl.int64)
        p_x = p_x + (x_ptr + token * x_stride,)

    acc = ()
    for _ in tl.static_range(TOKENS * SHARE * CLASSES):
        acc = acc + (tl.zeros([STEPS, MASK_ROWS], tl.float32),)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([STEPS, MASK_ROWS], tl.float32),)
    o_gather = (tl.arange(0, ENTRIES) // KEEP)[:, None] + (tl.arange(0, STEPS) * GROUPS)[None, :]
    for chunk in range(tl.cdiv(groups, STEPS * GROUPS)):
        step = chunk * STEPS + tl.arange(0, STEPS)
        loaded0 = ()
        loaded1 = ()
        for v in tl.static_range(SHARE):
            p_row = p_codes + v * code_words * 32
            # Every word of a step exists where the steps divide the row; the compiler then drops the comparison.
            limit0 = 2147483647 if EVEN else words0
            loaded0 = loaded0 + (load_planes(p_row, limit0, 0, step, m_rows, ENTRIES, PLANE0),)
            if PLANE1 > 0:
                limit1 = 2147483647 if EVEN else words1
                loaded1 = loaded1 + (load_planes(p_row, limit1, words0, step, m_rows, ENTRIES, PLANE1),)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        x = ()
        for t in tl.static_range(TOKENS):
            if EVEN:
                x = x + (tl.load(p_x[t] + column),)
            else:
                x = x + (tl.load(p_x[t] + column, mask=column < columns, other=0),)
        if LANE_BITS == 0:
            position = fixed_positions(p_index, places0, places1, places2, step, m_rows, ENTRIES, LOG_GROUP)
        else:
            position = seeded_positions(key, step, ENTRIES, KEEP, LOG_GROUP, LANE_BITS)
        position = position.to(tl.int32) + (o_gather << LOG_GROUP)[:, :, None]
        position = tl.reshape(position, [ENTRIES * STEPS * MASK_ROWS])
        new_acc = ()
        new_sums = ()
        for t in tl.static_range(TOKENS):
            g = tl.gather(x[t].to(tl.float32) * 18446744073709551616.0, position, 0)
            g = tl.reshape(g, [ENTRIES, STEPS, MASK_ROWS])
            s = sums[t]
            for e in tl.static_range(ENTRIES):
                s += pick(g, e)
            new_sums = new_sums + (s,)
            for v in tl.static_range(SHARE):
                new_acc = new_acc + multiply_plane(
                    acc, g, loaded0[v], (t * SHARE + v) * CLASSES, ENTRIES, PLANE0, CLASSES0
                )
                if PLANE1 > 0:
                    new_acc = new_acc + multiply_plane(
                        acc, g, loaded1[v], (t * SHARE + v) * CLASSES + CLASSES0, ENTRIES, PLANE1, CLASSES1
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
            total -= sums[t] * (0.5 * TOP / 18446744073709551616.0)
            y = tl.sum(total, 0) * scales[v].to(tl.float32)
            if t < count:
                token = tl.load(order_ptr + first + t).to(tl.int64)
                p_y = y_ptr + token * y_stride + row
                old = tl.load(p_y, mask=row < rows, other=0).to(tl.float32)
                tl.store(p_y, (old + y).to(y_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def entry_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, table_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2,
    columns, kept, code_words, index_words, scale_group, scales,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    KEEP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr,
    SCALE: tl.constexpr, LANE_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, SCALED: tl.constexpr,
    ENTRIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same product for any layout, entry by entry: what the gather kernel does not unroll comes here."""
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + tile * 3)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_entry = table_ptr + (slot * PARTS + part) * 5
    rows = tl.load(p_entry + 4).to(tl.int32)
    if block * ROWS >= rows:
        return
    codes_ptr = tl.load(p_entry).to(tl.pointer_type(tl.int32))
    index_ptr = tl.load(p_entry + 1).to(tl.pointer_type(tl.int32))
    scales_ptr = tl.load(p_entry + 2).to(tl.pointer_type(SCALE))
    seed = tl.load(p_entry + 3).to(tl.uint32)
    row = (block * ROWS + tl.arange(0, ROWS))[None, :]
    acc = ()
    for _ in tl.static_range(TOKENS):
        acc = acc + (tl.zeros([ENTRIES, ROWS], tl.float32),)
    for start in range(0, kept, ENTRIES):
        entry = (start + tl.arange(0, ENTRIES))[:, None]
        m = (entry < kept) & (row < rows)
        position = load_position(
            index_ptr, seed, row // SHARE, entry, kept, index_words, m, KEEP, GROUP, LANE_BITS, POSITION_BITS
        )
        value = load_code(codes_ptr, row, entry, kept, code_words, m, BITS, SHARE, TOP)
        if SCALED:
            value *= load_scale(scales_ptr, row, entry // scale_group, scales, m, SHARE)
        column = entry // KEEP * GROUP + position
        m = m & (position < GROUP) & (column < columns)
        new = ()
        for t in tl.static_range(TOKENS):
            token = tl.load(order_ptr + first + tl.minimum(t, count - 1)).to(tl.int64)
            x = tl.load(x_ptr + token * x_stride + column, mask=m, other=0).to(tl.float32)
            new = new + (acc[t] + x * value,)
        acc = new
    row = block * ROWS + tl.arange(0, ROWS)
    for t in tl.static_range(TOKENS):
        y = tl.sum(acc[t], 0)
        if not SCALED:
            y *= load_scale(scales_ptr, row, 0, 1, row < rows, SHARE)
        if t < count:
            token = tl.load(order_ptr + first + t).to(tl.int64)
            p_y = y_ptr + token * y_stride + row
            old = tl.load(p_y, mask=row < rows, other=0).to(tl.float32)
            tl.store(p_y, (old + y).to(y_ptr.dtype.element_ty), mask=row < rows)
