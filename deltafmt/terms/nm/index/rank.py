"""The index encoding ``rank``: the combinatorial number of each group's positions (specification, 11.4)."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.nm.index.codec import IndexCodec, Positions, Words
from deltafmt.terms.nm.index.encodings import Rank
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS, WORD_BITS, tiles
from deltafmt.terms.unused import blocks, check_stream


@functools.cache
def binomials(n: int, m: int) -> NDArray[np.uint64]:
    """Return C(p, i + 1) at [i, p] for p < M, i < N.

    Every value that a rank can use is below C(M, N) < 2**64; those that it cannot are held at 2**64 - 1.
    """
    table = np.empty((n, m), np.uint64)
    for i in range(n):
        for p in range(m):
            table[i, p] = min(math.comb(p, i + 1), 2**64 - 1)
    return table


def _ranks(native: Native, positions: Positions, m: int) -> NDArray[np.uint64]:
    mask_rows, groups, n = positions.shape
    out = np.empty((mask_rows, groups), np.uint64)
    native.rank(np.ascontiguousarray(positions), binomials(n, m), out)
    return out


@loop(_ranks)
def ranks_of(positions: Positions, m: int) -> NDArray[np.uint64]:
    """Return the rank of every group's ascending positions, shape (mask rows, groups)."""
    mask_rows, groups, n = positions.shape
    table = binomials(n, m)
    # "rank = C(p_0, 1) + C(p_1, 2) + ... + C(p_{N-1}, N)"
    ranks = np.zeros((mask_rows, groups), np.uint64)
    for i in range(n):
        ranks += table[i][positions[:, :, i]]
    return ranks


def _positions(native: Native, ranks: NDArray[np.uint64], n: int, m: int) -> Positions:
    out = np.empty((*ranks.shape, n), np.uint8)
    native.unrank(np.ascontiguousarray(ranks), binomials(n, m), out)
    return out


@loop(_positions)
def positions_of(ranks: NDArray[np.uint64], n: int, m: int) -> Positions:
    """Return the ascending positions of ranks, each below C(M, N), shape (mask rows, groups, N)."""
    table = binomials(n, m)
    positions = np.empty((*ranks.shape, n), np.uint8)
    rest = ranks.copy()
    # "p_i, from i = N-1 down to 0, is the largest p with C(p, i+1) at most what is left of the rank."
    for i in range(n - 1, -1, -1):
        p = np.searchsorted(table[i], rest, side="right") - 1
        positions[:, :, i] = p
        rest -= table[i][p]
    return positions


def _check_below(ranks: NDArray[np.unsignedinteger], total: int, first: tuple[int, int] = (0, 0)) -> None:
    """Refuse ranks that are not below C(M, N); ``first`` is the mask row and the group of the first one."""
    if ranks.size and int(ranks.max()) >= total:
        row, g = (int(x) for x in np.argwhere(ranks >= total)[0])
        where = f"mask row {first[0] + row}, group {first[1] + g}"
        raise InvalidFileError(f"{where}: rank {ranks[row, g]} is not below {total}")


class RankIndex(IndexCodec):
    """Ranks as fields of ceil(log2 C(M, N)) bits."""

    encoding = Rank

    @staticmethod
    def encode(positions: Positions, layout: NMLayout, out: Words) -> None:
        """Write the rank of every group's ascending positions."""
        words.pack_into(ranks_of(positions, layout.m), layout.rank_bits, out)

    @staticmethod
    def decode(
        packed: Words | None,
        layout: NMLayout,
        seed: int,  # noqa: ARG004 - nothing is drawn
        first: int,  # noqa: ARG004 - the run's words are given
        mask_rows: int,
        groups: int,
    ) -> Positions:
        """Read the ranks, each below C(M, N), and return their positions."""
        assert packed is not None
        ranks = words.unpack(packed, mask_rows, groups, layout.rank_bits).astype(np.uint64)
        _check_below(ranks, math.comb(layout.m, layout.n))
        return positions_of(ranks, layout.n, layout.m)

    @staticmethod
    def check(packed: Words | None, layout: NMLayout, mask_rows: int, groups: int) -> None:
        """Check every rank, and the bits that no rank uses."""
        assert packed is not None
        width, total = layout.rank_bits, math.comb(layout.m, layout.n)
        check_stream("index", packed, mask_rows, groups, width)
        if total == 1 << width:
            return  # every field is a rank
        for tile, rows, start, stop in blocks(mask_rows, groups):
            part = packed[tile : tile + tiles(rows)]
            ranks = words.unpack_columns(part, rows, groups, width, start, stop)
            _check_below(ranks, total, (tile * TILE_ROWS, start))

    @staticmethod
    def last_group(
        packed: Words | None,
        layout: NMLayout,
        seed: int,  # noqa: ARG004 - nothing is drawn
        first: int,  # noqa: ARG004 - the run's words are given
        mask_rows: int,
        groups: int,
    ) -> Positions:
        """Read the last rank of every mask row."""
        assert packed is not None
        if layout.rank_bits == 0:
            ranks = np.zeros((mask_rows, 1), np.uint64)
        else:
            start = (groups - 1) // WORD_BITS * WORD_BITS
            fields = words.unpack_columns(packed, mask_rows, groups, layout.rank_bits, start, groups)
            ranks = fields[:, -1:].astype(np.uint64)
        return positions_of(ranks, layout.n, layout.m)[:, 0]


CODEC = RankIndex
