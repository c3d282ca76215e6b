"""Cuts of ``sparse`` terms (specification, appendix A.4)."""

from __future__ import annotations

import numpy as np

from deltafmt.terms import words
from deltafmt.terms.buffers import Packed, blank
from deltafmt.terms.coding import Coding
from deltafmt.terms.cut_term import CutTerm
from deltafmt.terms.scales import read_scales
from deltafmt.terms.sparse.codec import SparseCodec
from deltafmt.terms.sparse.slots import SparseArrays
from deltafmt.terms.tiles import TILE_ROWS, tiles


def cut_sparse(codec: SparseCodec, packed: Packed, rows: range, columns: range) -> CutTerm:
    """Return a cut of a term; see :func:`deltafmt.terms.cutting.cut`. Its entries are placed in slots of their own."""
    layout = codec.layout
    counts = np.zeros(len(rows), np.int64)
    places, values = [], []
    for tile in range(rows.start // TILE_ROWS, tiles(rows.stop)):
        lane, column, value = codec.entries(packed, tile)
        row = tile * TILE_ROWS + lane - rows.start
        mine = (row >= 0) & (row < len(rows)) & (column >= columns.start) & (column < columns.stop)
        counts += np.bincount(row[mine], minlength=len(rows))
        places.append(column[mine] - columns.start)
        values.append(value[mine])
    scales = None
    if isinstance(layout.values, Coding):
        of_rows = words.from_tiles(packed["scales"], codec.shape[0])
        scales = read_scales(layout.values.scale_dtype, of_rows)[rows.start : rows.stop]
    arrays = SparseArrays(np.cumsum(counts), np.concatenate(places), np.concatenate(values), scales)
    _, slots = SparseCodec.fit(layout, arrays, len(columns))
    out = blank(layout, len(rows), len(columns), slots)
    SparseCodec(layout, len(rows), len(columns), slots=slots).encode(arrays, out)
    return CutTerm(layout, len(rows), len(columns), out, slots=slots)
