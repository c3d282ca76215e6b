"""Sizes of packed words and buffers: planes, words of a row, tiles of 32 rows (spec/deltafmt-v1.md, section 11.2)."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from deltafmt.format.constants import DTYPE_BITS

TILE_ROWS: Final = 32
WORD_BITS: Final = 32
SCALE_BYTES: Final = {"BF16": 2, "F32": 4}
GRIDS: Final = ("midtread", "midrise")
MAX_SCALE_GROUP: Final = 2**31 - 1


class BufferForm(NamedTuple):
    """What a buffer holds: an array of a dtype (``U32`` for packed words) and a shape, in C order."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def scale_words(scale_group: int, scale_dtype: str) -> str:
    """Return what a description of a layout ends with: nothing for one BF16 scale a row."""
    text = f" scale/{scale_group}" if scale_group else ""
    return text if scale_dtype == "BF16" else f"{text} {scale_dtype} scales"


def planes(width: int) -> tuple[int, ...]:
    """Return the widths of the planes of a word stream of ``width`` bits a field, lowest bits first (section 11.2).

    Each is the largest power of two, at most 32, that the bits left allow: 7 is 4, 2 and 1; 37 is 32, 4 and 1.
    """
    found = []
    while width:
        found.append(min(1 << width.bit_length() - 1, WORD_BITS))
        width -= found[-1]
    return tuple(found)


def placed_planes(width: int) -> list[tuple[int, int]]:
    """Return the width of each plane and the lowest bit of a field that it holds: 7 is (4, 0), (2, 4) and (1, 6)."""
    found, low = [], 0
    for plane in planes(width):
        found.append((plane, low))
        low += plane
    return found


def plane_words(count: int, plane: int) -> int:
    """Return how many 32-bit words a row of one plane takes: ``count`` fields of ``plane`` bits."""
    return -(-count * plane // WORD_BITS)


def stream_words(count: int, width: int) -> int:
    """Return how many 32-bit words a row of ``count`` fields of ``width`` bits takes, all planes together."""
    return sum(plane_words(count, plane) for plane in planes(width))


def tiles(rows: int, share: int = 1) -> int:
    """Return the number of tiles that hold ``rows`` rows; super-tiles of ``share`` tiles are complete."""
    return -(-rows // (TILE_ROWS * share)) * share
