"""The base class of the codecs of all kinds of terms (specification, section 11)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.buffers import Packed
from deltafmt.terms.floats import Raw, add
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import TILE_ROWS

LayoutT = TypeVar("LayoutT", bound=TermLayout)
ArraysT = TypeVar("ArraysT", bound="TermArrays")


class TermArrays:
    """The content of one term: a method makes it, a codec packs it. Each kind has a dataclass of this class."""

    __slots__ = ()


class TermCodec(ABC, Generic[LayoutT, ArraysT]):
    """The codec of one term: it packs and unpacks runs of rows of one matrix.

    Args:
        layout: the term's layout.
        rows, columns: the shape of the term's matrix.
        seed: the tensor seed if the layout is seeded; otherwise 0.
        slots: the number of slots if the layout has slots; otherwise 0.

    Attributes:
        layout, seed, slots: as given.
        shape: rows and columns of the term's matrix.
        run_rows: runs of rows start on multiples of this, a power of two.
        width: elements of memory that decoding a row takes; more than ``columns`` if the last group is made whole.
        row_work: elements that decoding a row computes: those of the row, or of all outer products.
    """

    run_rows: int = TILE_ROWS

    def __init__(self, layout: LayoutT, rows: int, columns: int, seed: int = 0, slots: int = 0) -> None:
        self.layout = layout
        self.shape = rows, columns
        self.seed = seed
        self.slots = slots
        self.width = columns
        self.row_work = columns

    @classmethod
    def fit(cls, layout: LayoutT, arrays: ArraysT, columns: int) -> tuple[LayoutT, int]:  # noqa: ARG003
        """Return the layout and the number of slots of a term that holds these arrays.

        ``layout`` is what the method planned from the shape alone. The number of vectors or slots may depend on the
        delta, and is known only now.
        """
        return layout, 0

    @abstractmethod
    def encode(self, arrays: ArraysT, packed: Packed, first: int) -> None:
        """Pack a run of rows that starts with row ``first`` into its part of a term's packed arrays.

        A kind whose buffers are not cut by rows (``lowrank``, ``sparse``) gets its whole matrix at once.
        """

    @abstractmethod
    def decode(self, packed: Packed, start: int, stop: int, *, check_form: bool = False) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of the term's matrix; ``check_form`` also refuses what is not canonical.

        With ``check_form`` this is the reference of :meth:`check`: what was decoded is packed again.

        Raises:
            InvalidFileError: the buffers break the format.
        """

    def marked(self, packed: Packed, start: int, stop: int) -> NDArray[np.bool_] | None:  # noqa: ARG002
        """Return where the term has entries in rows ``start`` to ``stop``; None if its kind has a value everywhere.

        Exact parts are sorted by it (section 17.8).

        Raises:
            InvalidFileError: the buffers break the format.
        """
        return None

    @abstractmethod
    def check(self, packed: Packed) -> None:
        """Check that the term's buffers are the canonical packing of what they mean, as a verifier must (section 15).

        No matrix is made: the work follows the bytes of the buffers, whatever the shape, and goes block by block.

        Raises:
            InvalidFileError: the buffers break the format.
        """

    def add(self, packed: Packed, start: int, stop: int, base: Raw, base_dtype: str, dtype: str) -> Raw:
        """Return rows ``start`` to ``stop`` of a base plus the term's matrix, rounded to ``dtype``, as a raw array.

        Args:
            packed: the term's packed arrays.
            start, stop: the rows.
            base: these rows of the base, raw.
            base_dtype, dtype: dtypes of the base and of the result: ``BF16``, ``F16`` or ``F32``.

        Raises:
            InvalidFileError: the buffers break the format.
        """
        return add(base, base_dtype, self.decode(packed, start, stop), dtype)

    def converted(self, packed: Packed, target: LayoutT) -> dict[str, NDArray[np.generic]]:
        """Return the term's arrays in another layout that ``for_profile`` gave; the matrix stays the same."""
        assert target == self.layout
        return dict(packed)

    def digested_form(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:  # noqa: ARG002
        """Return what a buffer contributes to its tensor's digest (section 7.6)."""
        return array

    def digested_pieces(self, name: str, array: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
        """Give the same in pieces, of which one is in memory at a time."""
        yield self.digested_form(name, array)

    @property
    def piece_bytes(self) -> int:
        """Bytes of memory that :meth:`digested_pieces` takes, or :meth:`converted` beyond its result."""
        return 0
