"""What the codec of a term can do, and which one it is for each kind of layout (spec/deltafmt-v1.md, section 11)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.buffers import Packed
from deltafmt.terms.codec_routines import REFERENCE, CodecRoutines
from deltafmt.terms.lowbit.codec import LowbitArrays, LowbitCodec
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.codec import LowRankArrays, LowRankCodec
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.codec import NMArrays, NMCodec
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.registry import Layout
from deltafmt.terms.sparse import codec as sparse
from deltafmt.terms.sparse.codec import SparseArrays, SparseCodec
from deltafmt.terms.sparse.layout import SparseLayout

# What a method gives for one term, and a codec packs.
Arrays = NMArrays | LowbitArrays | LowRankArrays | SparseArrays


class TermCodec(Protocol):
    """The codec of one term: a layout, a number of rows and columns, a seed.

    Attributes:
        layout: of the term.
        shape: rows and columns of the term's matrix.
        run_rows: runs of rows start on multiples of this, a power of two.
        width: elements that decoding a row takes.
    """

    @property
    def layout(self) -> Layout:
        """Of the term."""

    shape: tuple[int, int]
    run_rows: int
    width: int

    def encode(self, arrays: Any, packed: Packed, first: int, routines: CodecRoutines = REFERENCE) -> None:
        """Pack a run of rows that starts with row ``first`` into its part of a term's packed arrays."""

    def decode(
        self, packed: Packed, start: int, stop: int, routines: CodecRoutines = REFERENCE, *, check_form: bool = False
    ) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of the term's matrix; ``check_form`` also refuses what is not canonical.

        Raises:
            InvalidFileError: the buffers break the format.
        """

    def digested_form(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return what a buffer contributes to its tensor's digest (section 7.6)."""


def term_codec(layout: Layout, rows: int, columns: int, seed: int = 0, slots: int = 0) -> TermCodec:
    """Return the codec of a term with this layout, shape, seed and number of slots."""
    if isinstance(layout, NMLayout):
        return NMCodec(layout, rows, columns, seed)
    if isinstance(layout, LowbitLayout):
        return LowbitCodec(layout, rows, columns)
    if isinstance(layout, LowRankLayout):
        return LowRankCodec(layout, rows, columns)
    if isinstance(layout, SparseLayout):
        return SparseCodec(layout, rows, columns, slots)
    raise TypeError(f"no codec for {type(layout).__name__}")


def fitted(layout: Layout, arrays: Arrays) -> Layout:
    """Return a method's layout with as many vectors as the arrays have; other layouts as they are."""
    if isinstance(layout, LowRankLayout) and isinstance(arrays, LowRankArrays):
        vectors = arrays.u.codes if isinstance(arrays.u, LowbitArrays) else arrays.u
        return layout if layout.rank == vectors.shape[0] else LowRankLayout(vectors.shape[0], layout.factors)
    return layout


def slot_count(layout: Layout, arrays: Arrays, columns: int) -> int:
    """Return the number of slots that a term of these arrays has; 0 for kinds without slots."""
    if isinstance(layout, SparseLayout) and isinstance(arrays, SparseArrays):
        return sparse.slot_count(layout, arrays, columns)
    return 0
