"""The index encoding ``fixed``: a position for each kept element (specification, 11.4)."""

from __future__ import annotations

import math

from deltafmt.terms import words
from deltafmt.terms.nm.index.codec import IndexCodec, Positions, Words, check_ascending
from deltafmt.terms.nm.index.encodings import Fixed
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS, WORD_BITS, tiles
from deltafmt.terms.unused import blocks, check_stream


class FixedIndex(IndexCodec):
    """Positions as fields of ceil(log2 M) bits."""

    encoding = Fixed

    @staticmethod
    def encode(positions: Positions, layout: NMLayout, out: Words) -> None:
        """Write the positions one after the other."""
        words.pack_into(positions.reshape(positions.shape[0], -1), layout.position_bits, out, 1)

    @staticmethod
    def decode(
        packed: Words | None,
        layout: NMLayout,
        seed: int,  # noqa: ARG004 - nothing is drawn
        first: int,  # noqa: ARG004 - the run's words are given
        mask_rows: int,
        groups: int,
    ) -> Positions:
        """Read the positions, which ascend in every group."""
        assert packed is not None
        fields = words.unpack(packed, mask_rows, groups * layout.n, layout.position_bits, 1)
        positions = fields.reshape(mask_rows, groups, layout.n)
        check_ascending(positions, layout.m)
        return positions

    @staticmethod
    def check(packed: Words | None, layout: NMLayout, mask_rows: int, groups: int) -> None:
        """Check every position, and the bits that no position uses."""
        assert packed is not None
        n, width = layout.n, layout.position_bits
        check_stream("index", packed, mask_rows, groups * n, width)
        if n == 1 and layout.m == 1 << width:
            return  # every field is a position
        for tile, rows, start, stop in blocks(mask_rows, groups * n, 1, math.lcm(WORD_BITS, n)):
            part = packed[tile : tile + tiles(rows)]
            fields = words.unpack_columns(part, rows, groups * n, width, start, stop)
            check_ascending(fields.reshape(rows, -1, n), layout.m, (tile * TILE_ROWS, start // n))

    @staticmethod
    def last_group(
        packed: Words | None,
        layout: NMLayout,
        seed: int,  # noqa: ARG004 - nothing is drawn
        first: int,  # noqa: ARG004 - the run's words are given
        mask_rows: int,
        groups: int,
    ) -> Positions:
        """Read the last N positions of every mask row."""
        assert packed is not None
        count = groups * layout.n
        start = (count - layout.n) // WORD_BITS * WORD_BITS
        fields = words.unpack_columns(packed, mask_rows, count, layout.position_bits, start, count)
        return fields[:, fields.shape[1] - layout.n :]


CODEC = FixedIndex
