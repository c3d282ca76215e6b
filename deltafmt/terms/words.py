"""Packed words: fields in planes of 32-bit words, word-major in tiles of 32 rows (spec, section 11.2).

Compiled: ``kernels/cpu/loops/words.c``.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.terms.tiles import TILE_ROWS, plane_words, planes, tiles

Scalar = TypeVar("Scalar", bound=np.generic)


def pack(fields: NDArray[np.unsignedinteger], width: int, share: int = 1) -> NDArray[np.uint32]:
    """Pack the fields of every row.

    Args:
        fields: shape (rows, count), each below ``2**width``.
        width: bits per field, 0 to 64.
        share: v, rows of a mask row, which lie in different tiles; 1 for an index.

    Returns:
        Words of shape (tiles, words, 32), see :func:`to_tiles`.
    """
    by_row = [np.zeros((fields.shape[0], 0), np.uint32)]
    low = 0
    for plane in planes(width):
        # "The first plane holds the lowest bits of every field, the next one those that follow."
        part = fields.astype(np.uint64) >> np.uint64(low) & np.uint64((1 << plane) - 1)
        by_row.append(_pack_plane(part, plane))
        low += plane
    # "A row's words are those of its planes, one plane after another."
    return to_tiles(np.concatenate(by_row, axis=1), share)


def _pack_plane(fields: NDArray[np.uint64], width: int) -> NDArray[np.uint32]:
    """Return the words of one plane, shape (rows, words)."""
    rows, count = fields.shape
    words = plane_words(count, width)
    # "Field i takes the bits i*width to (i+1)*width of the row's plane, lowest bit first."
    shifts = np.arange(width, dtype=np.uint64)
    bits = (fields[:, :, None] >> shifts & np.uint64(1)).astype(np.uint8).reshape(rows, count * width)
    # "The plane is cut into 32-bit words, lowest bits first; unused bits of its last word are zero."
    stream = np.zeros((rows, words * 32), np.uint8)
    stream[:, : count * width] = bits
    by_row: NDArray[np.uint32] = np.packbits(stream, axis=1, bitorder="little").view(np.dtype("<u4"))
    return by_row.reshape(rows, words)


def _pack_into(
    native: Native, fields: NDArray[np.unsignedinteger], width: int, out: NDArray[np.uint32], share: int = 1
) -> None:
    if width:
        native.pack_words(np.ascontiguousarray(fields), width, out, share)


@loop(_pack_into)
def pack_into(fields: NDArray[np.unsignedinteger], width: int, out: NDArray[np.uint32], share: int = 1) -> None:
    """Pack the fields of every row into an array shaped as :func:`pack` shapes its result."""
    out[...] = pack(fields, width, share)


def field_dtype(width: int) -> type[np.unsignedinteger]:
    """Return the dtype in which fields of so many bits are unpacked: uint8, uint16 or uint64."""
    return np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint64


def _unpack(
    native: Native, packed: NDArray[np.uint32], rows: int, count: int, width: int, share: int = 1
) -> NDArray[np.unsignedinteger]:
    out = np.zeros((rows, count), field_dtype(width)) if width == 0 else np.empty((rows, count), field_dtype(width))
    if width:
        native.unpack_words(share, np.ascontiguousarray(packed), count, 0, width, out)
    return out


@loop(_unpack)
def unpack(
    packed: NDArray[np.uint32], rows: int, count: int, width: int, share: int = 1
) -> NDArray[np.unsignedinteger]:
    """Undo :func:`pack`; return fields of shape (rows, count), of the dtype that :func:`field_dtype` gives."""
    return _unpack_rows(from_tiles(packed, rows, share), count, width)


def _unpack_part(
    native: Native, by_row: NDArray[np.uint32], count: int, width: int, start: int, stop: int
) -> NDArray[np.unsignedinteger]:
    out = np.empty((by_row.shape[0], stop - start), field_dtype(width))
    native.unpack_words(0, np.ascontiguousarray(by_row), count, start, width, out)
    return out


@loop(_unpack_part)
def unpack_part(
    by_row: NDArray[np.uint32], count: int, width: int, start: int, stop: int
) -> NDArray[np.unsignedinteger]:
    """Return fields ``start`` to ``stop`` of rows of ``count`` fields, whose words are not in tiles.

    Args:
        by_row: shape (rows, words of a row).
        count: fields of a row.
        width: bits per field, 1 to 64.
        start, stop: the fields; ``start`` is a multiple of 32.
    """
    return _unpack_rows(_cut(by_row, count, width, start, stop), stop - start, width)


def _unpack_lanes(
    native: Native, tile: NDArray[np.uint32], count: int, width: int, start: int, stop: int
) -> NDArray[np.unsignedinteger]:
    out = np.empty((TILE_ROWS, stop - start), field_dtype(width))
    native.unpack_words(1, np.ascontiguousarray(tile)[None], count, start, width, out)
    return out


@loop(_unpack_lanes)
def unpack_lanes(
    tile: NDArray[np.uint32], count: int, width: int, start: int, stop: int
) -> NDArray[np.unsignedinteger]:
    """Return the same fields of the 32 rows of one tile, shape (words of a row, 32)."""
    return _unpack_rows(_cut(np.ascontiguousarray(tile.T), count, width, start, stop), stop - start, width)


def _unpack_columns(
    native: Native, packed: NDArray[np.uint32], rows: int, count: int, width: int, start: int, stop: int, share: int = 1
) -> NDArray[np.unsignedinteger]:
    out = np.empty((rows, stop - start), field_dtype(width))
    native.unpack_words(share, np.ascontiguousarray(packed), count, start, width, out)
    return out


@loop(_unpack_columns)
def unpack_columns(
    packed: NDArray[np.uint32], rows: int, count: int, width: int, start: int, stop: int, share: int = 1
) -> NDArray[np.unsignedinteger]:
    """Return fields ``start`` to ``stop`` of rows whose words are in tiles.

    Args:
        packed: shape (tiles, words of a row, 32).
        rows, count: the rows, and the fields of each.
        width: bits per field, 1 to 64.
        start, stop: the fields; ``start`` is a multiple of 32.
        share: v, as in :func:`pack`.
    """
    return _unpack_rows(_cut(from_tiles(packed, rows, share), count, width, start, stop), stop - start, width)


def _unpack_rows(by_row: NDArray[np.uint32], count: int, width: int) -> NDArray[np.unsignedinteger]:
    rows = by_row.shape[0]
    fields = np.zeros((rows, count), np.uint64)
    low = first = 0
    for plane in planes(width):
        words = plane_words(count, plane)
        fields |= _unpack_plane(by_row[:, first : first + words], count, plane) << np.uint64(low)
        low, first = low + plane, first + words
    return fields.astype(field_dtype(width))


def _unpack_plane(by_row: NDArray[np.uint32], count: int, width: int) -> NDArray[np.uint64]:
    """Undo :func:`_pack_plane`."""
    stream = np.unpackbits(np.ascontiguousarray(by_row).view(np.uint8), axis=1, bitorder="little")
    bits = stream[:, : count * width].reshape(by_row.shape[0], count, width).astype(np.uint64)
    fields: NDArray[np.uint64] = (bits << np.arange(width, dtype=np.uint64)).sum(axis=2, dtype=np.uint64)
    return fields


def _cut(by_row: NDArray[np.uint32], count: int, width: int, start: int, stop: int) -> NDArray[np.uint32]:
    """Return the words of fields ``start`` to ``stop`` of rows of ``count`` fields; ``start`` is a multiple of 32.

    32 fields are whole words in every plane, so that each plane of the run is a slice.
    """
    if (start, stop) == (0, count):
        return by_row
    parts, first = [], 0
    for plane in planes(width):
        parts.append(by_row[:, first + start * plane // 32 : first + plane_words(stop, plane)])
        first += plane_words(count, plane)
    return np.concatenate(parts, axis=1)


def to_tiles(by_row: NDArray[Scalar], share: int = 1) -> NDArray[Scalar]:
    """Rearrange (rows, n) into (tiles, n, 32), lanes without a row zero.

    Row r stands in tile ``r // (32 v) * v + r % v``, lane ``r % (32 v) // v``, where v is ``share``.
    """
    rows, count = by_row.shape
    supers = tiles(rows, share) // share
    # "Super-tiles are complete. Words of rows that do not exist are zero."
    padded = np.zeros((supers * TILE_ROWS * share, count), by_row.dtype)
    padded[:rows] = by_row
    # "Lane l of the v tiles of a super-tile holds the v rows of its mask row l."
    by_lane = padded.reshape(supers, TILE_ROWS, share, count)
    return np.ascontiguousarray(by_lane.transpose(0, 2, 3, 1)).reshape(supers * share, count, TILE_ROWS)


def from_tiles(tiled: NDArray[Scalar], rows: int, share: int = 1) -> NDArray[Scalar]:
    """Undo :func:`to_tiles`."""
    supers, count = tiled.shape[0] // share, tiled.shape[1]
    by_lane = tiled.reshape(supers, share, count, TILE_ROWS).transpose(0, 3, 1, 2)
    return by_lane.reshape(supers * TILE_ROWS * share, count)[:rows]
