"""XXH3-128 of many sections at once on a GPU, in two kernels; names are those of ``algorithm``.

Within a block of 1,024 bytes the stripes only add to the accumulators, so what a block adds is summed first, for all
blocks of all sections side by side, at the speed of memory. What is left is a chain over a section's blocks of one
addition and one scramble each, 8 lanes wide: one warp walks it for each section.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from deltafmt.kernels.recorded_launches import run
from deltafmt.kernels.xxh3 import algorithm

BLOCKS = 16
WORDS = algorithm.BLOCK_BYTES // 8
STRIPES = algorithm.BLOCK_BYTES // algorithm.STRIPE_BYTES
# This many blocks are loaded at once, because a scramble takes about 25 cycles and a load 700.
UNROLL = 64


@triton.jit
def _sums_kernel(
    p_data,  # int64, holds the sections
    p_sections,  # int64, (sections, 3): first word, bytes, first row of the sums
    p_secret,  # int64, (16, 8): the secret of each stripe of a block
    p_sums,  # int64, (blocks of all sections, 8): what a block adds
    BLOCKS: tl.constexpr,
):
    p_section = p_sections + tl.program_id(1) * 3
    # The last stripe is not one of those that come first, even where it ends a block.
    stripes = (tl.load(p_section + 1) - 1) // 64
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    if first * 16 > stripes:
        return
    p_words = p_data + tl.load(p_section) + first * 128
    o_block = tl.arange(0, BLOCKS)[:, None]
    o_word = tl.arange(0, 128)[None, :]
    mask = (first + o_block) * 16 + o_word // 8 < stripes
    words = tl.load(p_words + o_block * 128 + o_word, mask=mask, other=0)
    swapped = tl.load(p_words + o_block * 128 + (o_word ^ 1), mask=mask, other=0)
    key = words ^ tl.load(p_secret + o_word)
    # Both factors are below 2**32, and the low 64 bits of a product are the same for signed numbers.
    product = (key & 0xFFFFFFFF) * ((key >> 32) & 0xFFFFFFFF)
    added = tl.where(mask, product + swapped, 0)
    sums = tl.sum(tl.reshape(added, (BLOCKS, 16, 8)), 1)
    o_lane = tl.arange(0, 8)[None, :]
    p_row = p_sums + (tl.load(p_section + 2) + first) * 8
    tl.store(p_row + o_block * 8 + o_lane, sums, mask=(first + o_block) * 16 <= stripes)


@triton.jit
def _scrambled(accumulators, secret, prime):
    shifted = (accumulators >> 47) & 0x1FFFF
    return (accumulators ^ shifted ^ secret) * prime


@triton.jit
def _chain_kernel(
    p_data,  # int64, holds the sections
    p_sections,  # int64, (sections, 3): first word, bytes, first row of the sums
    p_constants,  # int64, (4, 8): the accumulators' start, the scramble's and the last stripe's secret, the prime
    p_sums,  # int64, (blocks of all sections, 8)
    p_out,  # int64, (sections, 8): accumulators
    UNROLL: tl.constexpr,
):
    p_section = p_sections + tl.program_id(0) * 3
    length = tl.load(p_section + 1)
    o_lane = tl.arange(0, 8)
    accumulators = tl.load(p_constants + o_lane)
    secret = tl.load(p_constants + 8 + o_lane)
    prime = tl.load(p_constants + 24 + o_lane)
    p_row = p_sums + tl.load(p_section + 2) * 8 + o_lane
    blocks = (length - 1) // 1024
    for _ in range(blocks // UNROLL):
        for i_block in tl.static_range(UNROLL):
            accumulators = _scrambled(accumulators + tl.load(p_row + i_block * 8), secret, prime)
        p_row += UNROLL * 8
    for _ in range(blocks % UNROLL):
        accumulators = _scrambled(accumulators + tl.load(p_row), secret, prime)
        p_row += 8
    accumulators += tl.load(p_row)
    # The last stripe begins at any byte.
    p_bytes = (p_data + tl.load(p_section)).to(tl.pointer_type(tl.uint8)) + (length - 64)
    o_byte = tl.arange(0, 8)[None, :]
    words = tl.load(p_bytes + o_lane[:, None] * 8 + o_byte).to(tl.int64) << (o_byte * 8)
    swapped = tl.load(p_bytes + (o_lane[:, None] ^ 1) * 8 + o_byte).to(tl.int64) << (o_byte * 8)
    key = tl.sum(words, 1) ^ tl.load(p_constants + 16 + o_lane)
    accumulators += tl.sum(swapped, 1) + (key & 0xFFFFFFFF) * ((key >> 32) & 0xFFFFFFFF)
    tl.store(p_out + tl.program_id(0) * 8 + o_lane, accumulators)


@functools.lru_cache(maxsize=16)
def _secret(device: torch.device) -> torch.Tensor:
    rows = [algorithm.lanes_at(algorithm.SECRET, 8 * stripe) for stripe in range(STRIPES)]
    return torch.from_numpy(np.stack(rows).view(np.int64)).to(device)


@functools.lru_cache(maxsize=16)
def _constants(device: torch.device) -> torch.Tensor:
    rows = (
        algorithm.START,
        algorithm.lanes_at(algorithm.SECRET, algorithm.SCRAMBLE_AT),
        algorithm.lanes_at(algorithm.SECRET, algorithm.LAST_STRIPE_AT),
        np.full(algorithm.LANES, algorithm.PRIME32_1, np.uint64),
    )
    return torch.from_numpy(np.stack(rows).view(np.int64)).to(device)


def accumulators(words: torch.Tensor, starts: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """Return the accumulators behind the last stripe of each section, on the current stream of a GPU.

    Args:
        words: int64, 1-d, holds the sections.
        starts: int64, the first word of each section.
        lengths: int64, bytes of each, more than 240.

    Returns:
        int64 with the bits of uint64, shape (sections, 8).
    """
    device = words.device
    rows = (lengths - 1) // algorithm.BLOCK_BYTES + 1
    table = np.stack([starts, lengths, np.cumsum(rows) - rows], 1).astype(np.int64)
    sections = torch.from_numpy(table).to(device)
    sums = torch.empty(int(rows.sum()), algorithm.LANES, dtype=torch.int64, device=device)
    out = torch.empty(len(table), algorithm.LANES, dtype=torch.int64, device=device)
    grid = triton.cdiv(int(rows.max()), BLOCKS), len(table)
    common = {"p_data": words, "p_sections": sections, "p_sums": sums}
    run(_sums_kernel, grid, **common, p_secret=_secret(device), BLOCKS=BLOCKS, num_warps=4)
    chain = {**common, "p_constants": _constants(device), "p_out": out}
    run(_chain_kernel, (len(table),), **chain, UNROLL=UNROLL, num_warps=1)
    return out
