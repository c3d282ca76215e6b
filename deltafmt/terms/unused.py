"""Packed words are the only ones that mean what they mean (spec/deltafmt-v1.md, sections 11.2 and 15).

A verifier asks whether unused bits, and words of rows that do not exist, are zero, and whether a field is beyond its
grid. Nothing here makes a matrix: the work follows the bytes, in blocks of at most ``BLOCK_FIELDS`` fields.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.tiles import TILE_ROWS, WORD_BITS, plane_words, planes, tiles

# Fields that are unpacked at a time: their bytes stay in the processor's cache.
BLOCK_FIELDS = 1 << 18


def check_stream(name: str, packed: NDArray[np.generic], rows: int, count: int, width: int, share: int = 1) -> None:
    """Check that a word stream in tiles has nothing but the fields of its rows.

    Args:
        name: the buffer's name.
        packed: words of shape (tiles, words, 32).
        rows, count: the rows, and the fields of each.
        width: bits per field.
        share: v, as in :func:`deltafmt.terms.words.pack`.

    Raises:
        InvalidFileError: a bit that no field uses, or a word of a row that does not exist, is not zero.
    """
    check_absent(name, packed, rows, share)
    end = 0
    for plane in planes(width):
        end += plane_words(count, plane)
        used = count * plane % WORD_BITS
        if used and (packed.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():
            raise _not_zero(name)


def check_lines(name: str, by_row: NDArray[np.generic], count: int, width: int) -> None:
    """Check words that are not in tiles, shape (rows, words of a row), as :func:`check_stream` does."""
    end = 0
    for plane in planes(width):
        end += plane_words(count, plane)
        used = count * plane % WORD_BITS
        if used and (by_row.view(np.uint32)[:, end - 1] >> np.uint32(used)).any():
            raise _not_zero(name)


def check_absent(name: str, tiled: NDArray[np.generic], rows: int, share: int = 1) -> None:
    """Check that what is stored for rows that do not exist is zero.

    Args:
        name: the buffer's name.
        tiled: shape (tiles, n, 32), as :func:`deltafmt.terms.words.to_tiles` gives it.
        rows: the rows that exist.
        share: v.

    Raises:
        InvalidFileError: something is not zero.
    """
    whole = TILE_ROWS * share
    here = rows - (rows - 1) // whole * whole
    # "Row r is lane (r mod 32 v) / v of tile r / (32 v) * v + r mod v": of the last super-tile, ``here`` rows exist.
    lane, tile = np.divmod(np.arange(here, whole), share)
    last = tiled[tiled.shape[0] - share :]
    if lane.size and last[tile, :, lane].view(np.uint8).any():
        raise _not_zero(name)


def check_fields(
    what: str, packed: NDArray[np.generic], rows: int, count: int, width: int, top: int, share: int = 1
) -> None:
    """Check that no field of a word stream in tiles is above ``top``.

    Raises:
        InvalidFileError: names the largest field of the first block that has one.
    """
    if top == (1 << width) - 1:
        return
    for tile, lines, start, stop in blocks(rows, count, share):
        part = packed[tile : tile + tiles(lines, share)].view(np.uint32)
        largest = int(words.unpack_columns(part, lines, count, width, start, stop, share).max())
        if largest > top:
            raise InvalidFileError(f"a {what} is {largest}, the grid ends at {top}")


def blocks(rows: int, count: int, share: int = 1, multiple: int = WORD_BITS) -> Iterator[tuple[int, int, int, int]]:
    """Cut rows of ``count`` fields into blocks: the first tile, the rows, and the first and the last field of each.

    Args:
        rows, count: the rows, and the fields of each.
        share: v; a block starts with a super-tile.
        multiple: the first field of a block is a multiple of this, itself a multiple of 32.
    """
    whole = TILE_ROWS * share
    lines = max(BLOCK_FIELDS // max(count, 1) // whole, 1) * whole
    fields = max(BLOCK_FIELDS // whole // multiple, 1) * multiple
    for first in range(0, rows, lines):
        here = min(lines, rows - first)
        step = count if count * here <= BLOCK_FIELDS else fields
        for start in range(0, count, max(step, 1)):
            yield first // TILE_ROWS, here, start, min(start + step, count)


def _not_zero(name: str) -> InvalidFileError:
    return InvalidFileError(f"unused bits of the {name} are not zero")
