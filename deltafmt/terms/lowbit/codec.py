"""The ``lowbit`` layout: buffers to codes, scales and zero points, and back (spec/deltafmt-v1.md, section 12)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.buffers import Packed, blank, check_same
from deltafmt.terms.codec import TermArrays, TermCodec
from deltafmt.terms.coding import Coding
from deltafmt.terms.levels import dequantize
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.scales import check_scales, raw_scales, read_scales
from deltafmt.terms.tiles import TILE_ROWS, tiles
from deltafmt.terms.unused import check_absent, check_fields, check_stream

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LowbitArrays(TermArrays):
    """The decoded content of a run of rows, or of vectors.

    Attributes:
        codes: fields u, uint8, shape (rows, columns).
        scales: float32, shape (rows, scales per row); (1, columns) where the layout's axis is ``column``.
        zero_points: uint8, of the scales' shape, on the asymmetric grid; otherwise None.
    """

    codes: NDArray[np.uint8]
    scales: Floats
    zero_points: NDArray[np.uint8] | None = None


class LowbitCodec(TermCodec[LowbitLayout, LowbitArrays]):
    """The codec of one ``lowbit`` term; see :class:`deltafmt.terms.codec.TermCodec`.

    ``codes`` has shape (tiles, words, 32); ``scales`` (as uint16 for BF16) and ``zero_points`` have shape
    (tiles, scales per row, 32), or ``scales`` shape (columns,) where the layout's axis is ``column``.
    """

    def _run(self, packed: Packed, start: int, stop: int) -> dict[str, NDArray[np.generic]]:
        """Return the tiles of a run of rows; scales of columns belong to every run."""
        run = slice(start // TILE_ROWS, tiles(stop))
        return {name: array if array.ndim == 1 else array[run] for name, array in packed.items()}

    def encode(self, arrays: LowbitArrays, packed: Packed, first: int) -> None:
        """Pack a run of rows."""
        run = self._run(packed, first, first + arrays.codes.shape[0])
        words.pack_into(arrays.codes, self.layout.bits, run["codes"].view(np.uint32), 1)
        raw = raw_scales(self.layout.scale_dtype, arrays.scales)
        run["scales"][...] = raw.reshape(-1) if self.layout.axis == "column" else words.to_tiles(raw)
        if arrays.zero_points is not None:
            run["zero_points"][...] = words.to_tiles(arrays.zero_points)

    def arrays(self, packed: Packed, start: int, stop: int) -> LowbitArrays:
        """Unpack rows ``start`` to ``stop``.

        Raises:
            InvalidFileError: a scale is negative or not finite.
        """
        layout, columns, rows = self.layout, self.shape[1], stop - start
        run = self._run(packed, start, stop)
        raw = run["scales"][None] if layout.axis == "column" else words.from_tiles(run["scales"], rows)
        scales = read_scales(layout.scale_dtype, raw)
        zero_points = None
        if layout.has_zero_points:
            zero_points = np.ascontiguousarray(words.from_tiles(run["zero_points"], rows)).view(np.uint8)
        codes = words.unpack(run["codes"].view(np.uint32), rows, columns, layout.bits, 1)
        return LowbitArrays(codes.astype(np.uint8, copy=False), scales, zero_points)

    def decode(self, packed: Packed, start: int, stop: int, *, check_form: bool = False) -> Floats:
        """Return the delta's rows ``start`` to ``stop``."""
        arrays = self.arrays(packed, start, stop)
        if check_form:
            self._check_run(packed, arrays, start)
        if self.layout.axis == "row":
            return values(self.layout, arrays, self.layout.scale_group or max(self.width, 1))
        scales = np.broadcast_to(arrays.scales, arrays.codes.shape)
        return values(self.layout, LowbitArrays(arrays.codes, scales), 1)

    def check(self, packed: Packed) -> None:
        """Check the whole term; see :meth:`deltafmt.terms.codec.TermCodec.check`."""
        layout, (rows, columns) = self.layout, self.shape
        check_scales(layout.scale_dtype, packed["scales"])
        if layout.axis == "row":
            check_absent("scales", packed["scales"], rows)
        check_stream("codes", packed["codes"], rows, columns, layout.bits)
        check_fields("code", packed["codes"], rows, columns, layout.bits, layout.top)
        if layout.has_zero_points:
            check_absent("zero_points", packed["zero_points"], rows)
            check_points(layout, packed["zero_points"])

    def _check_run(self, packed: Packed, arrays: LowbitArrays, first: int) -> None:
        """Check what decoding alone does not: that the run is the canonical packing of what it means.

        Raises:
            InvalidFileError: a field or a zero point beyond the grid, or unused bits that are not zero.
        """
        check_range(self.layout, arrays)
        rows = arrays.codes.shape[0]
        expected = blank(self.layout, rows, self.shape[1])
        LowbitCodec(self.layout, rows, self.shape[1]).encode(arrays, expected, 0)
        check_same(expected, self._run(packed, first, first + rows))


def values(coding: Coding, arrays: LowbitArrays, group: int) -> Floats:
    """Return the values of codes of which ``group`` in a row share a scale, float32 of the codes' shape."""
    if arrays.zero_points is not None:
        offsets, factors, step = arrays.zero_points.astype(np.int32), arrays.scales, 1
    else:
        # "value = float32(2u - top) * float32(scale * 0.5)", one rounding in float32.
        factors, step = arrays.scales * np.float32(0.5), 2
        offsets = np.full(factors.shape, coding.top, np.int32)
    return dequantize(arrays.codes, step, offsets, factors, group)


def check_range(coding: Coding, arrays: LowbitArrays) -> None:
    """Refuse fields and zero points beyond the grid.

    Raises:
        InvalidFileError: there is one.
    """
    if arrays.codes.size and int(arrays.codes.max()) > coding.top:
        raise InvalidFileError(f"a code is {arrays.codes.max()}, the grid ends at {coding.top}")
    if arrays.zero_points is not None:
        check_points(coding, arrays.zero_points)


def check_points(coding: Coding, points: NDArray[np.generic]) -> None:
    """Refuse zero points beyond the grid.

    Raises:
        InvalidFileError: there is one.
    """
    largest = int(points.view(np.uint8).max(initial=0))
    if largest > coding.top:
        raise InvalidFileError(f"a zero point is {largest}, the grid ends at {coding.top}")
