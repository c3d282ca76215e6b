"""``rank`` to ``fixed`` as one Triton kernel a layout, whatever the number of tensors (spec, sections 11.2 and 11.4).

Each program makes whole words of one tile: it looks up every group whose positions touch them. A lane is a row, so that
words are loaded and stored side by side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from deltafmt.kernels.nm.rank_index.jobs import RankJob
from deltafmt.kernels.recorded_launches import run
from deltafmt.kernels.variants import is_collecting
from deltafmt.terms.nm.index.rank import binomials
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS, placed_planes, planes

# What a program is told of its tile: first word in source and in target, rows, groups, job.
TILE_FIELDS = tl.constexpr(5)
BLOCK_WORDS = 8
MAX_BLOCKS = 64


@triton.jit
def _fixed_kernel(
    p_source,  # int32: rank words
    p_target,  # int32: fixed words
    p_tiles,  # int64, (tiles, 5): first word in source and in target, rows, groups, job
    p_planes,  # int32, (planes, 2): width and lowest bit of the planes of a rank, then of those of a position
    p_binomials,  # int64, the bits of uint64: (N, M), then C(M, N) - 1
    p_wrong,  # int32, (jobs): set where a rank is out of range
    N: tl.constexpr,
    M: tl.constexpr,
    RANK_PLANES: tl.constexpr,
    POSITION_PLANES: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # ceil(log2 M)
    BLOCK: tl.constexpr,  # words that a program makes at a time
):
    p_tile = p_tiles + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    p_ranks = p_source + tl.load(p_tile)
    p_fixed = p_target + tl.load(p_tile + 1)
    m_lane = tl.arange(0, 32)[None, :] < tl.load(p_tile + 2)
    groups = tl.load(p_tile + 3)
    p_wrong += tl.load(p_tile + 4)
    o_lane = tl.arange(0, 32)[None, :]
    highest = tl.load(p_binomials + N * M).to(tl.uint64, bitcast=True)
    for i_plane in range(RANK_PLANES, RANK_PLANES + POSITION_PLANES):
        width = tl.load(p_planes + 2 * i_plane)
        low = tl.load(p_planes + 2 * i_plane + 1)
        fields = 32 // width
        words = (groups * N * width + 31) >> 5
        for i_block in range(tl.program_id(1), (words + BLOCK - 1) // BLOCK, tl.num_programs(1)):
            o_word = tl.arange(0, BLOCK)[:, None].to(tl.int64) + i_block * BLOCK
            first_entry = o_word * fields
            b_fixed = tl.zeros((BLOCK, 32), tl.uint32)
            b_wrong = tl.zeros((BLOCK, 32), tl.int32)
            for i_group in range((fields + N - 2) // N + 1):
                group = first_entry // N + i_group
                m_group = (group < groups) & (o_word < words) & m_lane
                rest = tl.zeros((BLOCK, 32), tl.uint64)
                p_plane = p_ranks
                for i_part in range(RANK_PLANES):
                    rank_width = tl.load(p_planes + 2 * i_part)
                    bit = group * rank_width
                    part = tl.load(p_plane + (bit >> 5) * 32 + o_lane, mask=m_group, other=0)
                    # In 64 bits, because a plane can be as wide as a word.
                    mask = (tl.full((1, 1), 1, tl.uint64) << rank_width.to(tl.uint64)) - 1
                    part = (part.to(tl.uint32, bitcast=True) >> (bit & 31).to(tl.uint32)).to(tl.uint64) & mask
                    rest |= part << tl.load(p_planes + 2 * i_part + 1).to(tl.uint64)
                    p_plane += ((groups * rank_width + 31) >> 5) * 32
                b_wrong |= (m_group & (rest > highest)).to(tl.int32)
                for i_step in range(N):
                    i_entry = N - 1 - i_step
                    # The largest p below M with C(p, i + 1) at most what is left of the rank, a bit at a time.
                    p_column = p_binomials + i_entry * M
                    position = tl.zeros((BLOCK, 32), tl.int32)
                    for i_bit in tl.static_range(SEARCH_STEPS):
                        tried = position + (1 << (SEARCH_STEPS - 1 - i_bit))
                        found = tl.load(p_column + tried, mask=tried < M, other=0).to(tl.uint64, bitcast=True)
                        position = tl.where((tried < M) & (found <= rest), tried, position)
                    rest -= tl.load(p_column + position).to(tl.uint64, bitcast=True)
                    number = (group * N + i_entry - first_entry).to(tl.int32)
                    m_field = m_group & (number >= 0) & (number < fields)
                    field = (position >> low) & ((1 << width) - 1)
                    shift = tl.where(m_field, number * width, 0)
                    b_fixed |= tl.where(m_field, field, 0).to(tl.uint32) << shift.to(tl.uint32)
            tl.store(p_fixed + o_word * 32 + o_lane, b_fixed.to(tl.int32, bitcast=True), mask=o_word < words)
            tl.store(p_wrong, 1, mask=tl.max(tl.max(b_wrong, 1), 0) > 0)
        p_fixed += words * 32


@functools.lru_cache(maxsize=16)
def _planes(rank_bits: int, position_bits: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(placed_planes(rank_bits) + placed_planes(position_bits), dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=16)
def _table(layout: NMLayout, device: torch.device) -> torch.Tensor:
    highest = np.array([math.comb(layout.m, layout.n) - 1], np.uint64)
    table = np.concatenate([binomials(layout.n, layout.m).reshape(-1), highest])
    return torch.from_numpy(table.view(np.int64)).to(device)


def _tile_rows(number: int, job: RankJob) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    count, source_words, _ = job.source_shape
    target_words = job.target_shape[1]
    tile = np.arange(count, dtype=np.int64)
    rows = np.empty((count, TILE_FIELDS.value), np.int64)
    rows[:, 0] = job.source + tile * source_words * TILE_ROWS
    rows[:, 1] = job.target + tile * target_words * TILE_ROWS
    rows[:, 2] = np.minimum(job.mask_rows - tile * TILE_ROWS, TILE_ROWS)
    rows[:, 3] = job.layout.groups(job.columns)
    rows[:, 4] = number
    return rows


def launch_conversion(source: torch.Tensor, target: torch.Tensor, jobs: Sequence[RankJob]) -> list[int]:
    """Do what :func:`deltafmt.kernels.nm.rank_index.decode.convert_words` does, on the current stream of a GPU.

    Waits for the kernels, to tell which indexes are wrong.
    """
    device = target.device
    wrong = torch.zeros(len(jobs), dtype=torch.int32, device=device)
    by_layout: dict[tuple[int, int], list[int]] = {}
    for number, job in enumerate(jobs):
        by_layout.setdefault((job.layout.n, job.layout.m), []).append(number)
    for numbers in by_layout.values():
        layout = jobs[numbers[0]].layout
        table = np.concatenate([_tile_rows(number, jobs[number]) for number in numbers])
        words = max(jobs[number].target_shape[1] for number in numbers)
        run(
            _fixed_kernel,
            (len(table), max(min(triton.cdiv(words, BLOCK_WORDS), MAX_BLOCKS), 1)),
            p_source=source,
            p_target=target,
            p_tiles=torch.from_numpy(table).to(device),
            p_planes=_planes(layout.rank_bits, layout.position_bits, device),
            p_binomials=_table(layout, device),
            p_wrong=wrong,
            N=layout.n,
            M=layout.m,
            RANK_PLANES=len(planes(layout.rank_bits)),
            POSITION_PLANES=len(planes(layout.position_bits)),
            SEARCH_STEPS=layout.position_bits,
            BLOCK=BLOCK_WORDS,
            num_warps=4,
        )
    if is_collecting():
        return []
    return [int(number) for number in wrong.nonzero()[:, 0].cpu()]
