"""Cuts of ``lowbit`` terms (specification, appendix A.2)."""

from __future__ import annotations

from dataclasses import replace

from deltafmt.terms.buffers import Packed, blank
from deltafmt.terms.cut_term import CutTerm, finer, has_whole_tiles, spread
from deltafmt.terms.lowbit.codec import LowbitArrays, LowbitCodec
from deltafmt.terms.tiles import TILE_ROWS, tiles


def cut_lowbit(codec: LowbitCodec, packed: Packed, rows: range, columns: range) -> CutTerm:
    """Return a cut of a term; see :func:`deltafmt.terms.cutting.cut`. Whole tiles of rows are views."""
    layout, (total, width) = codec.layout, codec.shape
    first = rows.start // TILE_ROWS * TILE_ROWS
    if columns == range(width) and has_whole_tiles(rows, total, TILE_ROWS):
        run = slice(first // TILE_ROWS, tiles(rows.stop))
        views = {name: array if array.ndim == 1 else array[run] for name, array in packed.items()}
        return CutTerm(layout, len(rows), width, views)
    whole = codec.arrays(packed, first, rows.stop)
    skip, cut = rows.start - first, slice(columns.start, columns.stop)
    zero_points = None
    if layout.axis == "column":
        target, scales = layout, whole.scales[:, cut]
    else:
        group = finer(layout.scale_group, width, columns.start)
        target = replace(layout, scale_group=group)
        where = layout.scale_group, group, columns.start, len(columns)
        scales = spread(whole.scales[skip:], *where)
        if whole.zero_points is not None:
            zero_points = spread(whole.zero_points[skip:], *where)
    arrays = LowbitArrays(whole.codes[skip:, cut], scales, zero_points)
    out = blank(target, len(rows), len(columns))
    LowbitCodec(target, len(rows), len(columns)).encode(arrays, out, 0)
    return CutTerm(target, len(rows), len(columns), out)
