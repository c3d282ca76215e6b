"""Which entries of a group are kept: drawn from a seed, or read from an index (spec/deltafmt-v1.md, section 11.4).

Positions are uint8 arrays of shape (mask rows, groups, N), each value below M. This is the reference;
``deltafmt.terms.codec_numba`` holds the same functions compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.nm.layout import NMLayout

ROW_STEP = 0x9E3779B1
BLOCK_STEP = 0x85EBCA6B
FOLD = 0xCD9E8D57
SPREAD = 0xFFFEB2D5


def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return a bijective 32-bit mix of ``x`` (constants: C. Wellons, hash-prospector, "lowbias32")."""
    x = x ^ x >> np.uint32(16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ x >> np.uint32(15)
    x = x * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def mix64(x: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return 64 bits for every mixed 32-bit number: three steps, two of them multiplications to 64 bits.

    ``FOLD`` is a multiplier of Philox (Salmon et al. 2011); ``SPREAD`` is close to 2**32, so that the upper half of
    its product is as even as the lower.
    """
    wide = (x ^ x >> np.uint32(16)).astype(np.uint64) * np.uint64(FOLD)
    return (wide >> np.uint64(32) ^ wide & np.uint64(0xFFFFFFFF)) * np.uint64(SPREAD)


def lane_bits(keep: int, group: int) -> int:
    """Return how many bits of a hash one group uses: 4, 8 or 16.

    The offset takes log2 M bits; where N > 1 the multiplier takes log2 M - 1 more.
    """
    log_m = group.bit_length() - 1
    needed = log_m if keep == 1 else 2 * log_m - 1
    return 4 if needed <= 4 else 8 if needed <= 8 else 16


def seeded(seed: int, first: int, count: int, groups: int, keep: int, group: int) -> NDArray[np.uint8]:
    """Draw the positions of mask rows ``first`` to ``first + count``.

    Args:
        seed: the tensor seed, 32 bits.
        first, count: the mask rows.
        groups: groups in a row.
        keep: N.
        group: M, a power of two from 2 to 128.
    """
    width = lane_bits(keep, group)
    per_hash = 64 // width
    log_m = group.bit_length() - 1
    # "key(r) = mix(seed + r * 0x9E3779B1)", modulo 2**32.
    rows = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    key = mix(np.uint32(seed) + rows * np.uint32(ROW_STEP))
    # "Group g takes lane g mod Q of block g div Q; h = mix64(key(r) + block * 0x85EBCA6B)."
    g = np.arange(groups, dtype=np.uint32)
    blocks = g // np.uint32(per_hash)
    h = mix64(key[:, None] + blocks[None, :] * np.uint32(BLOCK_STEP))
    lane = (h >> (g % np.uint32(per_hash) * np.uint32(width)).astype(np.uint64)).astype(np.uint32)
    # "b is the lowest log2 M bits of the lane; a is the next log2 M - 1 bits, shifted up by one, plus 1."
    mask = np.uint32(group - 1)
    b = lane & mask
    a = lane >> np.uint32(log_m - 1) & mask | np.uint32(1)
    # "Entry i of the group is at (a * i + b) mod M."
    i = np.arange(keep, dtype=np.uint32)
    return ((a[:, :, None] * i + b[:, :, None]) & mask).astype(np.uint8)


def decode_fixed(
    packed: NDArray[np.uint32],
    layout: NMLayout,
    mask_rows: int,
    groups: int,
    unpack: Callable[..., NDArray[np.unsignedinteger]] = words.unpack,
) -> NDArray[np.uint8]:
    """Read a ``fixed`` index.

    Raises:
        InvalidFileError: a position is not below M, or the positions of a group do not ascend.
    """
    fields = unpack(packed, mask_rows, groups * layout.keep, layout.position_bits, 1)
    positions = fields.astype(np.uint8, copy=True).reshape(mask_rows, groups, layout.keep)
    check_ascending(positions, layout.group)
    return positions


def check_ascending(positions: NDArray[np.uint8], group: int) -> None:
    """Check that every group's positions are below M and strictly ascending."""
    wrong = positions >= group
    wrong[:, :, 1:] |= positions[:, :, 1:] <= positions[:, :, :-1]
    if wrong.any():
        row, g, i = (int(x) for x in np.argwhere(wrong)[0])
        raise InvalidFileError(
            f"mask row {row}, group {g}: entry {i} is at {positions[row, g, i]}, "
            f"which is not ascending and below {group}"
        )


def encode_fixed(positions: NDArray[np.uint8], layout: NMLayout) -> NDArray[np.uint32]:
    """Write a ``fixed`` index."""
    return words.pack(positions.reshape(positions.shape[0], -1), layout.position_bits)


@functools.cache
def binomials(keep: int, group: int) -> NDArray[np.uint64]:
    """Return C(p, i + 1) at [i, p] for p < M, i < N.

    Every value that a rank can use is below C(M, N) < 2**64; those that it cannot are held at 2**64 - 1.
    """
    table = np.empty((keep, group), np.uint64)
    for i in range(keep):
        for p in range(group):
            table[i, p] = min(math.comb(p, i + 1), 2**64 - 1)
    return table


def encode_rank(positions: NDArray[np.uint8], layout: NMLayout) -> NDArray[np.uint32]:
    """Write a ``rank`` index: the combinatorial number of every group's ascending positions."""
    table = binomials(layout.keep, layout.group)
    # "rank = C(p_0, 1) + C(p_1, 2) + ... + C(p_{N-1}, N)"
    ranks = np.zeros(positions.shape[:2], np.uint64)
    for i in range(layout.keep):
        ranks += table[i][positions[:, :, i]]
    return words.pack(ranks, layout.rank_bits)


def decode_rank(packed: NDArray[np.uint32], layout: NMLayout, mask_rows: int, groups: int) -> NDArray[np.uint8]:
    """Read a ``rank`` index.

    Raises:
        InvalidFileError: a rank is not below C(M, N).
    """
    ranks = words.unpack(packed, mask_rows, groups, layout.rank_bits)
    total = math.comb(layout.group, layout.keep)
    if ranks.size and int(ranks.max()) >= total:
        row, g = (int(x) for x in np.argwhere(ranks >= total)[0])
        raise InvalidFileError(f"mask row {row}, group {g}: rank {ranks[row, g]} is not below {total}")
    table = binomials(layout.keep, layout.group)
    positions = np.empty((mask_rows, groups, layout.keep), np.uint8)
    rest = ranks.copy()
    # "p_i, from i = N-1 down to 0, is the largest p with C(p, i+1) at most what is left of the rank."
    for i in range(layout.keep - 1, -1, -1):
        p = np.searchsorted(table[i], rest, side="right") - 1
        positions[:, :, i] = p
        rest -= table[i][p]
    return positions
