"""The low-rank kernels: few tokens, ``y += U^T (V x)`` from packed vectors, the matrix never made (spec, section 13).

U has the shape (R, rows) and V (R, columns), each a float or a code with a scale; a vector's words follow each other.
Two launches, each over the token tiles:

- ``project_kernel`` writes ``z = V x``, float32, shape (token tiles, parts, TOKENS, ranks), with ``ranks`` at least
  every R of the launch. A program owns 32 vectors of V of one part, a lane each. It differs from the lowbit kernel in
  where words lie.
- ``spread_kernel`` adds ``U^T z``. A program owns ``32 * UNITS`` rows of one part and goes through the vectors of U,
  VECTORS at a time. A unit is 32 rows: in a plane of width w, exactly w words of a vector hold its fields. So every
  field of a unit has its own sum (32 for each token, each of the shape (VECTORS, UNITS)), whatever the planes are.

Codes are multiplied without a conversion (:mod:`deltafmt.kernels.device_functions`). In ``spread``, ``z * scale`` takes
the place of x: it is scaled by ``2**(64 - b)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.coded_words import add_plane
from deltafmt.kernels.device_functions import (
    add_to_rows,
    add_token,
    load_address,
    load_token_tile,
    load_words,
    record_address,
    select_part,
    token_pointers,
    zeros_tuple,
)
from deltafmt.kernels.lowrank.kind import RECORD

FIELDS = tl.constexpr(len(RECORD))
U = tl.constexpr(RECORD.offset("u"))
U_ZERO_POINTS = tl.constexpr(RECORD.offset("u_zero_points"))
U_SCALES = tl.constexpr(RECORD.offset("u_scales"))
V = tl.constexpr(RECORD.offset("v"))
V_ZERO_POINTS = tl.constexpr(RECORD.offset("v_zero_points"))
V_SCALES = tl.constexpr(RECORD.offset("v_scales"))
RANK = tl.constexpr(RECORD.offset("rank"))
ROWS = tl.constexpr(RECORD.offset("rows"))


@triton.jit
def project_kernel(
    x_ptr, x_stride, order_ptr, tiles_ptr, records_ptr, z_ptr,
    columns, ranks, blocks, code_words, words0, words1, words2, scale_group, scales,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr, TOP: tl.constexpr, DTYPE: tl.constexpr,
    ZEROS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write ``z = V x`` of one token tile and 32 vectors to z, shape (token tiles, PARTS, TOKENS, ranks).

    Args:
        x_ptr, ..., records_ptr, columns: as for all product kernels (``launch_arguments.py``).
        ranks: at least every rank of the launch; an operand's own rank is in its record.
        blocks: programs of a part: blocks of 32 vectors.
        code_words, ..., EVEN: as for the lowbit kernel; PLANE0 is 0 if V is stored as floats of DTYPE.
    """
    tile = tl.program_id(1)
    slot, first, count = load_token_tile(tiles_ptr, tile)
    if count == 0:
        return
    part = tl.program_id(0) // blocks
    p_record = record_address(records_ptr, slot, part, PARTS, FIELDS)
    rank = tl.load(p_record + RANK).to(tl.int32)
    vector = (tl.program_id(0) % blocks) * 32 + tl.arange(0, 32)
    m_vectors = vector < rank
    if tl.program_id(0) % blocks * 32 >= rank:
        return
    vector64 = vector.to(tl.int64)
    p_x = token_pointers(x_ptr, x_stride, order_ptr, first, count, TOKENS)
    total = zeros_tuple(TOKENS, WORDS, 32)
    if PLANE0 == 0:
        p_values = load_address(p_record, V, DTYPE) + vector64 * columns
        for start in range(0, columns, WORDS):
            column = start + tl.arange(0, WORDS)
            m = (column < columns)[:, None] & m_vectors[None, :]
            value = tl.load(p_values[None, :] + column[:, None], mask=m, other=0).to(tl.float32)
            new_total = ()
            for t in tl.static_range(TOKENS):
                x = tl.load(p_x[t] + column, mask=column < columns, other=0).to(tl.float32)
                new_total = new_total + (tl.fma(value, x[:, None].broadcast_to(value.shape), total[t]),)
            total = new_total
    else:
        p_codes = load_words(p_record, V) + vector64 * code_words
        p_zeros = load_address(p_record, V_ZERO_POINTS, tl.uint8) + vector64 * scales
        p_scales = load_address(p_record, V_SCALES, DTYPE) + vector64 * scales
        total = add_plane(
            total, p_codes, m_vectors, 0, words0, p_scales, p_zeros, scale_group, p_x, p_scales, columns,
            TOKENS, PLANE0, 0, TOP, False, ZEROS, WORDS, EVEN, 1,
        )  # fmt: skip
        if PLANE1 > 0:
            total = add_plane(
                total, p_codes, m_vectors, words0, words1, p_scales, p_zeros, scale_group, p_x, p_scales, columns,
                TOKENS, PLANE1, PLANE0, TOP, False, ZEROS, WORDS, EVEN, 1,
            )  # fmt: skip
        if PLANE2 > 0:
            total = add_plane(
                total, p_codes, m_vectors, words0 + words1, words2, p_scales, p_zeros, scale_group, p_x, p_scales,
                columns, TOKENS, PLANE2, PLANE0 + PLANE1, TOP, False, ZEROS, WORDS, EVEN, 1,
            )  # fmt: skip
    p_z = z_ptr + (tile * PARTS + part).to(tl.int64) * TOKENS * ranks + vector
    for t in tl.static_range(TOKENS):
        tl.store(p_z + t * ranks, tl.sum(total[t], 0), mask=m_vectors)


@triton.jit
def spread_plane(sums, weights, p_words, words, m, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Return the 32 sums of each token with one plane's fields times the weights, times 2**-85, added.

    Args:
        sums: for row j of a unit and token t, sum ``j * TOKENS + t``, shape (VECTORS, UNITS).
        weights: for each token, ``z * scale``, shape (VECTORS, UNITS).
        p_words, words: the first word of each vector and unit in this plane, and how many words follow from there on.
        m: which vectors and units exist.
        WIDTH, LOW: bits of a field in this plane, and the lowest bit of a code that the plane holds.
    """
    HALF: tl.constexpr = 16 // WIDTH
    new_sums = ()
    for i_word in tl.static_range(WIDTH):
        word = tl.load(p_words + i_word, mask=m & (words > i_word), other=0).to(tl.uint32, bitcast=True)
        for half in tl.static_range(2):
            shifted = word >> (16 * half)
            for i in tl.static_range(HALF):
                field = (shifted & (((1 << WIDTH) - 1) << (i * WIDTH))).to(tl.float32, bitcast=True)
                for t in tl.static_range(TOKENS):
                    weight = weights[t] * (2.0 ** (64 + LOW - i * WIDTH))
                    old = sums[((i_word * 2 + half) * HALF + i) * TOKENS + t]
                    new_sums = new_sums + (tl.fma(field, weight, old),)
    return new_sums


@triton.jit(do_not_specialize=["block1", "block2"])
def spread_kernel(
    order_ptr, tiles_ptr, records_ptr, z_ptr,
    y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, block1, block2, ranks, scale_group,
    PARTS: tl.constexpr, TOKENS: tl.constexpr,
    PLANE0: tl.constexpr, PLANE1: tl.constexpr, PLANE2: tl.constexpr, TOP: tl.constexpr, DTYPE: tl.constexpr,
    ZEROS: tl.constexpr, VECTORS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Add ``U^T z`` of one token tile and 32 * UNITS rows to the outputs; arguments as for :func:`project_kernel`."""
    tile = tl.program_id(1)
    slot, first, count = load_token_tile(tiles_ptr, tile)
    if count == 0:
        return
    part, block, y_ptr, y_stride = select_part(
        tl.program_id(0), block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS
    )
    p_record = record_address(records_ptr, slot, part, PARTS, FIELDS)
    rank = tl.load(p_record + RANK).to(tl.int32)
    rows = tl.load(p_record + ROWS).to(tl.int32)
    if block * (32 * UNITS) >= rows:
        return
    p_z = z_ptr + (tile * PARTS + part).to(tl.int64) * TOKENS * ranks
    if PLANE0 == 0:
        row = block * (32 * UNITS) + tl.arange(0, 32 * UNITS)
        m_rows = row < rows
        p_values = load_address(p_record, U, DTYPE) + row
        total = zeros_tuple(TOKENS, VECTORS, 32 * UNITS)
        for start in range(0, rank, VECTORS):
            vector = start + tl.arange(0, VECTORS)
            m_vectors = vector < rank
            m = m_vectors[:, None] & m_rows[None, :]
            p = p_values[None, :] + (vector.to(tl.int64) * rows)[:, None]
            value = tl.load(p, mask=m, other=0).to(tl.float32)
            new_total = ()
            for t in tl.static_range(TOKENS):
                z = tl.load(p_z + t * ranks + vector, mask=m_vectors, other=0)
                new_total = new_total + (tl.fma(value, z[:, None].broadcast_to(value.shape), total[t]),)
            total = new_total
        for t in tl.static_range(TOKENS):
            add_token(y_ptr, y_stride, order_ptr, first, t, count, row, m_rows, tl.sum(total[t], 0))
    else:
        words0 = tl.cdiv(rows * PLANE0, 32)
        words1 = tl.cdiv(rows * PLANE1, 32)
        words2 = tl.cdiv(rows * PLANE2, 32)
        code_words = words0 + words1 + words2
        scales = tl.cdiv(rows, scale_group)
        unit = block * UNITS + tl.arange(0, UNITS)
        m_units = unit * 32 < rows
        p_codes = load_words(p_record, U)
        p_zeros = load_address(p_record, U_ZERO_POINTS, tl.uint8) + unit * 32 // scale_group
        p_scales = load_address(p_record, U_SCALES, DTYPE) + unit * 32 // scale_group
        offsets = zeros_tuple(TOKENS, VECTORS, UNITS)
        sums = zeros_tuple(32 * TOKENS, VECTORS, UNITS)
        for start in range(0, rank, VECTORS):
            vector = start + tl.arange(0, VECTORS)
            m_vectors = vector < rank
            m = m_vectors[:, None] & m_units[None, :]
            vector64 = vector.to(tl.int64)[:, None]
            scale = tl.load(p_scales[None, :] + vector64 * scales, mask=m, other=0).to(tl.float32)
            if ZEROS:
                zero = tl.load(p_zeros[None, :] + vector64 * scales, mask=m, other=0).to(tl.float32)
            else:
                zero = TOP / 2
            weights = ()
            new_offsets = ()
            for t in tl.static_range(TOKENS):
                z = tl.load(p_z + t * ranks + vector, mask=m_vectors, other=0)
                weight = scale * z[:, None]
                weights = weights + (weight,)
                new_offsets = new_offsets + (offsets[t] + zero * weight,)
            offsets = new_offsets
            p_words = p_codes + vector64 * code_words
            sums = spread_plane(
                sums, weights, p_words + (unit * PLANE0)[None, :], (words0 - unit * PLANE0)[None, :], m,
                TOKENS, PLANE0, 0,
            )  # fmt: skip
            if PLANE1 > 0:
                sums = spread_plane(
                    sums, weights, p_words + (words0 + unit * PLANE1)[None, :], (words1 - unit * PLANE1)[None, :], m,
                    TOKENS, PLANE1, PLANE0,
                )  # fmt: skip
            if PLANE2 > 0:
                sums = spread_plane(
                    sums, weights, p_words + (words0 + words1 + unit * PLANE2)[None, :],
                    (words2 - unit * PLANE2)[None, :], m, TOKENS, PLANE2, PLANE0 + PLANE1,
                )  # fmt: skip
        for t in tl.static_range(TOKENS):
            offset = tl.sum(offsets[t], 0)
            if t < count:
                token = tl.load(order_ptr + first + t).to(tl.int64)
                p_y = y_ptr + token * y_stride + unit * 32
                for j in tl.static_range(32):
                    y = tl.sum(sums[j * TOKENS + t], 0) * (2.0**85) - offset
                    add_to_rows(p_y + j, y, unit * 32 + j < rows)
