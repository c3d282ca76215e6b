"""Slots are those that their entries need (spec/deltafmt-v1.md, sections 14.3, 14.4 and 15).

Blocks are checked in runs of some thousand slots, whatever the shape of the matrix. No matrix is made.
Compiled: ``kernels/cpu/loops/sparse.c``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.errors import InvalidFileError
from deltafmt.terms.coding import Coding
from deltafmt.terms.scales import all_finite
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import Gaps, Ints

# A run of blocks has at most so many slots, unless it is one block; and at most so many blocks.
RUN_SLOTS = 1 << 13
RUN_BLOCKS = 1 << 16


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks.

    Attributes:
        starts: the first slot of each, and behind them the end; int64, shape (blocks + 1,).
        widths: the columns of each, int64.
    """

    starts: Ints
    widths: Ints


def runs_of_blocks(
    layout: SparseLayout, starts: NDArray[np.uint32], columns: int, slots: int = 0
) -> Iterator[tuple[range, BlockRun]]:
    """Cut the blocks of all tiles, whose starts ascend, into runs of about ``slots`` slots, RUN_SLOTS if not given.

    Raises:
        InvalidFileError: a block has more slots than columns, which no entry can need.
    """
    blocks, total = layout.blocks(columns), starts.size - 1
    rest = columns - (blocks - 1) * layout.span
    first = 0
    while first < total:
        window = starts[first + 1 : first + 1 + RUN_BLOCKS]
        within = int(np.searchsorted(window, int(starts[first]) + (slots or RUN_SLOTS), side="right"))
        stop = first + max(within, 1)
        of_run = starts[first : stop + 1].astype(np.int64)
        widths = np.where(np.arange(first, stop) % blocks == blocks - 1, rest, layout.span).astype(np.int64)
        if (np.diff(of_run) > widths).any():
            raise InvalidFileError("a block has a slot that no row needs")
        if of_run[-1] > of_run[0]:
            yield range(first, stop), BlockRun(of_run, widths)
        first = stop


def check_run(layout: SparseLayout, run: BlockRun, gaps: Gaps, values: NDArray[np.generic], where: str) -> None:
    """Check the slots of a run of blocks.

    Args:
        layout: the term's layout.
        run: the blocks.
        gaps: shape (32, slots of the run).
        values: codes, or raw values, of the same shape.
        where: the place of the run in messages.

    Raises:
        InvalidFileError: an entry lies beyond its block, a code beyond the grid, a value that is not finite, a filler
            with a value, or a slot that no row needs.
    """
    coding = layout.values
    starts = run.starts - run.starts[0]
    used = np.diff(starts) > 0
    last = starts[1:][used] - 1
    is_entry = gaps != layout.filler
    if not within(gaps, starts, run.widths, layout.filler):
        raise InvalidFileError(f"{where}: an entry lies beyond its block")
    if isinstance(coding, Coding):
        largest = int(values.view(np.uint8).max(initial=0)) if coding.top < (1 << coding.bits) - 1 else 0
        if largest > coding.top:
            raise InvalidFileError(f"{where}: a code is {largest}, the grid ends at {coding.top}")
    elif not all_finite(coding, values):
        raise InvalidFileError(f"{where}: a value is not finite")
    # Of truth values: "greater" is "the one and not the other".
    if (np.ascontiguousarray(values != 0) > is_entry).any():
        raise InvalidFileError(f"{where}: a filler has a value that is not zero")
    # A block has the slots of the row that needs the most, and what a row needs ends with an entry.
    if not is_entry[:, last].any(axis=0).all():
        raise InvalidFileError(f"{where}: a block has a slot that no row needs")


def _within(native: Native, gaps: Gaps, starts: Ints, widths: Ints, filler: int) -> bool:
    return bool(native.sparse_within(np.ascontiguousarray(gaps), starts, widths, filler))


@loop(_within)
def within(gaps: Gaps, starts: Ints, widths: Ints, filler: int) -> bool:
    """Tell whether every entry of some blocks lies in its block.

    Args:
        gaps: shape (32, slots).
        starts: the first slot of each block, from 0 on, and behind them the number of slots.
        widths: the columns of each block.
        filler: F.
    """
    used = np.diff(starts) > 0
    first = starts[:-1][used]
    if not first.size:
        return True
    is_entry = gaps != filler
    # "A filler skips F columns, an entry its gap and its own." F is also what a filler's field says.
    passed = np.zeros((gaps.shape[0], gaps.shape[1] + 1), np.int64)
    passed[:, 1:] = gaps + is_entry
    np.cumsum(passed, axis=1, out=passed)  # in place: numpy is slow where it converts
    ends = np.maximum.reduceat(passed[:, 1:] * is_entry, first, axis=1)
    return not bool((ends > passed[:, first] + widths[used]).any())
