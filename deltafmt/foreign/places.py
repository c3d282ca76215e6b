"""Which elements of a tensor change, and elements put in their places: piece by piece, so that memory stays small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError

# Places that are used at a time: numpy makes 8 bytes of each.
_STEP = 1 << 18


class Places:
    """The elements of a tensor that change.

    Args:
        base: the base's tensor.
        new: its new bytes.
        width: bytes of an element: 1, 2, 4 or 8.

    Attributes:
        count: how many change.
        last: the place of the last one; -1 without any.
    """

    def __init__(self, base: Tensor, new: NDArray[np.uint8], width: int) -> None:
        self._new = new.view(f"u{width}")
        # Places in each piece of the base, of 4 bytes, with where the piece begins.
        self._pieces: list[tuple[int, NDArray[np.uint32]]] = []
        self.count, self.last, position = 0, -1, 0
        for piece in base.pieces():
            old = np.frombuffer(piece, self._new.dtype)
            found = np.flatnonzero(old != self._new[position : position + old.size])
            if found.size:
                self._pieces.append((position, found.astype(np.uint32)))
                self.count += found.size
                self.last = position + int(found[-1])
            position += old.size

    def places(self, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        """Give the places, ascending, as integers that can hold the last one."""
        for start, found in self._pieces:
            for first in range(0, found.size, _STEP):
                yield (found[first : first + _STEP].astype(np.int64) + start).astype(dtype)

    def values(self) -> Iterator[NDArray[np.uint8]]:
        """Give the bytes of the new elements, in the order of the places."""
        for start, found in self._pieces:
            for first in range(0, found.size, _STEP):
                yield self._new[start:][found[first : first + _STEP]].view(np.uint8)


def put(out: NDArray[Any], places: NDArray[Any], values: NDArray[Any]) -> None:
    """Write elements to their places, a part at a time."""
    for first in range(0, places.size, _STEP):
        out[places[first : first + _STEP]] = values[first : first + _STEP]


def check_ascending(positions: NDArray[Any], size: int, what: str) -> None:
    """Refuse positions that are not ascending, or lie outside.

    Args:
        positions: integers.
        size: what they must be below.
        what: what messages call one.

    Raises:
        InvalidFileError: names the first that is wrong.
    """
    for start in range(0, positions.size, _STEP):
        part = positions[max(start - 1, 0) : start + _STEP]
        outside = part >= size
        if part.dtype.kind == "i":
            outside |= part < 0
        if outside.any():
            number = int(part[int(np.argmax(outside))])
            raise InvalidFileError(f"{what} {number:,} lies outside the tensor, which has {size:,}")
        wrong = part[1:] <= part[:-1]
        if wrong.any():
            first = int(np.argmax(wrong))
            before, number = int(part[first]), int(part[first + 1])
            text = f"{number:,} stands twice" if before == number else f"{number:,} stands behind {before:,}"
            raise InvalidFileError(f"{what} {text}, and they must ascend")
