"""The ``sparse`` layout: buffers to entries that stand anywhere, and back (spec/deltafmt-v1.md, section 14)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.buffers import Packed
from deltafmt.terms.codec import TermArrays, TermCodec
from deltafmt.terms.codec_routines import REFERENCE, CodecRoutines
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import RAW_DTYPES, Raw, widen
from deltafmt.terms.scales import raw_scales, read_scales
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import TILE_ROWS, plane_words, planes, tiles

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


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
class _Slots:
    """Where entries go: lane, slot and gap of each, and where the slots of each tile's blocks start."""

    lanes: Ints
    slots: Ints
    gaps: Ints
    starts: Ints


def _assign(layout: SparseLayout, arrays: SparseArrays, columns: int) -> _Slots:
    rows = arrays.ends.size
    counts = np.diff(arrays.ends, prepend=0)
    row = np.repeat(np.arange(rows), counts)
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
    needed = np.zeros(tiles(rows) * TILE_ROWS * layout.blocks(columns), np.int64)
    np.maximum.at(needed, part, taken - before)
    by_block = needed.reshape(tiles(rows), TILE_ROWS, -1).max(axis=1).reshape(-1)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(by_block)])
    of_part = starts[row // TILE_ROWS * layout.blocks(columns) + block]
    return _Slots(row % TILE_ROWS, of_part + taken - before - 1, gaps, starts)


class SparseCodec(TermCodec[SparseLayout, SparseArrays]):
    """The codec of one ``sparse`` term; see :class:`deltafmt.terms.codec.TermCodec`.

    ``gaps`` and ``codes`` have shape (words, 32), raw ``values`` shape (slots, 32), ``starts`` shape
    (tiles * blocks + 1,), ``scales`` shape (tiles, 1, 32). Decoding takes a run of rows, encoding the whole matrix.
    """

    @classmethod
    def fit(cls, layout: SparseLayout, arrays: SparseArrays, columns: int) -> tuple[SparseLayout, int]:
        """Return the layout and the number of slots that the entries take."""
        return layout, int(_assign(layout, arrays, columns).starts[-1])

    def encode(
        self,
        arrays: SparseArrays,
        packed: Packed,
        first: int = 0,  # noqa: ARG002 - the whole matrix
        routines: CodecRoutines = REFERENCE,
    ) -> None:
        """Pack the entries."""
        layout, coding = self.layout, self.layout.values
        at = _assign(layout, arrays, self.shape[1])
        packed["starts"][...] = at.starts
        gaps = np.full((TILE_ROWS, self.slots), layout.filler, np.uint8 if layout.gap_bits <= 8 else np.uint16)
        gaps[at.lanes, at.slots] = at.gaps
        routines.pack_into(gaps, layout.gap_bits, packed["gaps"].view(np.uint32)[None], 1)
        if isinstance(coding, Coding):
            assert arrays.scales is not None
            codes = np.zeros((TILE_ROWS, self.slots), np.uint8)
            codes[at.lanes, at.slots] = arrays.values
            routines.pack_into(codes, coding.bits, packed["codes"].view(np.uint32)[None], 1)
            packed["scales"][...] = words.to_tiles(raw_scales(coding.scale_dtype, arrays.scales))
        else:
            packed["values"].view(RAW_DTYPES[coding])[at.slots, at.lanes] = arrays.values

    def decode(
        self, packed: Packed, start: int, stop: int, routines: CodecRoutines = REFERENCE, *, check_form: bool = False
    ) -> Floats:
        """Return the delta's rows ``start`` to ``stop``."""
        starts = self._starts(packed["starts"])
        blocks = self.layout.blocks(self.shape[1])
        if check_form and start == 0:
            self._check_ends(packed)
        out = np.zeros((stop - start, self.shape[1]), np.float32)
        for tile in range(start // TILE_ROWS, tiles(stop)):
            of_blocks = starts[tile * blocks : (tile + 1) * blocks + 1]
            lanes = min(self.shape[0] - tile * TILE_ROWS, TILE_ROWS)
            run = out[tile * TILE_ROWS - start :][:lanes]
            self._decode_tile(packed, tile, of_blocks, run, routines, check_form=check_form)
        return out

    def _starts(self, packed: NDArray[np.generic]) -> Ints:
        """Return where the slots of every block start.

        Raises:
            InvalidFileError: they descend, or do not go from 0 to the term's number of slots.
        """
        starts = packed.astype(np.int64)
        if starts[0] != 0 or starts[-1] != self.slots or (np.diff(starts) < 0).any():
            raise InvalidFileError(f"the starts of the blocks do not ascend from 0 to {self.slots}")
        return starts

    def _decode_tile(
        self,
        packed: Packed,
        tile: int,
        starts: Ints,
        out: Floats,
        routines: CodecRoutines,
        *,
        check_form: bool,
    ) -> None:
        """Write the entries of one tile into its rows."""
        layout, coding, columns = self.layout, self.layout.values, self.shape[1]
        first, last = int(starts[0]), int(starts[-1])
        gaps = self._fields(packed["gaps"], layout.gap_bits, first, last, routines).astype(np.int64)
        is_entry = gaps != layout.filler
        # "A filler skips F columns, an entry its gap and its own."
        passed = np.zeros((TILE_ROWS, last - first + 1), np.int64)
        np.cumsum(np.where(is_entry, gaps + 1, layout.filler), axis=1, out=passed[:, 1:])
        block = np.repeat(np.arange(starts.size - 1), np.diff(starts))
        column = block * layout.span + passed[:, 1:] - passed[:, starts[block] - first] - 1
        if (is_entry & (column >= np.minimum((block + 1) * layout.span, columns))).any():
            raise InvalidFileError("an entry lies beyond its block")
        if isinstance(coding, Coding):
            scales = read_scales(coding.scale_dtype, packed["scales"][tile, 0])
            fields = self._fields(packed["codes"], coding.bits, first, last, routines)
            half = (scales * np.float32(0.5))[:, None]
            with np.errstate(over="ignore"):
                values = (2 * fields.astype(np.int32) - coding.top).astype(np.float32) * half
        else:
            fields = np.ascontiguousarray(packed["values"][first:last].T).view(RAW_DTYPES[coding])
            values = widen(fields, coding)
            if not np.isfinite(values).all():
                raise InvalidFileError("a value is not finite")
        if is_entry[out.shape[0] :].any():
            raise InvalidFileError("a row that does not exist has an entry")
        if check_form:
            self._check_tile(packed, tile, starts, is_entry, fields, out.shape[0])
        lane, slot = np.nonzero(is_entry)
        out[lane, column[lane, slot]] = values[lane, slot]

    def _fields(
        self, stream: NDArray[np.generic], width: int, first: int, last: int, routines: CodecRoutines
    ) -> NDArray[np.unsignedinteger]:
        """Return fields ``first`` to ``last`` of the 32 lanes, shape (32, last - first)."""
        whole = first // 32 * 32
        by_lane = np.ascontiguousarray(words.cut(stream.view(np.uint32).T, self.slots, width, whole, last))
        fields = routines.unpack(words.to_tiles(by_lane), TILE_ROWS, last - whole, width, 1)
        return fields[:, first - whole :]

    def _check_tile(
        self,
        packed: Packed,
        tile: int,
        starts: Ints,
        is_entry: NDArray[np.bool_],
        fields: NDArray[np.unsignedinteger],
        lanes: int,
    ) -> None:
        """Check what decoding alone does not: that a tile is the canonical packing of what it means.

        Raises:
            InvalidFileError: a field beyond the grid, a filler with a value, a slot or a scale that no row needs.
        """
        coding = self.layout.values
        if isinstance(coding, Coding):
            if fields.size and int(fields.max()) > coding.top:
                raise InvalidFileError(f"a code is {fields.max()}, the grid ends at {coding.top}")
            if packed["scales"][tile, 0, lanes:].any():
                raise InvalidFileError("unused bits of the scales are not zero")
        if fields[~is_entry].any():
            raise InvalidFileError("a filler has a value that is not zero")
        # A block has the slots of the row that needs the most, and what a row needs ends with an entry.
        used = starts[1:] > starts[:-1]
        ends = (starts[1:] - starts[0] - 1)[used]
        if not is_entry[:, ends].any(axis=0).all():
            raise InvalidFileError("a block has a slot that no row needs")

    def _check_ends(self, packed: Packed) -> None:
        """Check that the unused bits of every plane's last word are zero.

        Raises:
            InvalidFileError: they are not.
        """
        streams = {"gaps": self.layout.gap_bits}
        if isinstance(self.layout.values, Coding):
            streams["codes"] = self.layout.values.bits
        for name, width in streams.items():
            end = 0
            for plane in planes(width):
                end += plane_words(self.slots, plane)
                used = self.slots * plane % 32
                if used and (packed[name].view(np.uint32)[end - 1] >> np.uint32(used)).any():
                    raise InvalidFileError(f"unused bits of the {name} are not zero")
