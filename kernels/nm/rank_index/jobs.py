"""One ``rank`` index to be made ``fixed``: its layout, its shape and its place."""

from __future__ import annotations

from dataclasses import dataclass

from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS, tiles


@dataclass(frozen=True, slots=True)
class RankJob:
    """One index.

    Attributes:
        layout: with index ``rank``.
        mask_rows: of the index.
        columns: of the tensor.
        source: where its words start in the source, in words.
        target: where the ``fixed`` words are to start in the target, in words.
    """

    layout: NMLayout
    mask_rows: int
    columns: int
    source: int
    target: int

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """Shape of the ``rank`` words."""
        return tiles(self.mask_rows), self.layout.index_words(self.columns), TILE_ROWS

    @property
    def target_shape(self) -> tuple[int, int, int]:
        """Shape of the ``fixed`` words."""
        return tiles(self.mask_rows), self.layout.with_index("fixed").index_words(self.columns), TILE_ROWS
