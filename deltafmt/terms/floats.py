"""Floating-point arrays as raw bytes: widening to float32, rounding back, difference and sum (spec, section 10).

Raw arrays are ``uint16`` for BF16 and F16 and ``uint32`` for F32, so that no bit pattern is touched on the way.
Compiled: ``kernels/cpu/loops/floats.c``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop

RAW_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
}

# The bits of the NaN that a sum gives whose base is a number: of an infinite base and delta, or of a delta that is NaN.
NANS: dict[str, int] = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}

Raw = NDArray[np.unsignedinteger]
Floats = NDArray[np.float32]


def widen(raw: Raw, dtype: str) -> Floats:
    """Return the float32 values of a raw array; exact."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.float32)


def narrow(values: Floats, dtype: str) -> Raw:
    """Round float32 values to ``dtype``, ties to even, and return the raw array."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
        nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
        return np.where(nan, bits >> np.uint32(16) | np.uint32(0x40), rounded).astype(np.uint16)
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32)


def _subtract(native: Native, finetuned: Raw, finetuned_dtype: str, base: Raw, base_dtype: str) -> tuple[Floats, bool]:
    out = np.empty(finetuned.shape, np.float32)
    mine, theirs = np.ascontiguousarray(finetuned).reshape(-1), np.ascontiguousarray(base).reshape(-1)
    return out, native.subtract(mine, finetuned_dtype, theirs, base_dtype, out.reshape(-1))


@loop(_subtract)
def subtract(finetuned: Raw, finetuned_dtype: str, base: Raw, base_dtype: str) -> tuple[Floats, bool]:
    """Return ``finetuned - base`` in float32 and whether every element of it is finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        delta = widen(finetuned, finetuned_dtype) - widen(base, base_dtype)
    return delta, bool(np.isfinite(delta).all())


def _add(native: Native, base: Raw, base_dtype: str, delta: Floats, dtype: str) -> Raw:
    out = np.empty(base.shape, RAW_DTYPES[dtype])
    theirs, change = np.ascontiguousarray(base).reshape(-1), np.ascontiguousarray(delta).reshape(-1)
    native.add(theirs, base_dtype, change, out.reshape(-1), dtype)
    return out


@loop(_add)
def add(base: Raw, base_dtype: str, delta: Floats, dtype: str) -> Raw:
    """Return ``base + delta`` rounded to ``dtype``; where the delta is zero, the base itself.

    What a processor makes of a NaN differs between processors, so its bits are made here: those of the base's NaN,
    quiet, or those of ``NANS`` where the base is a number.
    """
    wide = widen(base, base_dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        total = wide + delta
        rounded = np.where(np.isnan(total), NANS[dtype], narrow(total, dtype))
        converted = base if base_dtype == dtype else narrow(wide, dtype)
    rounded = np.where(np.isnan(wide), convert_nan(base, base_dtype, dtype), np.where(delta == 0, converted, rounded))
    found = np.where(delta == 0, base, rounded) if base_dtype == dtype else rounded
    return found.astype(RAW_DTYPES[dtype], copy=False)


def convert_nan(raw: Raw, dtype: str, target: str) -> Raw:
    """Return the bits of NaNs in another dtype: the sign, and the highest bits of the fraction, the first of them 1.

    Args:
        raw: a raw array; what it gives where an element is no NaN means nothing.
        dtype, target: the dtypes of ``raw`` and of the result.
    """
    bits: NDArray[np.signedinteger] = raw.astype(np.int64)
    if dtype == "F16":
        bits = (bits & 0x8000) << 16 | (bits & 0x3FF) << 13
    elif dtype == "BF16":
        bits = bits << 16
    bits = bits | NANS["F32"]
    if target == "F16":
        bits = bits >> 16 & 0x8000 | 0x7C00 | bits >> 13 & 0x3FF
    elif target == "BF16":
        bits = bits >> 16
    return bits.astype(RAW_DTYPES[target])


def bf16_up(values: Floats) -> NDArray[np.uint16]:
    """Round non-negative float32 values up to BF16, as raw bits."""
    return (values.view(np.uint32) + np.uint32(0xFFFF) >> np.uint32(16)).astype(np.uint16)
