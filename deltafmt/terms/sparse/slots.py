"""Entries in slots: where each entry goes, and back (spec/deltafmt-v1.md, section 14).

A slot holds a gap and a value. The slots of a tile's block serve its 32 rows side by side, so that a block has as many
as its fullest row needs. Compiled: ``kernels/cpu/loops/sparse.c``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.errors import InvalidFileError
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import RAW_DTYPES, Raw, widen
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import TILE_ROWS, tiles

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Gaps = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class SparseArrays(TermArrays):
    """The content of a term: the entries of its rows, one row after the other.

    Attributes:
        ends: int64, shape (rows,): how many entries each row and the rows before it have together.
        columns: int64, one for each entry, ascending in every row.
        values: codes, uint8, or raw values, one for each entry.
        scales: float32, shape (rows, 1), of codes; otherwise None.
    """

    ends: Ints
    columns: Ints
    values: NDArray[np.uint8] | Raw
    scales: Floats | None = None


@dataclass(frozen=True, slots=True)
class _Steps:
    """For every entry: its row, the block of its row, its gap, and how many slots of the block it is at the end of."""

    row: Ints
    part: Ints
    gaps: Ints
    taken: Ints


def _steps(layout: SparseLayout, arrays: SparseArrays, columns: int) -> _Steps:
    row = np.repeat(np.arange(arrays.ends.size), np.diff(arrays.ends, prepend=0))
    block = arrays.columns // layout.span
    part = row * layout.blocks(columns) + block
    # "The gap of an entry counts from the column after the one before it, or from the block's first column."
    first = np.ones(row.size, np.bool_)
    first[1:] = part[1:] != part[:-1]
    after = np.concatenate([np.zeros(1, np.int64), arrays.columns[:-1] + 1])[: row.size]
    distance = arrays.columns - np.where(first, block * layout.span, after)
    # "A distance of q F + d, d below F, takes q fillers and then the gap d."
    fillers, gaps = np.divmod(distance, layout.filler)
    taken = np.cumsum(fillers + 1)
    before = (taken - fillers - 1)[first][np.cumsum(first) - 1] if row.size else taken
    return _Steps(row, part, gaps, taken - before)


def _from_counts(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _block_starts(native: Native, layout: SparseLayout, arrays: SparseArrays, columns: int) -> Ints:
    needed = np.zeros(tiles(arrays.ends.size) * layout.blocks(columns), np.int64)
    native.sparse_needed(*_entries(layout, arrays, columns), needed)
    return _from_counts(needed)


@loop(_block_starts)
def block_starts(layout: SparseLayout, arrays: SparseArrays, columns: int) -> Ints:
    """Return where the slots of every block start, and behind them the number of slots; shape (tiles * blocks + 1,)."""
    steps, rows = _steps(layout, arrays, columns), arrays.ends.size
    needed = np.zeros(tiles(rows) * TILE_ROWS * layout.blocks(columns), np.int64)
    # "A block has the slots of the row that needs the most."
    np.maximum.at(needed, steps.part, steps.taken)
    return _from_counts(needed.reshape(tiles(rows), TILE_ROWS, -1).max(axis=1).reshape(-1))


def _entries(layout: SparseLayout, arrays: SparseArrays, columns: int) -> tuple[object, ...]:
    """Return the entries as the compiled loops take them."""
    ends, at = (np.ascontiguousarray(array, np.int64) for array in (arrays.ends, arrays.columns))
    return ends, at, columns, layout.span, layout.filler


def _blank(layout: SparseLayout, values: NDArray[np.generic], slots: int) -> tuple[Gaps, NDArray[np.generic]]:
    gaps = np.full((TILE_ROWS, slots), layout.filler, np.uint8 if layout.gap_bits <= 8 else np.uint16)
    shape = (TILE_ROWS, slots) if isinstance(layout.values, Coding) else (slots, TILE_ROWS)
    return gaps, np.zeros(shape, values.dtype)


def _place(
    native: Native, layout: SparseLayout, arrays: SparseArrays, columns: int, starts: Ints
) -> tuple[Gaps, NDArray[np.generic]]:
    gaps, placed = _blank(layout, arrays.values, int(starts[-1]))
    by_slot = not isinstance(layout.values, Coding)
    values = np.ascontiguousarray(arrays.values)
    native.sparse_place(*_entries(layout, arrays, columns), starts, gaps, values, placed, by_slot)
    return gaps, placed


@loop(_place)
def place(layout: SparseLayout, arrays: SparseArrays, columns: int, starts: Ints) -> tuple[Gaps, NDArray[np.generic]]:
    """Return the gaps of all slots, shape (32, slots), and their values: codes likewise, raw ones of shape (slots, 32).

    Args:
        layout: the term's layout.
        arrays: the entries.
        columns: columns of the matrix.
        starts: what :func:`block_starts` gives.
    """
    steps = _steps(layout, arrays, columns)
    gaps, placed = _blank(layout, arrays.values, int(starts[-1]))
    blocks = layout.blocks(columns)
    lanes = steps.row % TILE_ROWS
    slots = starts[steps.row // TILE_ROWS * blocks + steps.part % blocks] + steps.taken - 1
    gaps[lanes, slots] = steps.gaps
    if isinstance(layout.values, Coding):
        placed[lanes, slots] = arrays.values
    else:
        placed[slots, lanes] = arrays.values
    return gaps, placed


def _write_tile(
    native: Native,
    layout: SparseLayout,
    gaps: Gaps,
    starts: Ints,
    values: NDArray[np.generic],
    scales: Floats | None,
    out: Floats,
) -> None:
    coding = layout.values
    content = (1, values, scales, coding.top) if isinstance(coding, Coding) else (0, values, coding)
    if not native.sparse_tile(gaps, starts, layout.span, layout.filler, *content, out):
        write_tile.reference(layout, gaps, starts, values, scales, out)


@loop(_write_tile)
def write_tile(
    layout: SparseLayout,
    gaps: Gaps,
    starts: Ints,
    values: NDArray[np.generic],
    scales: Floats | None,
    out: Floats,
) -> None:
    """Write the entries of one tile into its rows.

    Args:
        layout: the term's layout.
        gaps: shape (32, slots of the tile).
        starts: where the slots of every block start, counted from the tile's first; shape (blocks + 1,).
        values: codes, of the gaps' shape, or raw values, shape (slots, 32).
        scales: float32, shape (32,), of codes; otherwise None.
        out: float32 zeros, shape (rows of the tile that exist, columns); changed.

    Raises:
        InvalidFileError: an entry lies beyond its block or in a row that does not exist, or a value is not finite.
    """
    coding = layout.values
    is_entry = gaps != layout.filler
    column = columns_of(layout, gaps, starts, out.shape[1])
    if isinstance(coding, Coding):
        assert scales is not None
        half = (scales * np.float32(0.5))[:, None]
        with np.errstate(over="ignore"):
            wide = (2 * values.astype(np.int32) - coding.top).astype(np.float32) * half
    else:
        wide = widen(np.ascontiguousarray(values.T).view(RAW_DTYPES[coding]), coding)
        if not np.isfinite(wide).all():
            raise InvalidFileError("a value is not finite")
    if is_entry[out.shape[0] :].any():
        raise InvalidFileError("a row that does not exist has an entry")
    lane, slot = np.nonzero(is_entry)
    out[lane, column[lane, slot]] = wide[lane, slot]


def columns_of(layout: SparseLayout, gaps: Gaps, starts: Ints, columns: int) -> Ints:
    """Return the column of each slot of one tile that has an entry, shape (32, slots of the tile).

    Args:
        layout, gaps, starts: as in :func:`write_tile`.
        columns: columns of the matrix.

    Raises:
        InvalidFileError: an entry lies beyond its block.
    """
    is_entry = gaps != layout.filler
    # "A filler skips F columns, an entry its gap and its own."
    passed = np.zeros((TILE_ROWS, gaps.shape[1] + 1), np.int64)
    np.cumsum(np.where(is_entry, gaps.astype(np.int64) + 1, layout.filler), axis=1, out=passed[:, 1:])
    block = np.repeat(np.arange(starts.size - 1), np.diff(starts))
    column: Ints = block * layout.span + passed[:, 1:] - passed[:, starts[block]] - 1
    if (is_entry & (column >= np.minimum((block + 1) * layout.span, columns))).any():
        raise InvalidFileError("an entry lies beyond its block")
    return column
