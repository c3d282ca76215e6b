"""The ``sparse`` layout: buffers to entries that stand anywhere, and back (spec/deltafmt-v1.md, section 14)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.buffers import Packed
from deltafmt.terms.codec import TermCodec
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import RAW_DTYPES
from deltafmt.terms.scales import check_scales, raw_scales, read_scales
from deltafmt.terms.sparse.checks import check_run, runs_of_blocks
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import Floats, Ints, SparseArrays, block_starts, columns_of, place, write_tile
from deltafmt.terms.tiles import TILE_ROWS, plane_words, planes, tiles
from deltafmt.terms.unused import check_absent


class SparseCodec(TermCodec[SparseLayout, SparseArrays]):
    """The codec of one ``sparse`` term; see :class:`deltafmt.terms.codec.TermCodec`.

    ``gaps`` and ``codes`` have shape (words, 32), raw ``values`` shape (slots, 32), ``starts`` shape
    (tiles * blocks + 1,), ``scales`` shape (tiles, 1, 32). Decoding takes a run of rows, encoding the whole matrix.
    """

    @classmethod
    def fit(cls, layout: SparseLayout, arrays: SparseArrays, columns: int) -> tuple[SparseLayout, int]:
        """Return the layout and the number of slots that the entries take."""
        return layout, int(block_starts(layout, arrays, columns)[-1])

    def encode(
        self,
        arrays: SparseArrays,
        packed: Packed,
        first: int = 0,  # noqa: ARG002 - the whole matrix
    ) -> None:
        """Pack the entries."""
        layout, coding, columns = self.layout, self.layout.values, self.shape[1]
        starts = block_starts(layout, arrays, columns)
        gaps, placed = place(layout, arrays, columns, starts)
        packed["starts"][...] = starts
        words.pack_into(gaps, layout.gap_bits, packed["gaps"].view(np.uint32)[None], 1)
        if isinstance(coding, Coding):
            assert arrays.scales is not None
            words.pack_into(placed.view(np.uint8), coding.bits, packed["codes"].view(np.uint32)[None], 1)
            packed["scales"][...] = words.to_tiles(raw_scales(coding.scale_dtype, arrays.scales))
        else:
            packed["values"].view(RAW_DTYPES[coding])[...] = placed

    def decode(self, packed: Packed, start: int, stop: int, *, check_form: bool = False) -> Floats:
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
            self._decode_tile(packed, tile, of_blocks, run, check_form=check_form)
        return out

    def marked(self, packed: Packed, start: int, stop: int) -> NDArray[np.bool_]:
        """Return where the term has entries, also those whose value is zero."""
        found = np.zeros((stop - start, self.shape[1]), np.bool_)
        for tile in range(start // TILE_ROWS, tiles(stop)):
            lane, column, _ = self.entries(packed, tile)
            row = lane + tile * TILE_ROWS - start
            inside = row < stop - start
            found[row[inside], column[inside]] = True
        return found

    def check(self, packed: Packed) -> None:
        """Check the whole term; see :meth:`deltafmt.terms.codec.TermCodec.check`."""
        layout, coding = self.layout, self.layout.values
        starts = packed["starts"].view(np.uint32)
        if starts[0] != 0 or starts[-1] != self.slots or (starts[1:] < starts[:-1]).any():
            raise self._not_ascending()
        self._check_ends(packed)
        if isinstance(coding, Coding):
            check_scales(coding.scale_dtype, packed["scales"])
            check_absent("scales", packed["scales"], self.shape[0])
        lanes = (self.shape[0] - 1) % TILE_ROWS + 1
        of_last_tile = int(starts[starts.size - 1 - layout.blocks(self.shape[1])])
        for run, of_run in runs_of_blocks(layout, starts, self.shape[1]):
            first, last = int(of_run.starts[0]), int(of_run.starts[-1])
            gaps = self._fields(packed["gaps"], layout.gap_bits, first, last)
            if isinstance(coding, Coding):
                values = self._fields(packed["codes"], coding.bits, first, last)
            else:
                values = packed["values"].view(RAW_DTYPES[coding])[first:last].T
            check_run(layout, of_run, gaps, values, f"blocks {run.start} to {run.stop}")
            if (gaps[lanes:, max(of_last_tile - first, 0) :] != layout.filler).any():
                raise InvalidFileError("a row that does not exist has an entry")

    def _not_ascending(self) -> InvalidFileError:
        return InvalidFileError(f"the starts of the blocks do not ascend from 0 to {self.slots}")

    def _starts(self, packed: NDArray[np.generic]) -> Ints:
        """Return where the slots of every block start.

        Raises:
            InvalidFileError: they descend, or do not go from 0 to the term's number of slots.
        """
        starts = packed.astype(np.int64)
        if starts[0] != 0 or starts[-1] != self.slots or (np.diff(starts) < 0).any():
            raise self._not_ascending()
        return starts

    def entries(self, packed: Packed, tile: int) -> tuple[Ints, Ints, NDArray[np.generic]]:
        """Return the lane, the column and the code (or the raw value) of each entry of a tile, row by row.

        Raises:
            InvalidFileError: an entry lies beyond its block or in a row that does not exist.
        """
        blocks, coding = self.layout.blocks(self.shape[1]), self.layout.values
        starts = self._starts(packed["starts"])[tile * blocks : (tile + 1) * blocks + 1]
        first, last = int(starts[0]), int(starts[-1])
        gaps = self._fields(packed["gaps"], self.layout.gap_bits, first, last)
        column = columns_of(self.layout, gaps, starts - first, self.shape[1])
        if isinstance(coding, Coding):
            values: NDArray[np.generic] = self._fields(packed["codes"], coding.bits, first, last).astype(np.uint8)
        else:
            values = packed["values"].view(RAW_DTYPES[coding])[first:last].T
        lane, slot = np.nonzero(gaps != self.layout.filler)
        if lane.size and tile * TILE_ROWS + int(lane.max()) >= self.shape[0]:
            raise InvalidFileError("a row that does not exist has an entry")
        return lane, column[lane, slot], values[lane, slot]

    def _decode_tile(self, packed: Packed, tile: int, starts: Ints, out: Floats, *, check_form: bool) -> None:
        """Write the entries of one tile into its rows."""
        layout, coding = self.layout, self.layout.values
        first, last = int(starts[0]), int(starts[-1])
        gaps = self._fields(packed["gaps"], layout.gap_bits, first, last)
        scales = None
        if isinstance(coding, Coding):
            scales = read_scales(coding.scale_dtype, packed["scales"][tile, 0])
            values = self._fields(packed["codes"], coding.bits, first, last)
        else:
            values = packed["values"].view(RAW_DTYPES[coding])[first:last]
        write_tile(layout, gaps, starts - first, values, scales, out)
        if check_form:
            by_lane = values if isinstance(coding, Coding) else values.T
            self._check_tile(packed, tile, starts, gaps != layout.filler, by_lane, out.shape[0])

    def _fields(self, stream: NDArray[np.generic], width: int, first: int, last: int) -> NDArray[np.unsignedinteger]:
        """Return fields ``first`` to ``last`` of the 32 lanes, shape (32, last - first)."""
        whole = first // 32 * 32
        fields = words.unpack_lanes(stream.view(np.uint32), self.slots, width, whole, last)
        return np.ascontiguousarray(fields[:, first - whole :])

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
