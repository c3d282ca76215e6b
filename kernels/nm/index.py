"""The index encodings of ``nm`` terms on a device: a number for kernels, and positions in torch (section 11.4).

:mod:`deltafmt.kernels.nm.positions` reads the same encodings inside kernels, by these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import torch

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.unpack import chosen_rows, fields
from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.index.encodings import Fixed, Seeded
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import planes

SEEDED: Final = 0
FIXED: Final = 1

# The number by which kernels know an encoding. One that kernels do not read (``rank``) has none.
INDEX_NUMBERS: Final[dict[str, int]] = {Seeded.name: SEEDED, Fixed.name: FIXED}

_MASK = 0xFFFFFFFF


def lane_bits(layout: NMLayout) -> int:
    """Return how many bits of a hash a group takes; 0 for an encoding that draws nothing."""
    return hashing.lane_bits(layout.n, layout.m) if layout.seeded else 0


def whole_words(layout: NMLayout) -> list[int]:
    """Return the numbers of elements after which an encoding starts a new word, or a new hash."""
    if layout.seeded:
        return [layout.n * 64 // lane_bits(layout)]
    return [32 // width for width in planes(layout.position_bits)]


def index_constants(layout: NMLayout) -> dict[str, int]:
    """Return the constants by which kernels read a layout's index."""
    return {"INDEX": INDEX_NUMBERS[layout.index], "LANE_BITS": lane_bits(layout)}


def seeded_positions(operand: Operand, mask_rows: torch.Tensor) -> torch.Tensor:
    """Return the drawn positions of some mask rows, int64, shape (mask rows, groups, N).

    Products of two 32-bit numbers may leave int64's positive range; all of their 64 bits are right all the same.
    """
    layout = cast("NMLayout", operand.layout)
    width, log_m = lane_bits(layout), layout.position_bits
    key = _mix((mask_rows * hashing.ROW_STEP + operand.seed) & _MASK)
    group = torch.arange(layout.groups(operand.columns), device=mask_rows.device)
    per_hash = 64 // width
    blocks = torch.arange(-(-len(group) // per_hash), device=mask_rows.device)
    x = (key[:, None] + blocks * hashing.BLOCK_STEP) & _MASK
    wide = (x ^ x >> 16) * hashing.FOLD
    drawn = ((wide >> 32 & _MASK) ^ (wide & _MASK)) * hashing.SPREAD
    lane = drawn[:, group // per_hash] >> group % per_hash * width
    b = lane & (layout.m - 1)
    a = lane >> (log_m - 1) & (layout.m - 1) | 1
    i = torch.arange(layout.n, device=mask_rows.device)
    return (a[:, :, None] * i + b[:, :, None]) & (layout.m - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Return the 32-bit mix of numbers below 2**32, as int64."""
    x = x ^ x >> 16
    x = x * hashing.MIX_FIRST & _MASK
    x = x ^ x >> 15
    x = x * hashing.MIX_SECOND & _MASK
    return x ^ x >> 16


def fixed_positions(operand: Operand, mask_rows: torch.Tensor) -> torch.Tensor:
    """Return the stored positions of some mask rows, int64, shape (mask rows, groups * N)."""
    layout = cast("NMLayout", operand.layout)
    words = chosen_rows(operand.buffers["index"], mask_rows)
    return fields(words, layout.kept(operand.columns), layout.position_bits).long()


INDEX_POSITIONS: Final[dict[str, Callable[[Operand, torch.Tensor], torch.Tensor]]] = {
    Seeded.name: seeded_positions,
    Fixed.name: fixed_positions,
}
