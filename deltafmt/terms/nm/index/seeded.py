"""The index encoding ``seeded``: positions drawn from the tensor's seed (specification, 11.4)."""

from __future__ import annotations

from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.index.codec import IndexCodec, Positions, Words
from deltafmt.terms.nm.index.encodings import Seeded
from deltafmt.terms.nm.layout import NMLayout


class SeededIndex(IndexCodec):
    """Positions that :func:`deltafmt.terms.nm.hashing.seeded` draws; nothing is stored."""

    encoding = Seeded

    @staticmethod
    def decode(
        packed: Words | None,  # noqa: ARG004 - there are no words
        layout: NMLayout,
        seed: int,
        first: int,
        mask_rows: int,
        groups: int,
    ) -> Positions:
        """Draw the positions."""
        return hashing.seeded(seed, first, mask_rows, groups, layout.n, layout.m)

    @staticmethod
    def check(packed: Words | None, layout: NMLayout, mask_rows: int, groups: int) -> None:
        """Do nothing: what is not stored cannot be wrong."""

    @staticmethod
    def last_group(
        packed: Words | None,  # noqa: ARG004 - there are no words
        layout: NMLayout,
        seed: int,
        first: int,
        mask_rows: int,
        groups: int,
    ) -> Positions:
        """Draw the last group of every mask row."""
        return hashing.drawn(seed, first, mask_rows, range(groups - 1, groups), layout.n, layout.m)[:, 0]


CODEC = SeededIndex
