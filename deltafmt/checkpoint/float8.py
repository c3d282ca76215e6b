"""8-bit floats with scales, and the BF16 values that they mean (spec/deltafmt-v1.md, section 7.8).

A code of 8 bits is a float by itself: ``E4M3`` has 4 bits of exponent and 3 of mantissa, no infinity and two NaNs;
``E5M2`` has both, as IEEE 754 has them (Micikevicius et al., *FP8 Formats for Deep Learning*, table 1). ``E8M0`` is a
power of two, which only scales use (OCP *Microscaling Formats*, section 5.4.1).
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.floats import NANS, Floats

_NAN: Final = np.uint16(NANS["BF16"])


@functools.cache
def values_of_codes(dtype: str) -> Floats:
    """Return the float32 value of each of the 256 codes of a dtype."""
    codes = np.arange(256)
    if dtype in ("F8_E8M0", "U8"):
        values = np.ldexp(1.0, codes - 127)
        values[255] = np.nan
        return values.astype(np.float32)
    bits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[dtype]
    exponent, mantissa = codes >> bits & (0x7F >> bits), codes & (1 << bits) - 1
    normal = exponent > 0
    values = np.ldexp((normal << bits) + mantissa, np.maximum(exponent, 1) - bias - bits)
    if dtype == "F8_E4M3":
        values[codes & 0x7F == 0x7F] = np.nan
    else:
        top = exponent == 31
        values[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    signed: Floats = np.where(codes > 127, -values, values).astype(np.float32)
    return signed


def block_scales(scales: Floats, shape: tuple[int, ...], block: tuple[int, ...], start: int, stop: int) -> Floats:
    """Return the scale of every element of some rows.

    Args:
        scales: the scales, any shape; in C order they are those of the blocks.
        shape: the shape of the matrix, at least one dimension. A row is one of its last dimension.
        block: the sizes of a block, one for each dimension.
        start, stop: numbers of rows, counted through all other dimensions.

    Returns:
        The scales, shape (stop - start, columns), or (stop - start, 1) where a row has one scale.
    """
    grid = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    lines = np.zeros(stop - start, np.int64)
    if len(shape) > 1:
        places = np.unravel_index(np.arange(start, stop), shape[:-1])
        inside = tuple(place // step for place, step in zip(places, block, strict=False))
        lines = np.ravel_multi_index(inside, grid[:-1])
    found = scales.reshape(-1, grid[-1])[lines]
    return found if grid[-1] == 1 else np.repeat(found, block[-1], axis=1)[:, : shape[-1]]


def dequantize(codes: NDArray[np.uint8], dtype: str, scales: Floats | None) -> NDArray[np.uint16]:
    """Return BF16 values, as raw bits: each code's value times its scale in float32, rounded to nearest even.

    Args:
        codes: the codes.
        dtype: theirs, F8_E4M3 or F8_E5M2.
        scales: of a shape that broadcasts to that of the codes; None for codes that are the values themselves.
    """
    values = np.take(values_of_codes(dtype), codes, mode="clip")
    if scales is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scales
    lost = np.isnan(values)
    # In place: a third of the time of :func:`deltafmt.terms.floats.narrow`, which keeps the bits of a NaN.
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    bits += odd
    bits += np.uint32(0x7FFF)
    bits >>= np.uint32(16)
    raw = bits.astype(np.uint16)
    if lost.any():
        raw[lost] = _NAN
    return raw
