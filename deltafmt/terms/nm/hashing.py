"""The hashes that seeded positions follow from, with their constants (specification, section 11.4).

Compiled: ``kernels/cpu/loops/positions.c``. The kernels on a GPU take the constants from here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop

# "key(r) = mix(seed + r * ROW_STEP)" and "h = mix64(key(r) + block * BLOCK_STEP)".
ROW_STEP = 0x9E3779B1
BLOCK_STEP = 0x85EBCA6B
# The multipliers of the 32-bit mix, and of the two steps of the 64-bit one.
MIX_FIRST = 0x7FEB352D
MIX_SECOND = 0x846CA68B
FOLD = 0xCD9E8D57
SPREAD = 0xFFFEB2D5
HASH_BITS = 64


def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return a bijective 32-bit mix of ``x`` (constants: C. Wellons, hash-prospector, "lowbias32")."""
    x = x ^ x >> np.uint32(16)
    x = x * np.uint32(MIX_FIRST)
    x = x ^ x >> np.uint32(15)
    x = x * np.uint32(MIX_SECOND)
    return x ^ x >> np.uint32(16)


def mix64(x: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return 64 bits for every mixed 32-bit number: three steps, two of them multiplications to 64 bits.

    ``FOLD`` is a multiplier of Philox (Salmon et al. 2011); ``SPREAD`` is close to 2**32, so that the upper half of
    its product is as even as the lower.
    """
    wide = (x ^ x >> np.uint32(16)).astype(np.uint64) * np.uint64(FOLD)
    return (wide >> np.uint64(32) ^ wide & np.uint64(0xFFFFFFFF)) * np.uint64(SPREAD)


def lane_bits(n: int, m: int) -> int:
    """Return how many bits of a hash one group uses: 4, 8 or 16.

    The offset takes log2 M bits; where N > 1 the multiplier takes log2 M - 1 more.
    """
    log_m = m.bit_length() - 1
    needed = log_m if n == 1 else 2 * log_m - 1
    return 4 if needed <= 4 else 8 if needed <= 8 else 16


def _seeded(native: Native, seed: int, first: int, count: int, groups: int, n: int, m: int) -> NDArray[np.uint8]:
    out = np.empty((count, groups, n), np.uint8)
    native.seeded(out, seed, first, m, lane_bits(n, m))
    return out


@loop(_seeded)
def seeded(seed: int, first: int, count: int, groups: int, n: int, m: int) -> NDArray[np.uint8]:
    """Draw the positions of mask rows ``first`` to ``first + count``.

    Args:
        seed: the tensor seed, 32 bits.
        first, count: the mask rows.
        groups: groups in a row.
        n: N.
        m: M, a power of two from 2 to 128.
    """
    return drawn(seed, first, count, range(groups), n, m)


def drawn(seed: int, first: int, count: int, groups: range, n: int, m: int) -> NDArray[np.uint8]:
    """Draw the positions of some groups of mask rows ``first`` to ``first + count``; see :func:`seeded`."""
    width = lane_bits(n, m)
    per_hash = HASH_BITS // width
    log_m = m.bit_length() - 1
    # "key(r) = mix(seed + r * 0x9E3779B1)", modulo 2**32.
    rows = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    key = mix(np.uint32(seed) + rows * np.uint32(ROW_STEP))
    # "Group g takes lane g mod Q of block g div Q; h = mix64(key(r) + block * 0x85EBCA6B)."
    g = np.arange(groups.start, groups.stop, dtype=np.uint64).astype(np.uint32)
    blocks = g // np.uint32(per_hash)
    h = mix64(key[:, None] + blocks[None, :] * np.uint32(BLOCK_STEP))
    lane = (h >> (g % np.uint32(per_hash) * np.uint32(width)).astype(np.uint64)).astype(np.uint32)
    # "b is the lowest log2 M bits of the lane; a is the next log2 M - 1 bits, shifted up by one, plus 1."
    mask = np.uint32(m - 1)
    b = lane & mask
    a = lane >> np.uint32(log_m - 1) & mask | np.uint32(1)
    # "Entry i of the group is at (a * i + b) mod M."
    i = np.arange(n, dtype=np.uint32)
    return ((a[:, :, None] * i + b[:, :, None]) & mask).astype(np.uint8)
