"""From ``rank`` to ``fixed`` in torch, for devices without the kernel: unpack, look up, pack (sections 11.2 and 11.4).

Ranks take up to 64 bits. They are held in int64 as the same bits, and compared as if unsigned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from deltafmt.kernels.nm.rank_index.jobs import RankJob
from deltafmt.terms.nm.index.rank import binomials
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS, placed_planes

_MASK = 0xFFFFFFFF
_SIGN = -(2**63)


def unpack_ranks(words: torch.Tensor, rows: int, count: int, width: int) -> torch.Tensor:
    """Section 11.2: return fields of up to 64 bits.

    Args:
        words: int32, shape (tiles, words, 32).
        rows, count, width: of the stream, which is one over mask rows.

    Returns:
        int64 with the bits of the fields, shape (rows, count).
    """
    by_row = words.transpose(1, 2).flatten(0, 1)[:rows].long() & _MASK
    field = torch.arange(count, device=words.device)
    fields = torch.zeros(rows, count, dtype=torch.int64, device=words.device)
    first = 0
    for plane, low in placed_planes(width):
        bit = field * plane
        part = by_row[:, first + bit // 32] >> bit % 32 & (1 << plane) - 1
        fields |= part << low
        first += -(-count * plane // 32)
    return fields


def unrank(ranks: torch.Tensor, layout: NMLayout) -> torch.Tensor:
    """Return the positions of ranks, int64, shape (rows, groups, N); below M, whatever the ranks are."""
    table = torch.from_numpy(binomials(layout.n, layout.m).view("int64")).to(ranks.device)
    rest = ranks.clone()
    positions = []
    # "p_i, from i = N-1 down to 0, is the largest p with C(p, i+1) at most what is left of the rank."
    for i in reversed(range(layout.n)):
        # Both with the highest bit turned: then signed order is unsigned order. C(0, i+1) = 0 is at most anything.
        fits = (table[i] ^ _SIGN) <= (rest ^ _SIGN)[:, :, None]
        position = fits.sum(2) - 1
        rest = rest - table[i][position]
        positions.append(position)
    return torch.stack(positions[::-1], 2)


def pack_fields(fields: torch.Tensor, width: int) -> torch.Tensor:
    """Section 11.2: return a word stream over mask rows.

    Args:
        fields: int64, shape (rows, count).
        width: of a field, at most 8 bits.

    Returns:
        int32, shape (tiles, words, 32).
    """
    rows, count = fields.shape
    row_tiles = -(-rows // TILE_ROWS)
    field = torch.arange(count, device=fields.device)
    by_row = [fields.new_zeros(row_tiles * TILE_ROWS, 0)]
    for plane, low in placed_planes(width):
        bit = field * plane
        words = fields.new_zeros(row_tiles * TILE_ROWS, -(-count * plane // 32))
        # No two fields share a bit, so that a sum is an or.
        words[:rows].index_add_(1, bit // 32, (fields >> low & (1 << plane) - 1) << bit % 32)
        by_row.append(words)
    stream = torch.cat(by_row, 1)
    signed = torch.where(stream >= 2**31, stream - 2**32, stream).int()
    return signed.view(row_tiles, TILE_ROWS, -1).transpose(1, 2).contiguous()


def fixed_index(words: torch.Tensor, layout: NMLayout, mask_rows: int, columns: int) -> tuple[torch.Tensor, bool]:
    """Make one ``rank`` index ``fixed``.

    Args:
        words: int32, shape (tiles, words, 32).
        layout: with index ``rank``.
        mask_rows, columns: of the tensor.

    Returns:
        The words of the ``fixed`` index, and whether every rank was below C(M, N).
    """
    ranks = unpack_ranks(words, mask_rows, layout.groups(columns), layout.rank_bits)
    highest = math.comb(layout.m, layout.n) - 1
    signed = highest - 2**64 if highest >= 2**63 else highest
    valid = bool(((ranks ^ _SIGN) <= (signed ^ _SIGN)).all())
    return pack_fields(unrank(ranks, layout).flatten(1), layout.position_bits), valid


def convert_words(source: torch.Tensor, target: torch.Tensor, jobs: Sequence[RankJob]) -> list[int]:
    """Make ``rank`` indexes ``fixed``; return the numbers of those with a rank that is out of range.

    Args:
        source: int32, 1-d, holds the ``rank`` words.
        target: int32, 1-d, takes the ``fixed`` words.
        jobs: which.
    """
    wrong = []
    for number, job in enumerate(jobs):
        words = source[job.source : job.source + math.prod(job.source_shape)].view(job.source_shape)
        fixed, valid = fixed_index(words, job.layout, job.mask_rows, job.columns)
        target[job.target : job.target + fixed.numel()].copy_(fixed.view(-1))
        if not valid:
            wrong.append(number)
    return wrong
