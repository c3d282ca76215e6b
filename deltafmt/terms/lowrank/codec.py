"""The ``lowrank`` layout: buffers to vectors, and their outer products' sum (spec/deltafmt-v1.md, section 13)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.buffers import Packed, check_same
from deltafmt.terms.codec import TermArrays, TermCodec
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import RAW_DTYPES, Raw, widen
from deltafmt.terms.levels import add_outer
from deltafmt.terms.lowbit.codec import LowbitArrays, check_points, check_range, values
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.scales import all_finite, check_scales, raw_scales, read_scales
from deltafmt.terms.tiles import TILE_ROWS, tiles
from deltafmt.terms.unused import check_lines

Floats = NDArray[np.float32]

# Elements of the vectors that are decoded at a time.
BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class LowRankArrays(TermArrays):
    """The decoded content of a term.

    Attributes:
        u: the vectors of the rows, shape (R, rows): codes with their scales, or raw values.
        v: the vectors of the columns, shape (R, columns), likewise.
    """

    u: LowbitArrays | Raw
    v: LowbitArrays | Raw


class LowRankCodec(TermCodec[LowRankLayout, LowRankArrays]):
    """The codec of one ``lowrank`` term; see :class:`deltafmt.terms.codec.TermCodec`.

    If vectors are coded, ``u_codes`` and ``v_codes`` have shape (R, words), ``*_scales`` (as uint16 for BF16) and
    ``*_zero_points`` shape (R, scales of a vector); raw ``u`` and ``v`` have shape (R, rows) and (R, columns). Decoding
    takes a run of rows, encoding the whole matrix.
    """

    def __init__(self, layout: LowRankLayout, rows: int, columns: int, seed: int = 0, slots: int = 0) -> None:
        super().__init__(layout, rows, columns, seed, slots)
        self.row_work = columns * layout.rank

    @classmethod
    def fit(cls, layout: LowRankLayout, arrays: LowRankArrays, columns: int) -> tuple[LowRankLayout, int]:  # noqa: ARG003
        """Return the layout with as many vectors as the arrays have."""
        vectors = arrays.u.codes if isinstance(arrays.u, LowbitArrays) else arrays.u
        return LowRankLayout(vectors.shape[0], layout.factors), 0

    def encode(
        self,
        arrays: LowRankArrays,
        packed: Packed,
        first: int = 0,  # noqa: ARG002 - the whole matrix
    ) -> None:
        """Pack the vectors."""
        for side, factor in (("u", arrays.u), ("v", arrays.v)):
            if isinstance(factor, LowbitArrays):
                assert isinstance(self.layout.factors, Coding)
                _encode(self.layout.factors, side, factor, packed)
            else:
                packed[side].view(factor.dtype)[...] = factor

    def decode(self, packed: Packed, start: int, stop: int, *, check_form: bool = False) -> Floats:
        """Return the delta's rows ``start`` to ``stop``."""
        columns = self.shape[1]
        if check_form and start == 0:
            self._check_again(packed)
        out = np.zeros((stop - start, columns), np.float32)
        step = max(BLOCK_ELEMENTS // max(columns, stop - start), 1)
        for first in range(0, self.layout.rank, step):
            block = {name: array[first : first + step] for name, array in packed.items()}
            add_outer(self._vectors("u", block, start, stop), self._vectors("v", block, 0, columns), out)
        return out

    def vectors(self, packed: Packed) -> tuple[Floats, Floats]:
        """Return all vectors: of the rows, shape (R, rows), and of the columns, shape (R, columns).

        Raises:
            InvalidFileError: a value is not finite, or the buffers break the format.
        """
        rows, columns = self.shape
        return self._vectors("u", packed, 0, rows), self._vectors("v", packed, 0, columns)

    def _vectors(self, side: str, packed: Packed, start: int, stop: int) -> Floats:
        """Return elements ``start`` to ``stop`` of some vectors."""
        coding = self.layout.factors
        if isinstance(coding, str):
            factor = widen(np.ascontiguousarray(packed[side][:, start:stop]).view(RAW_DTYPES[coding]), coding)
            if not np.isfinite(factor).all():
                raise InvalidFileError(f"a value of factor {side} is not finite")
            return factor
        arrays = coded_vectors(coding, side, packed, self._length(side), start, stop)
        group = coding.scale_group or max(self._length(side), 1)
        # If a run starts within a group, every element gets a scale of its own.
        at = np.arange(start // group, -(-stop // group)) if start % group == 0 else np.arange(start, stop) // group
        zero_points = None if arrays.zero_points is None else arrays.zero_points[:, at]
        part = LowbitArrays(arrays.codes, arrays.scales[:, at], zero_points)
        return values(coding, part, group if start % group == 0 else 1)

    def _length(self, side: str) -> int:
        return self.shape[0 if side == "u" else 1]

    def check(self, packed: Packed) -> None:
        """Check all vectors; see :meth:`deltafmt.terms.codec.TermCodec.check`."""
        for side in ("u", "v"):
            if isinstance(self.layout.factors, str):
                self._check_values(side, packed[side], self.layout.factors)
            else:
                self._check_coded(side, packed, self.layout.factors)

    def _check_values(self, side: str, values: NDArray[np.generic], dtype: str) -> None:
        flat = values.reshape(-1)
        for start in range(0, flat.size, BLOCK_ELEMENTS):
            if not all_finite(dtype, flat[start : start + BLOCK_ELEMENTS]):
                raise InvalidFileError(f"a value of factor {side} is not finite")

    def _check_coded(self, side: str, packed: Packed, coding: Coding) -> None:
        length, codes = self._length(side), packed[f"{side}_codes"].view(np.uint32)
        check_scales(coding.scale_dtype, packed[f"{side}_scales"])
        check_lines(f"{side}_codes", codes, length, coding.bits)
        if coding.has_zero_points:
            check_points(coding, packed[f"{side}_zero_points"])
        if coding.top == (1 << coding.bits) - 1:
            return
        step, wide = max(BLOCK_ELEMENTS // length, 1), min(BLOCK_ELEMENTS, length)
        for first in range(0, self.layout.rank, step):
            block = codes[first : first + step]
            for start in range(0, length, wide):
                stop = min(start + wide, length)
                largest = int(words.unpack_part(block, length, coding.bits, start, stop).max())
                if largest > coding.top:
                    raise InvalidFileError(f"a code is {largest}, the grid ends at {coding.top}")

    def _check_again(self, packed: Packed) -> None:
        """Check that both factors are the canonical packing of what they mean.

        Raises:
            InvalidFileError: a field or a zero point beyond the grid, or unused bits that are not zero.
        """
        coding = self.layout.factors
        if isinstance(coding, str):
            return
        for side in ("u", "v"):
            length = self._length(side)
            step = max(BLOCK_ELEMENTS // max(length, 1), 1)
            for first in range(0, self.layout.rank, step):
                block = {name: array[first : first + step] for name, array in packed.items() if name[0] == side}
                arrays = coded_vectors(coding, side, block, length, 0, length)
                check_range(coding, arrays)
                again = {name: np.zeros_like(array) for name, array in block.items()}
                _encode(coding, side, arrays, again)
                check_same(again, block)


def _encode(coding: Coding, side: str, arrays: LowbitArrays, packed: Packed) -> None:
    """Pack coded vectors."""
    count, length = arrays.codes.shape
    tiled = np.zeros((tiles(count), coding.words(length), TILE_ROWS), np.uint32)
    words.pack_into(arrays.codes, coding.bits, tiled, 1)
    packed[f"{side}_codes"][...] = words.from_tiles(tiled, count)
    packed[f"{side}_scales"][...] = raw_scales(coding.scale_dtype, arrays.scales)
    if arrays.zero_points is not None:
        packed[f"{side}_zero_points"][...] = arrays.zero_points


def coded_vectors(coding: Coding, side: str, packed: Packed, length: int, start: int, stop: int) -> LowbitArrays:
    """Unpack elements ``start`` to ``stop``, and all scales, of coded vectors; ``start`` is a multiple of 32."""
    by_vector = packed[f"{side}_codes"].view(np.uint32)
    codes = words.unpack_part(by_vector, length, coding.bits, start, stop).astype(np.uint8, copy=False)
    zero_points = packed[f"{side}_zero_points"].view(np.uint8) if coding.has_zero_points else None
    return LowbitArrays(codes, read_scales(coding.scale_dtype, packed[f"{side}_scales"]), zero_points)
