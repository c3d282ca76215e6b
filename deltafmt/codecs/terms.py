"""What the codec of a term can do, and which one it is for each kind of layout (spec/deltafmt-v1.md, section 11)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.codecs.nm import Buffers, NMArrays, NMCodec, Packed
from deltafmt.codecs.routines import REFERENCE, CodecRoutines
from deltafmt.layout.kinds import Layout
from deltafmt.layout.nm import NMLayout

# What a method gives for one term, and a codec packs.
Arrays = NMArrays


class TermCodec(Protocol):
    """The codec of one term: a layout, a number of rows and columns, a seed.

    Attributes:
        shape: rows and columns of the term's matrix.
        run_rows: runs of rows start on multiples of this, a power of two.
        width: elements that decoding a row takes.
    """

    shape: tuple[int, int]
    run_rows: int
    width: int

    def views(self, buffers: Buffers) -> dict[str, NDArray[np.generic]]:
        """Return the packed arrays without copying a byte."""

    def blank(self) -> dict[str, NDArray[np.generic]]:
        """Return packed arrays of zeros, shaped as :meth:`views` shapes them."""

    def encode(self, arrays: Any, packed: Packed, first: int, routines: CodecRoutines = REFERENCE) -> None:
        """Pack a run of rows that starts with row ``first`` into the arrays of :meth:`blank`."""

    def decode(
        self, packed: Packed, start: int, stop: int, routines: CodecRoutines = REFERENCE, *, check_form: bool = False
    ) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of the term's matrix; ``check_form`` also refuses what is not canonical.

        Raises:
            InvalidFileError: the buffers break the format.
        """

    def digested_form(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return what a buffer contributes to its tensor's digest (section 7.6)."""


def term_codec(layout: Layout, rows: int, columns: int, seed: int = 0, slots: int = 0) -> TermCodec:  # noqa: ARG001
    """Return the codec of a term with this layout, shape, seed and number of slots."""
    if isinstance(layout, NMLayout):
        return NMCodec(layout, rows, columns, seed)
    raise TypeError(f"no codec for {type(layout).__name__}")


def slot_count(arrays: Arrays) -> int:  # noqa: ARG001
    """Return the number of slots that a term of these arrays has; 0 for kinds without slots."""
    return 0


def raw_bytes(array: NDArray[np.generic]) -> memoryview:
    """Return an array's bytes in C order, without a copy where it lies so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
