"""Cuts of ``nm`` terms (specification, appendix A.1)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.terms.buffers import Packed, blank
from deltafmt.terms.cut_term import CutTerm, Scalar, finer, has_whole_tiles, spread
from deltafmt.terms.nm.codec import NMArrays, NMCodec, decode, encode, slice_run
from deltafmt.terms.nm.hashing import ROW_STEP
from deltafmt.terms.nm.layout import NMLayout


def cut_nm(codec: NMCodec, packed: Packed, rows: range, columns: range) -> CutTerm:
    """Return a cut of a term; see :func:`deltafmt.terms.cutting.cut`.

    Whole tiles of rows are views. Everything else is unpacked and packed again. Seeded positions depend on the numbers
    of the row and of the group in the whole matrix. A seed of its own stands for other row numbers, because
    "key = mix(seed + q * ROW_STEP)"; other group numbers have no such seed, and their positions are stored (``fixed``).
    """
    layout = codec.layout.plain()
    total, width = codec.shape
    check_groups(layout, codec.shape, rows, columns)
    packed = codec.converted(packed, layout)
    seed = (codec.seed + rows.start // layout.share * ROW_STEP) % 2**32 if layout.seeded else 0
    if columns == range(width) and has_whole_tiles(rows, total, codec.run_rows):
        run = slice_run(packed, layout.share, rows.start, rows.stop)
        return CutTerm(layout, len(rows), width, run, seed)
    first = rows.start // codec.run_rows * codec.run_rows
    whole = decode(
        layout,
        slice_run(packed, layout.share, first, rows.stop),
        codec.seed,
        first,
        rows.stop - first,
        width,
    )
    drawn = layout.seeded and columns.start == 0 and rows.start % layout.share == 0
    target, arrays = _select(layout, whole, rows.start - first, columns)
    if layout.seeded and not drawn:
        target, arrays = _stored(target, arrays)
    out = blank(target, len(rows), len(columns))
    encode(target, arrays, out)
    return CutTerm(target, len(rows), len(columns), out, seed if drawn else 0)


def check_groups(layout: NMLayout, shape: tuple[int, int], _rows: range, columns: range) -> None:
    """Refuse a cut that begins or ends inside a group.

    Raises:
        UsageError: it does.
    """
    if columns.start % layout.m or (columns.stop % layout.m and columns.stop != shape[1]):
        raise UsageError(f"columns {columns.start} to {columns.stop} are not whole groups of {layout.m}")


def _select(layout: NMLayout, whole: NMArrays, skip: int, columns: range) -> tuple[NMLayout, NMArrays]:
    """Return some groups of the rows behind the first ``skip`` ones, and their layout."""
    positions, share = whole.positions, layout.share
    if skip % share:
        # Rows that share positions would no longer begin with a multiple of v.
        positions, share = np.repeat(positions, share, axis=0)[: len(whole.codes)], 1
    groups = slice(columns.start // layout.m, -(-columns.stop // layout.m))
    start, stop = groups.start * layout.n, groups.stop * layout.n
    group = finer(layout.scale_group, whole.codes.shape[1], start)
    scales = spread(whole.scales[skip:], layout.scale_group, group, start, stop - start)
    arrays = NMArrays(positions[skip // share :, groups], whole.codes[skip:, start:stop], scales)
    return replace(layout, share=share, scale_group=group), arrays


def _stored(layout: NMLayout, arrays: NMArrays) -> tuple[NMLayout, NMArrays]:
    """Return the same elements with positions that are stored: those of a group ascend, and take their codes along."""
    order = np.argsort(arrays.positions, axis=2, kind="stable")
    of_rows = order[np.arange(len(arrays.codes)) // layout.share]
    group, scales = layout.scale_group, arrays.scales
    if group % layout.n and arrays.scales.shape[1] > 1:
        # Elements of a group have different scales, which have to go with them.
        scales = _sorted(spread(scales, group, 1, 0, arrays.codes.shape[1]), of_rows)
        group = 1
    positions = np.take_along_axis(arrays.positions, order, axis=2)
    return replace(layout, index="fixed", scale_group=group), NMArrays(
        positions, _sorted(arrays.codes, of_rows), scales
    )


def _sorted(values: NDArray[Scalar], order: NDArray[np.int64]) -> NDArray[Scalar]:
    return np.take_along_axis(values.reshape(order.shape), order, axis=2).reshape(values.shape)
