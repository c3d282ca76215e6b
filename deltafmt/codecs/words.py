"""Packed words: bit streams of rows, cut into 32-bit words, word-major in tiles of 32 rows (spec, section 11.2).

This is the reference. ``deltafmt.codecs.fast`` holds the same functions compiled.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.layout.nm import TILE_ROWS, stream_words, tiles

Scalar = TypeVar("Scalar", bound=np.generic)


def pack(fields: NDArray[np.unsignedinteger], width: int) -> NDArray[np.uint32]:
    """Pack the fields of every row.

    Args:
        fields: shape (rows, count), each below ``2**width``.
        width: bits per field, 0 to 64.

    Returns:
        Words of shape (tiles, words, 32): lane r of tile t is row ``32t + r``; lanes beyond the rows are zero.
    """
    rows, count = fields.shape
    words = stream_words(count, width)
    # "Field i of a row takes the bits i*width to (i+1)*width of the row's stream, lowest bit first."
    shifts = np.arange(width, dtype=np.uint64)
    bits = (fields.astype(np.uint64)[:, :, None] >> shifts & 1).astype(np.uint8).reshape(rows, count * width)
    # "The stream is cut into 32-bit little-endian words; unused bits of the last word are zero."
    stream = np.zeros((rows, words * 32), np.uint8)
    stream[:, : count * width] = bits
    by_row = np.packbits(stream, axis=1, bitorder="little").view(np.dtype("<u4"))
    # "Words of consecutive rows are adjacent: word w of row 32t + r is word 32(t*W + w) + r of the buffer."
    return to_tiles(by_row.reshape(rows, words))


def pack_into(fields: NDArray[np.unsignedinteger], width: int, out: NDArray[np.uint32]) -> None:
    """Pack the fields of every row into an array shaped as :func:`pack` shapes its result."""
    out[...] = pack(fields, width)


def unpack(packed: NDArray[np.uint32], rows: int, count: int, width: int) -> NDArray[np.uint64]:
    """Undo :func:`pack`; return fields of shape (rows, count)."""
    by_row = np.ascontiguousarray(from_tiles(packed, rows))
    stream = np.unpackbits(by_row.view(np.uint8), axis=1, bitorder="little")
    bits = stream[:, : count * width].reshape(rows, count, width).astype(np.uint64)
    fields: NDArray[np.uint64] = (bits << np.arange(width, dtype=np.uint64)).sum(axis=2, dtype=np.uint64)
    return fields


def to_tiles(by_row: NDArray[Scalar]) -> NDArray[Scalar]:
    """Rearrange (rows, n) into (tiles, n, 32), lanes beyond the rows zero."""
    rows, count = by_row.shape
    padded = np.zeros((tiles(rows) * TILE_ROWS, count), by_row.dtype)
    padded[:rows] = by_row
    return np.ascontiguousarray(padded.reshape(tiles(rows), TILE_ROWS, count).transpose(0, 2, 1))


def from_tiles(tiled: NDArray[Scalar], rows: int) -> NDArray[Scalar]:
    """Undo :func:`to_tiles`."""
    count = tiled.shape[1]
    return tiled.transpose(0, 2, 1).reshape(tiled.shape[0] * TILE_ROWS, count)[:rows]
