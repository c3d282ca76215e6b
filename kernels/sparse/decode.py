"""The dense delta of a packed ``sparse`` term, vectorised in torch (specification, section 14).

The sum of a lane's gaps up to a slot is where the slot's entry stands: one cumulative sum serves all tiles of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.packed_words import coded_values, fields
from deltafmt.terms.coding import Coding
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import TILE_ROWS

# If single rows are wanted, about this many elements of a delta are decoded at a time.
RUN_ELEMENTS = 1 << 23
# A run goes on over at most this many tiles that hold no wanted row.
MOST_SKIPPED = 2


def decode(operand: Operand, start: int, stop: int) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of the delta, float32, shape (stop - start, columns)."""
    first = start // TILE_ROWS
    found = decode_tiles(operand, first, -(-stop // TILE_ROWS))
    return found[start - first * TILE_ROWS : stop - first * TILE_ROWS]


def decode_rows(operand: Operand, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows of the delta, float32, shape (len(rows), columns); rows are int64."""
    found = torch.zeros(len(rows), operand.columns, dtype=torch.float32, device=operand.device)
    most = max(RUN_ELEMENTS // (TILE_ROWS * operand.columns), 1)
    for first, last in runs_of(sorted(set((rows // TILE_ROWS).tolist())), most):
        mine = ((rows >= first * TILE_ROWS) & (rows < last * TILE_ROWS)).nonzero()[:, 0]
        found[mine] = decode_tiles(operand, first, last)[rows[mine] - first * TILE_ROWS]
    return found


def runs_of(tiles: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield runs of at most ``most`` tiles that cover ascending tiles, and few others: (3, 4, 9) gives (3, 5), (9, 10).

    A run is decoded at once. To decode a tile or two between wanted ones costs less than another run.
    """
    first = last = -1
    for tile in tiles:
        if first >= 0 and tile - last <= MOST_SKIPPED and tile - first < most:
            last = tile + 1
            continue
        if first >= 0:
            yield first, last
        first, last = tile, tile + 1
    if first >= 0:
        yield first, last


def decode_tiles(operand: Operand, first: int, last: int) -> torch.Tensor:
    """Return all rows of tiles ``first`` to ``last``, float32, shape (32 * tiles, columns).

    An entry that a damaged file puts beyond its row is left out; rows that do not exist are zero.
    """
    layout, columns, device = cast("SparseLayout", operand.layout), operand.columns, operand.device
    blocks, filler = layout.blocks(columns), layout.filler
    starts = operand.buffers["starts"][first * blocks : last * blocks + 1].long() & 0xFFFFFFFF
    begin, end = (min(int(place), operand.slots) for place in (starts[0], starts[-1]))
    rows = (last - first) * TILE_ROWS
    # One element more, which takes what is no entry.
    flat = torch.zeros(rows * columns + 1, dtype=torch.float32, device=device)
    if begin >= end:
        return flat[:-1].view(rows, columns)
    gaps = fields(operand.buffers["gaps"].T, operand.slots, layout.gap_bits, begin, end)
    is_entry = gaps != filler
    # "A filler skips F columns, an entry its gap and its own."
    passed = torch.cumsum(gaps + is_entry, 1, dtype=torch.int64)
    slot = torch.arange(begin, end, device=device)
    part = (torch.searchsorted(starts, slot, right=True) - 1).clamp(0, len(starts) - 2)
    before = torch.nn.functional.pad(passed, (1, 0))[:, (starts[part] - begin).clamp(0, end - begin)]
    column = passed - before - 1 + part % blocks * layout.span
    row = part // blocks * TILE_ROWS + torch.arange(TILE_ROWS, device=device)[:, None]
    is_entry &= (column < columns) & (row < operand.rows - first * TILE_ROWS)
    coding = layout.values
    if isinstance(coding, Coding):
        codes = fields(operand.buffers["codes"].T, operand.slots, coding.bits, begin, end)
        of_tiles = operand.buffers["scales"][first:last, 0].reshape(-1)
        values = coded_values(coding.top, codes, of_tiles[row])
    else:
        values = operand.buffers["values"][begin:end].T.float()
    place = torch.where(is_entry, row * columns + column, rows * columns)
    flat.scatter_(0, place.reshape(-1), values.reshape(-1))
    return flat[:-1].view(rows, columns)
