"""The index encodings of ``nm`` terms on a device: constants for kernels, and positions in torch (section 11.4).

:mod:`deltafmt.kernels.nm.positions` reads the same encodings inside kernels, by the numbers that stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import torch

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.packed_words import chosen_rows, fields
from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.index.encodings import Fixed, Seeded
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.tiles import WORD_BITS, plane_words, planes

SEEDED: Final = 0
FIXED: Final = 1

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class DeviceIndex:
    """How kernels and the decoder in torch read one index encoding.

    Attributes:
        number: by which kernels know the encoding.
        bits: gives for a layout the bits of a field of the index, or those of a hash that a group takes.
        covers: gives for a layout the kept elements whose positions follow from one field.
        positions: gives for an operand and some mask rows (int64) positions, int64, shape (mask rows, groups * N) or
            (mask rows, groups, N).
    """

    number: int
    bits: Callable[[NMLayout], int]
    covers: Callable[[NMLayout], int]
    positions: Callable[[Operand, torch.Tensor], torch.Tensor]


def whole_words(layout: NMLayout) -> list[int]:
    """Return the numbers of elements after which an encoding starts a new word, or a new hash."""
    index = DEVICE_INDEXES[layout.index]
    bits, covers = index.bits(layout), index.covers(layout)
    if layout.seeded:
        return [covers * hashing.HASH_BITS // bits]
    return [covers * WORD_BITS // width for width in planes(bits)]


def index_planes(layout: NMLayout, columns: int) -> list[int]:
    """Return the words that a mask row's index has in each of its planes; none where nothing is stored."""
    if layout.seeded:
        return []
    index = DEVICE_INDEXES[layout.index]
    count = layout.kept(columns) // index.covers(layout)
    return [plane_words(count, width) for width in planes(index.bits(layout))]


def index_constants(layout: NMLayout) -> dict[str, int]:
    """Return the constants by which kernels read a layout's index."""
    index = DEVICE_INDEXES[layout.index]
    return {"INDEX": index.number, "INDEX_BITS": index.bits(layout)}


def positions(operand: Operand, mask_rows: torch.Tensor) -> torch.Tensor:
    """Return the positions of some mask rows (int64), int64, shape (mask rows, groups, N), each within its group."""
    layout = cast("NMLayout", operand.layout)
    found = DEVICE_INDEXES[layout.index].positions(operand, mask_rows)
    return found.view(len(mask_rows), layout.groups(operand.columns), layout.n)


def seeded_bits(layout: NMLayout) -> int:
    """Return how many bits of a hash a group takes."""
    return hashing.lane_bits(layout.n, layout.m)


def seeded_positions(operand: Operand, mask_rows: torch.Tensor) -> torch.Tensor:
    """Return the drawn positions of some mask rows, int64, shape (mask rows, groups, N).

    Products of two 32-bit numbers may leave int64's positive range; all of their 64 bits are right all the same.
    """
    layout = cast("NMLayout", operand.layout)
    width, log_m = seeded_bits(layout), layout.position_bits
    key = _mix((mask_rows * hashing.ROW_STEP + operand.seed) & _MASK)
    group = torch.arange(layout.groups(operand.columns), device=mask_rows.device)
    per_hash = hashing.HASH_BITS // width
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


# What kernels do not read (``rank``) is converted when it arrives, and does not stand here.
DEVICE_INDEXES: Final[dict[str, DeviceIndex]] = {
    Seeded.name: DeviceIndex(SEEDED, seeded_bits, lambda layout: layout.n, seeded_positions),
    Fixed.name: DeviceIndex(FIXED, lambda layout: layout.position_bits, lambda _: 1, fixed_positions),
}
