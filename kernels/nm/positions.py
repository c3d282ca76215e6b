"""Where the kept elements of an ``nm`` term stand, in kernels: positions one by one, or of a chunk (section 11.4).

Two encodings, chosen by INDEX (:mod:`deltafmt.kernels.nm.index`):

- seeded: nothing is stored. A 64-bit hash of (seed, mask row, number) serves ``64 / INDEX_BITS`` groups. The INDEX_BITS
  of a group give a and b, with a odd, and kept element i stands at ``(a * i + b) mod M``; M is a power of two.
- fixed: INDEX_BITS of each position are stored, as fields of the mask row's own words.

Only this file depends on the encoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels.nm import index
from deltafmt.kernels.nm.fields import load_field, load_planes, spread_fields
from deltafmt.terms.nm import hashing

INDEX_FIXED = tl.constexpr(index.FIXED)
ROW_STEP = tl.constexpr(hashing.ROW_STEP)
BLOCK_STEP = tl.constexpr(hashing.BLOCK_STEP)
MIX_FIRST = tl.constexpr(hashing.MIX_FIRST)
MIX_SECOND = tl.constexpr(hashing.MIX_SECOND)
FOLD = tl.constexpr(hashing.FOLD)
SPREAD = tl.constexpr(hashing.SPREAD)


@triton.jit
def mix(x):
    """Spec section 11.4: the 32-bit mix, on uint32."""
    x ^= x >> 16
    x *= MIX_FIRST
    x ^= x >> 15
    x *= MIX_SECOND
    x ^= x >> 16
    return x


@triton.jit
def mix64(x):
    """Spec section 11.4: 64 bits for each uint32, as their lower and upper halves."""
    wide = (x ^ (x >> 16)).to(tl.uint64) * FOLD
    wide = ((wide >> 32).to(tl.uint32) ^ wide.to(tl.uint32)).to(tl.uint64) * SPREAD
    return wide.to(tl.uint32), (wide >> 32).to(tl.uint32)


@triton.jit
def load_position(
    index_ptr,
    seed,
    mask_row,
    element,
    kept,
    index_words,
    mask,
    N: tl.constexpr,
    M: tl.constexpr,
    INDEX: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    POSITION_BITS: tl.constexpr,
):
    """Section 11.4: return the position in its group of each kept element, int32.

    Positions of a damaged ``fixed`` index with M not a power of two can reach beyond M, but not beyond the group's
    padded width; what is done with them is the caller's to mask.
    """
    if INDEX == INDEX_FIXED:
        p_words = index_ptr + (mask_row // 32).to(tl.int64) * index_words * 32 + mask_row % 32
        return load_field(p_words, element, mask, INDEX_BITS, kept).to(tl.int32)
    else:
        LANES: tl.constexpr = 64 // INDEX_BITS
        group = element // N
        key = mix(mask_row.to(tl.uint32) * ROW_STEP + seed)
        low, high = mix64(key + (group // LANES).to(tl.uint32) * BLOCK_STEP)
        half = tl.where(group % LANES < LANES // 2, low, high)
        lane = half >> (group % (LANES // 2) * INDEX_BITS).to(tl.uint32)
        b = lane & (M - 1)
        a = ((lane >> (POSITION_BITS - 1)) & (M - 1)) | 1
        return ((a * (element % N).to(tl.uint32) + b) & (M - 1)).to(tl.int32)


@triton.jit
def seeded_positions(key, step, ELEMENTS: tl.constexpr, N: tl.constexpr, LOG_M: tl.constexpr, INDEX_BITS: tl.constexpr):
    """Section 11.4: return positions, uint32, shape (ELEMENTS, steps, mask rows); a hash serves several groups."""
    LANES: tl.constexpr = 32 // INDEX_BITS  # of one half
    HASHES: tl.constexpr = ELEMENTS // (N * LANES * 2)
    MASK: tl.constexpr = (1 << LOG_M) - 1
    number = step[None, :] * HASHES + tl.arange(0, HASHES)[:, None]
    low, high = mix64(key[None, None, :] + (number.to(tl.uint32) * BLOCK_STEP)[:, :, None])
    half = tl.where((tl.arange(0, 2) == 0)[None, :, None, None], low[:, None], high[:, None])
    lane = half[:, :, None, :, :] >> (tl.arange(0, LANES).to(tl.uint32) * INDEX_BITS)[None, None, :, None, None]
    lane = tl.reshape(lane, [HASHES, LANES * 2, step.shape[0], key.shape[0]])
    b = lane & MASK
    if N == 1:
        return tl.reshape(b, [ELEMENTS, step.shape[0], key.shape[0]])
    else:
        a = ((lane >> (LOG_M - 1)) & MASK) | 1
        i = tl.arange(0, N).to(tl.uint32)
        p = (a[:, :, None] * i[None, None, :, None, None] + b[:, :, None]) & MASK
        return tl.reshape(p, [ELEMENTS, step.shape[0], key.shape[0]])


@triton.jit
def fixed_positions(p_words, words0, words1, words2, step, m_rows, ELEMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Section 11.4: return the positions of a ``fixed`` index, uint32, shape (ELEMENTS, steps, mask rows)."""
    W0: tl.constexpr = 4 if WIDTH >= 4 else 2 if WIDTH >= 2 else 1
    p = spread_fields(load_planes(p_words, words0, 0, step, m_rows, ELEMENTS, W0), ELEMENTS, W0)
    LEFT: tl.constexpr = WIDTH - W0
    if LEFT > 0:
        W1: tl.constexpr = 2 if LEFT >= 2 else 1
        loaded = load_planes(p_words, words1, words0, step, m_rows, ELEMENTS, W1)
        p |= spread_fields(loaded, ELEMENTS, W1) << W0
        if LEFT > W1:
            loaded = load_planes(p_words, words2, words0 + words1, step, m_rows, ELEMENTS, 1)
            p |= spread_fields(loaded, ELEMENTS, 1) << (W0 + W1)
    return p


@triton.jit
def row_index(index_ptr, seed, mask_row, index_words, INDEX: tl.constexpr):
    """Return what :func:`chunk_positions` needs of each mask row: its key, or the address of its first word."""
    if INDEX == INDEX_FIXED:
        return index_ptr + (mask_row // 32).to(tl.int64) * (index_words * 32) + mask_row % 32
    else:
        return mix(mask_row.to(tl.uint32) * ROW_STEP + seed)


@triton.jit
def chunk_positions(
    rows, places0, places1, places2, step, m_rows,
    INDEX: tl.constexpr, ELEMENTS: tl.constexpr, N: tl.constexpr, LOG_M: tl.constexpr, INDEX_BITS: tl.constexpr,
):  # fmt: skip
    """Return the positions of some steps of some mask rows, uint32, shape (ELEMENTS, steps, mask rows).

    ``rows`` is what :func:`row_index` gave; ``places`` are the words of a row in each plane of a stored index.
    """
    if INDEX == INDEX_FIXED:
        return fixed_positions(rows, places0, places1, places2, step, m_rows, ELEMENTS, INDEX_BITS)
    else:
        return seeded_positions(rows, step, ELEMENTS, N, LOG_M, INDEX_BITS)
