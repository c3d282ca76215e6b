"""Scales as they are stored, and back: BF16 or F32, none negative and all finite (spec/deltafmt-v1.md, section 11.3).

Every kind with scales reads and writes them here, so that all refuse the same ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms.floats import RAW_DTYPES, Floats, narrow, widen


def raw_scales(dtype: str, scales: Floats) -> NDArray[np.generic]:
    """Return scales as they are stored: BF16 as uint16, F32 as float32."""
    return narrow(scales, "BF16") if dtype == "BF16" else scales


def read_scales(dtype: str, raw: NDArray[np.generic]) -> Floats:
    """Return stored scales as float32.

    Raises:
        InvalidFileError: one is negative or not finite.
    """
    scales = widen(np.ascontiguousarray(raw).view(RAW_DTYPES[dtype]), dtype)
    if not np.isfinite(scales).all() or np.signbit(scales).any():
        raise InvalidFileError("a scale is negative or not finite")
    return scales


def check_scales(dtype: str, raw: NDArray[np.generic]) -> None:
    """Refuse what :func:`read_scales` refuses, by the bits alone.

    Raises:
        InvalidFileError: a scale is negative or not finite.
    """
    bits = np.ascontiguousarray(raw).view(RAW_DTYPES[dtype])
    # Seen as integers, the finite numbers that are not negative come first.
    if bits.size and int(bits.max()) >= (0x7F80 if dtype == "BF16" else 0x7F800000):
        raise InvalidFileError("a scale is negative or not finite")


def all_finite(dtype: str, raw: NDArray[np.generic]) -> bool:
    """Tell whether raw values of ``BF16``, ``F16`` or ``F32`` are all finite."""
    bits = raw.view(RAW_DTYPES[dtype])
    exponent = bits.dtype.type({"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype])
    return not bool(((bits & exponent) == exponent).any())
