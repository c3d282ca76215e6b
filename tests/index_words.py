"""Positions as the packed words of an index, and back, in one call each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.nm.index.codecs import INDEX_CODECS
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import TILE_ROWS, tiles


def encoded(positions: NDArray[np.uint8], layout: NMLayout) -> NDArray[np.uint32]:
    """Return the words of ascending positions, shape (tiles, words, 32)."""
    mask_rows, groups, n = positions.shape
    assert n == layout.n
    words = layout.encoding.row_words(layout.n, layout.m, groups)
    out = np.zeros((tiles(mask_rows), words, TILE_ROWS), np.uint32)
    INDEX_CODECS[layout.index].encode(positions, layout, out)
    return out


def decoded(packed: NDArray[np.uint32], layout: NMLayout, mask_rows: int, groups: int) -> NDArray[np.uint8]:
    """Return the positions that words say."""
    return INDEX_CODECS[layout.index].decode(packed, layout, 0, 0, mask_rows, groups)
