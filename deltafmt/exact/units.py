"""The units of exact tensors: the integers that a tensor of each dtype is cut into (spec, 17.2).

A unit is an element, such as the 2 bytes of a BF16 weight. For floats it also says which bits are the exponent:
differences are sorted by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.format.constants import DTYPE_BITS, element_count

Units = NDArray[np.unsignedinteger]

# Of each dtype of floats with whole bytes: the lowest bit of the exponent, and the exponent's bits.
_EXPONENTS: Final = {
    "F8_E4M3": (3, 4),
    "F8_E4M3FNUZ": (3, 4),
    "F8_E5M2": (2, 5),
    "F8_E5M2FNUZ": (2, 5),
    "F16": (10, 5),
    "BF16": (7, 8),
    "F32": (23, 8),
    "C64": (23, 8),
    "F64": (52, 11),
}


@dataclass(frozen=True, slots=True)
class Unit:
    """What a tensor of some dtype is cut into.

    Attributes:
        width: bytes of a unit: 1, 2, 4 or 8.
        shift, bits: the lowest bit and the number of bits of the exponent; 0 and 0 for units that are not floats.
    """

    width: int
    shift: int = 0
    bits: int = 0

    @property
    def is_float(self) -> bool:
        """True if a unit is a float: a sign, an exponent and a fraction."""
        return self.bits > 0

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The dtype of arrays of units."""
        return np.dtype(f"<u{self.width}")


def unit_of(dtype: str) -> Unit:
    """Return the unit of a dtype: a float of C64 is one, and so is a byte of elements that share bytes."""
    if dtype in _EXPONENTS:
        return Unit(4 if dtype == "C64" else DTYPE_BITS[dtype] // 8, *_EXPONENTS[dtype])
    return Unit(1 if DTYPE_BITS[dtype] % 8 else DTYPE_BITS[dtype] // 8)


def unit_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the number of units of a tensor."""
    return -(-element_count(shape) * DTYPE_BITS[dtype] // 8 // unit_of(dtype).width)
