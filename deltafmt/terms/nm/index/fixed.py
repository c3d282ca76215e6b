"""The index encoding ``fixed``: a position for each kept element (specification, 11.4)."""

from __future__ import annotations

from deltafmt.terms import words
from deltafmt.terms.nm.index.codec import IndexCodec, Positions, Words, check_ascending
from deltafmt.terms.nm.index.encodings import Fixed
from deltafmt.terms.nm.layout import NMLayout


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


CODEC = FixedIndex
