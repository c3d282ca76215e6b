"""What the codecs of all index encodings have in common: positions to packed words and back (specification, 11.4).

Positions are uint8 arrays of shape (mask rows, groups, N), each value below M.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.errors import InvalidFileError
from deltafmt.terms.nm.index.encodings import IndexEncoding
from deltafmt.terms.nm.layout import NMLayout

Positions = NDArray[np.uint8]
Words = NDArray[np.uint32]


class IndexCodec(ABC):
    """The codec of one index encoding, for runs of mask rows."""

    encoding: ClassVar[type[IndexEncoding]]

    @staticmethod
    def encode(
        positions: Positions,  # noqa: ARG004
        layout: NMLayout,
        out: Words,  # noqa: ARG004
    ) -> None:
        """Write ascending positions into packed words, shape (tiles, words, 32).

        An encoding that stores nothing does not define this.

        Raises:
            TypeError: the encoding stores nothing.
        """
        raise TypeError(f"an index {layout.index!r} is not stored")

    @staticmethod
    @abstractmethod
    def decode(
        packed: Words | None,
        layout: NMLayout,
        seed: int,
        first: int,
        mask_rows: int,
        groups: int,
    ) -> Positions:
        """Return the positions of mask rows ``first`` to ``first + mask_rows``.

        Args:
            packed: the run's packed words; None where the encoding is seeded.
            layout: the term's layout.
            seed: the tensor seed.
            first, mask_rows: the mask rows.
            groups: groups in a row.

        Raises:
            InvalidFileError: the words do not give valid positions.
        """

    @staticmethod
    @abstractmethod
    def check(packed: Words | None, layout: NMLayout, mask_rows: int, groups: int) -> None:
        """Check that a whole index is the canonical packing of valid positions.

        Raises:
            InvalidFileError: it is not.
        """

    @staticmethod
    @abstractmethod
    def last_group(
        packed: Words | None, layout: NMLayout, seed: int, first: int, mask_rows: int, groups: int
    ) -> Positions:
        """Return the positions of the last group of some mask rows, shape (mask rows, N).

        Args:
            packed, layout, seed, first, mask_rows: as for :meth:`decode`.
            groups: groups in a row, at least 1.
        """


def _check_ascending(native: Native, positions: Positions, m: int, first: tuple[int, int] = (0, 0)) -> None:
    if not native.ascending(np.ascontiguousarray(positions), m):
        check_ascending.reference(positions, m, first)


@loop(_check_ascending)
def check_ascending(positions: Positions, m: int, first: tuple[int, int] = (0, 0)) -> None:
    """Check that every group's positions are below M and strictly ascending.

    Args:
        positions: shape (mask rows, groups, N).
        m: M.
        first: the first mask row and the first group, for the message.

    Raises:
        InvalidFileError: names the mask row, the group and the position.
    """
    wrong = positions >= m
    wrong[:, :, 1:] |= positions[:, :, 1:] <= positions[:, :, :-1]
    if wrong.any():
        row, g, i = (int(x) for x in np.argwhere(wrong)[0])
        raise InvalidFileError(
            f"mask row {first[0] + row}, group {first[1] + g}: entry {i} is at {positions[row, g, i]}, "
            f"which is not ascending and below {m}"
        )
