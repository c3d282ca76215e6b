"""Reading an ``nm`` term on a GPU, one kept entry at a time: any N:M, width, index and scale group.

The obvious form, in which every element of a tile is one entry of one row; the gather kernel has a faster one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """Spec section 11.4: the 32-bit mix, on uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def mix64(x):
    """Spec section 11.4: 64 bits for each uint32, as their lower and upper halves."""
    wide = (x ^ (x >> 16)).to(tl.uint64) * 0xCD9E8D57
    wide = ((wide >> 32).to(tl.uint32) ^ wide.to(tl.uint32)).to(tl.uint64) * 0xFFFEB2D5
    return wide.to(tl.uint32), (wide >> 32).to(tl.uint32)


@triton.jit
def load_field(p_words, entry, mask, WIDTH: tl.constexpr, count):
    """Section 11.2: return field ``entry`` of word streams, uint32.

    ``p_words`` points to each row's word 0; its word w is 32 words further on for each w. Planes follow each other.
    """
    W0: tl.constexpr = 8 if WIDTH >= 8 else 4 if WIDTH >= 4 else 2 if WIDTH >= 2 else 1
    word = tl.load(p_words + (entry * W0 // 32) * 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
    value = (word >> (entry * W0 % 32).to(tl.uint32)) & ((1 << W0) - 1)
    LEFT: tl.constexpr = WIDTH - W0
    if LEFT > 0:
        W1: tl.constexpr = 2 if LEFT >= 2 else 1
        start = (count * W0 + 31) // 32
        word = tl.load(p_words + (start + entry * W1 // 32) * 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
        value |= ((word >> (entry * W1 % 32).to(tl.uint32)) & ((1 << W1) - 1)) << W0
        LAST: tl.constexpr = LEFT - W1
        if LAST > 0:
            start += (count * W1 + 31) // 32
            word = tl.load(p_words + (start + entry // 32) * 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
            value |= ((word >> (entry % 32).to(tl.uint32)) & 1) << (W0 + W1)
    return value


@triton.jit
def load_position(
    index_ptr,
    seed,
    mask_row,
    entry,
    kept,
    index_words,
    mask,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    LANE_BITS: tl.constexpr,
    POSITION_BITS: tl.constexpr,
):
    """Section 11.4: return the position in its group of each entry, int32; LANE_BITS is 0 for a ``fixed`` index.

    Positions of a damaged ``fixed`` index with M not a power of two can reach beyond M, but not beyond the group's
    padded width; what is done with them is the caller's to mask.
    """
    if LANE_BITS == 0:
        p_words = index_ptr + (mask_row // 32).to(tl.int64) * index_words * 32 + mask_row % 32
        return load_field(p_words, entry, mask, POSITION_BITS, kept).to(tl.int32)
    else:
        LANES: tl.constexpr = 64 // LANE_BITS
        group = entry // KEEP
        key = mix(mask_row.to(tl.uint32) * 0x9E3779B1 + seed)
        low, high = mix64(key + (group // LANES).to(tl.uint32) * 0x85EBCA6B)
        half = tl.where(group % LANES < LANES // 2, low, high)
        lane = half >> (group % (LANES // 2) * LANE_BITS).to(tl.uint32)
        b = lane & (GROUP - 1)
        a = ((lane >> (POSITION_BITS - 1)) & (GROUP - 1)) | 1
        return ((a * (entry % KEEP).to(tl.uint32) + b) & (GROUP - 1)).to(tl.int32)


@triton.jit
def load_code(
    codes_ptr, row, entry, kept, code_words, mask, BITS: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr
):
    """Section 11.5: return ``2u - top`` of each entry, float32."""
    tile = (row // (32 * SHARE)) * SHARE + row % SHARE
    lane = (row % (32 * SHARE)) // SHARE
    p_words = codes_ptr + tile.to(tl.int64) * code_words * 32 + lane
    u = load_field(p_words, entry, mask, BITS, kept)
    return (u.to(tl.int32) * 2 - TOP).to(tl.float32)


@triton.jit
def load_scale(scales_ptr, row, number, scales, mask, SHARE: tl.constexpr):
    """Section 11.3: return half of scale ``number`` of each row, float32."""
    tile = (row // (32 * SHARE)) * SHARE + row % SHARE
    lane = (row % (32 * SHARE)) // SHARE
    scale = tl.load(scales_ptr + (tile.to(tl.int64) * scales + number) * 32 + lane, mask=mask, other=0)
    return scale.to(tl.float32) * 0.5
