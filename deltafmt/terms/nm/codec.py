"""The ``nm`` layout: buffers to positions, codes and scales, and back (spec/deltafmt-v1.md, section 11).

A tensor is handled in runs of rows. A run starts where a super-tile does, so its buffers are slices of the tensor's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.buffers import Packed, blank, check_same
from deltafmt.terms.codec import TermArrays, TermCodec
from deltafmt.terms.floats import RAW_DTYPES, Raw, add
from deltafmt.terms.nm.index.codecs import INDEX_CODECS
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.nm.scatter import scatter
from deltafmt.terms.scales import check_scales, raw_scales, read_scales
from deltafmt.terms.tiles import TILE_ROWS, WORD_BITS, tiles
from deltafmt.terms.unused import BLOCK_FIELDS, check_absent, check_fields, check_stream

TRANSCODE_ENTRIES = 1 << 17


@dataclass(frozen=True, slots=True)
class NMArrays(TermArrays):
    """The decoded content of a run of rows.

    Attributes:
        positions: uint8, shape (mask rows, groups, N).
        codes: fields u, uint8, shape (rows, groups * N).
        scales: float32, shape (rows, scales per row).
    """

    positions: NDArray[np.uint8]
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]


def run_rows(layout: NMLayout) -> int:
    """Return the number of rows on whose multiples a run may start (appendix A.1): those of a super-tile."""
    return TILE_ROWS * layout.share


def encode(
    layout: NMLayout,
    arrays: NMArrays,
    out: Mapping[str, NDArray[np.generic]],
) -> None:
    """Pack a run of rows into its slices of :func:`deltafmt.terms.buffers.blank`.

    The positions of a ``seeded`` layout are not stored; those of the others must ascend in every group. Fields of
    elements beyond the last column must be zero.
    """
    words.pack_into(arrays.codes, layout.bits, _words(out["codes"]), layout.share)
    if "index" in out:
        INDEX_CODECS[layout.index].encode(arrays.positions, layout, _words(out["index"]))
    out["scales"][...] = words.to_tiles(raw_scales(layout.scale_dtype, arrays.scales), layout.share)


def decode(
    layout: NMLayout,
    packed: Mapping[str, NDArray[np.generic]],
    seed: int,
    first: int,
    rows: int,
    columns: int,
) -> NMArrays:
    """Unpack a run of rows.

    Args:
        layout: the term's layout.
        packed: the run's slices of :func:`deltafmt.terms.buffers.views`.
        seed: the tensor seed.
        first: the run's first row in the tensor, a multiple of :func:`run_rows`.
        rows: rows of the run.
        columns: columns of the tensor.

    Raises:
        InvalidFileError: an index holds a position or rank that is out of range, positions do not ascend, or a scale
            is negative or not finite.
    """
    kept_at, scales = _kept_and_scales(layout, packed, seed, first, rows, columns)
    codes = words.unpack(_words(packed["codes"]), rows, layout.kept(columns), layout.bits, layout.share)
    codes = codes.astype(np.uint8, copy=False)
    return NMArrays(kept_at, codes, scales)


def _kept_and_scales(
    layout: NMLayout, packed: Packed, seed: int, first: int, rows: int, columns: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return the positions and the scales of a run of rows."""
    scales = read_scales(layout.scale_dtype, words.from_tiles(packed["scales"], rows, layout.share))
    index = _words(packed["index"]) if "index" in packed else None
    codec, mask_rows, groups = INDEX_CODECS[layout.index], layout.mask_rows(rows), layout.groups(columns)
    return codec.decode(index, layout, seed, first // layout.share, mask_rows, groups), scales


def dense(layout: NMLayout, arrays: NMArrays, columns: int) -> NDArray[np.float32]:
    """Return the float32 delta of a run of rows, shape (rows, columns)."""
    return scatter(
        arrays.codes,
        arrays.scales,
        arrays.positions,
        columns,
        layout.m,
        layout.share,
        layout.top,
        layout.scale_group,
    )


def _add_run(
    native: Native,
    layout: NMLayout,
    packed: Packed,
    seed: int,
    first: int,
    base: Raw,
    base_dtype: str,
    dtype: str,
) -> Raw:
    rows, columns = base.shape
    positions, scales = _kept_and_scales(layout, packed, seed, first, rows, columns)
    out = np.empty(base.shape, RAW_DTYPES[dtype])
    kept = max(layout.kept(columns), 1)
    native.nm_unpack(
        *(_words(packed["codes"]), scales, np.ascontiguousarray(base), base_dtype, out, dtype),
        *(positions, layout.m, layout.share, layout.bits, layout.top, min(layout.scale_group or kept, kept)),
    )
    return out


@loop(_add_run)
def add_run(
    layout: NMLayout,
    packed: Packed,
    seed: int,
    first: int,
    base: Raw,
    base_dtype: str,
    dtype: str,
) -> Raw:
    """Return a run of rows of a base plus their delta, rounded to ``dtype``, as a raw array.

    Args:
        layout: the term's layout.
        packed: the run's slices of :func:`deltafmt.terms.buffers.views`.
        seed: the tensor seed.
        first: the run's first row in the tensor, a multiple of :func:`run_rows`.
        base: the run's rows of the base, raw, shape (rows, columns).
        base_dtype, dtype: dtypes of the base and of the result.

    Raises:
        InvalidFileError: as :func:`decode`.
    """
    rows, columns = base.shape
    arrays = decode(layout, packed, seed, first, rows, columns)
    return add(base, base_dtype, dense(layout, arrays, columns), dtype)


def outside(layout: NMLayout, arrays: NMArrays, columns: int) -> NDArray[np.bool_]:
    """Return True for each kept element beyond the last column; shape (rows, groups * N)."""
    start = np.arange(layout.groups(columns), dtype=np.int64)[:, None] * layout.m
    beyond = (arrays.positions + start >= columns).reshape(arrays.positions.shape[0], -1)
    return beyond[np.arange(arrays.codes.shape[0]) // layout.share]


def check(
    layout: NMLayout,
    packed: Mapping[str, NDArray[np.generic]],
    arrays: NMArrays,
    columns: int,
) -> None:
    """Check what decoding alone does not: that the run is the canonical packing of what it means.

    Raises:
        InvalidFileError: a field beyond the grid, an element beyond the last column whose field is not zero, or unused
            bits that are not zero.
    """
    if arrays.codes.size and int(arrays.codes.max()) > layout.top:
        raise InvalidFileError(f"a code is {arrays.codes.max()}, the grid ends at {layout.top}")
    if columns % layout.m and arrays.codes[outside(layout, arrays, columns)].any():
        raise InvalidFileError("an entry beyond the last column has a code that is not zero")
    again = blank(layout, arrays.codes.shape[0], columns)
    encode(layout, arrays, again)
    check_same(again, packed)


def slice_run(packed: Packed, share: int, start: int, stop: int) -> dict[str, NDArray[np.generic]]:
    """Return the tiles of a run of rows that starts on a multiple of :func:`run_rows`."""
    whole = slice(start // TILE_ROWS, tiles(stop, share))
    # A super-tile of rows has one tile of mask rows.
    masks = slice(whole.start // share, whole.stop // share)
    return {name: array[masks if name == "index" else whole] for name, array in packed.items()}


class NMCodec(TermCodec[NMLayout, NMArrays]):
    """The codec of one ``nm`` term; see :class:`deltafmt.terms.codec.TermCodec`."""

    def __init__(self, layout: NMLayout, rows: int, columns: int, seed: int = 0, slots: int = 0) -> None:
        super().__init__(layout, rows, columns, seed, slots)
        self.run_rows = run_rows(layout)
        self.width = self.row_work = layout.width(columns)

    def encode(self, arrays: NMArrays, packed: Packed, first: int) -> None:
        """Pack a run of rows."""
        run = slice_run(packed, self.layout.share, first, first + arrays.codes.shape[0])
        encode(self.layout, arrays, run)

    def decode(self, packed: Packed, start: int, stop: int, *, check_form: bool = False) -> NDArray[np.float32]:
        """Return the delta's rows ``start`` to ``stop``."""
        columns = self.shape[1]
        run = slice_run(packed, self.layout.share, start, stop)
        arrays = decode(self.layout, run, self.seed, start, stop - start, columns)
        if check_form:
            check(self.layout, run, arrays, columns)
        return dense(self.layout, arrays, columns)

    def marked(self, packed: Packed, start: int, stop: int) -> NDArray[np.bool_]:
        """Return where the term has entries, also those whose value is zero."""
        rows, columns = stop - start, self.shape[1]
        run = slice_run(packed, self.layout.share, start, stop)
        positions, _ = _kept_and_scales(self.layout, run, self.seed, start, rows, columns)
        # The lowest code has a value that is not zero in every grid.
        lowest = np.zeros((rows, self.layout.kept(columns)), np.uint8)
        ones = np.ones((rows, self.layout.scales_per_row(columns)), np.float32)
        found: NDArray[np.bool_] = dense(self.layout, NMArrays(positions, lowest, ones), columns) != 0
        return found

    def check(self, packed: Packed) -> None:
        """Check the whole term; see :meth:`deltafmt.terms.codec.TermCodec.check`."""
        layout, (rows, columns) = self.layout, self.shape
        kept, share = layout.kept(columns), layout.share
        check_scales(layout.scale_dtype, packed["scales"])
        check_absent("scales", packed["scales"], rows, share)
        check_stream("codes", packed["codes"], rows, kept, layout.bits, share)
        check_fields("code", packed["codes"], rows, kept, layout.bits, layout.top, share)
        index = _words(packed["index"]) if "index" in packed else None
        INDEX_CODECS[layout.index].check(index, layout, layout.mask_rows(rows), layout.groups(columns))
        if columns % layout.m:
            self._check_beyond(packed)

    def _check_beyond(self, packed: Packed) -> None:
        """Check that entries of the last group that stand beyond the last column have the code zero."""
        layout, (rows, columns) = self.layout, self.shape
        groups, kept, codec = layout.groups(columns), layout.kept(columns), INDEX_CODECS[layout.index]
        begin = (kept - layout.n) // WORD_BITS * WORD_BITS
        step = max(BLOCK_FIELDS // (kept - begin) // self.run_rows, 1) * self.run_rows
        for first in range(0, rows, step):
            here = min(step, rows - first)
            run = slice_run(packed, layout.share, first, first + here)
            index = _words(run["index"]) if "index" in run else None
            mask_rows = layout.mask_rows(here)
            last = codec.last_group(index, layout, self.seed, first // layout.share, mask_rows, groups)
            codes = words.unpack_columns(_words(run["codes"]), here, kept, layout.bits, begin, kept, layout.share)
            beyond = (last.astype(np.int64) + (groups - 1) * layout.m >= columns)[np.arange(here) // layout.share]
            if codes[:, codes.shape[1] - layout.n :][beyond].any():
                raise InvalidFileError("an entry beyond the last column has a code that is not zero")

    def add(self, packed: Packed, start: int, stop: int, base: Raw, base_dtype: str, dtype: str) -> Raw:
        """Return rows of a base plus the term's matrix; see :meth:`deltafmt.terms.codec.TermCodec.add`."""
        run = slice_run(packed, self.layout.share, start, stop)
        return add_run(self.layout, run, self.seed, start, base, base_dtype, dtype)

    def converted(self, packed: Packed, target: NMLayout) -> dict[str, NDArray[np.generic]]:
        """Return the term's arrays with another index encoding."""
        arrays = dict(packed)
        if target != self.layout:
            rows, columns = self.shape
            mask_rows = target.mask_rows(rows)
            arrays["index"] = transcode_index(self.layout, _words(arrays["index"]), mask_rows, columns, target)
        return arrays

    def digested_form(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return an index in its plain encoding, so that a hot and a cold file have the same digests."""
        plain = self.layout.plain()
        if name == "index" and plain != self.layout:
            rows, columns = self.shape
            return transcode_index(self.layout, _words(array), self.layout.mask_rows(rows), columns, plain)
        return array

    def digested_pieces(self, name: str, array: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
        """Give an index in its plain encoding, some tiles at a time."""
        plain, (rows, columns) = self.layout.plain(), self.shape
        if name == "index" and plain != self.layout:
            yield from transcoded(self.layout, _words(array), self.layout.mask_rows(rows), columns, plain)
        else:
            yield array

    @property
    def piece_bytes(self) -> int:
        """Bytes of some tiles as ranks, positions and words."""
        if self.layout.plain() == self.layout:
            return 0
        entries = TILE_ROWS * self.layout.groups(self.shape[1]) * self.layout.n
        return max(entries, TRANSCODE_ENTRIES) * 4 + entries // self.layout.n * 16


def transcode_index(
    layout: NMLayout, index: NDArray[np.uint32], mask_rows: int, columns: int, target: NMLayout
) -> NDArray[np.uint32]:
    """Return a stored index in another encoding; the positions, and so the codes, stay as they are."""
    out = np.empty((tiles(mask_rows), target.index_words(columns), TILE_ROWS), np.uint32)
    tile = 0
    for piece in transcoded(layout, index, mask_rows, columns, target):
        out[tile : tile + len(piece)] = piece
        tile += len(piece)
    return out


def transcoded(
    layout: NMLayout, index: NDArray[np.uint32], mask_rows: int, columns: int, target: NMLayout
) -> Iterator[NDArray[np.uint32]]:
    """Give a stored index in another encoding, some tiles at a time."""
    groups = layout.groups(columns)
    # A tile at a time, or a few small ones: the reference takes eight bytes for every bit.
    step = max(TRANSCODE_ENTRIES // (TILE_ROWS * groups * layout.n), 1)
    for tile in range(0, tiles(mask_rows), step):
        rows = min(mask_rows - tile * TILE_ROWS, step * TILE_ROWS)
        positions = INDEX_CODECS[layout.index].decode(index[tile : tile + step], layout, 0, 0, rows, groups)
        out = np.empty((tiles(rows), target.index_words(columns), TILE_ROWS), np.uint32)
        INDEX_CODECS[target.index].encode(positions, target, out)
        yield out


def _words(array: NDArray[np.generic]) -> NDArray[np.uint32]:
    return array.view(np.uint32)
