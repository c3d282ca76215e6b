"""Scales and codes of kept entries: min-max and least-squares uniform quantization on both grids.

Everything is elementwise float32 or exact integer arithmetic, so that any implementation and any order of summation
give the same bits. This is the reference; ``deltafmt.methods.fast`` holds the same functions compiled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.codecs.floats import bf16_up, narrow, widen
from deltafmt.errors import UsageError

SCALE_RULES = ("minmax", "mse")

# Magnitudes are brought to integers up to 2**20 for the least-squares search, whose sums are then exact.
UNIT = 2**20
ITERATIONS = 8
# Below this, a row's scale is the min-max one: the search's reciprocal would overflow.
TINY = np.float32(2.0**-100)
SMALLEST = np.float32(2.0**-126)

# Step of the uniform quantizer of least squared error for a normal distribution, over its mean magnitude, by number
# of levels (J. Max, "Quantizing for minimum distortion", 1960, table II); where the search starts.
START = {2: 2.0, 3: 1.53, 4: 1.25, 7: 0.83, 8: 0.73, 15: 0.44, 16: 0.42, 31: 0.24, 32: 0.24, 63: 0.13, 64: 0.13}
START_FINE = 0.04


def start_step(bits: int, grid: str) -> float:
    """Return the first step of the search, in units of the mean magnitude."""
    return START.get(2**bits - (grid == "midtread"), START_FINE)


def quantize(
    kept: NDArray[np.float32], bits: int, grid: str, rule: str, scale_group: int, scale_dtype: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize kept entries.

    ``minmax`` is the paper's rule (DeltaDQ eq. 9: scale = max|x| / (2**(k-1) - 1); on the midrise grid
    2 max|x| / (2**k - 1)), rounded up to the scale's dtype so that no entry is clipped. ``mse`` alternates between
    assigning levels and the closed-form best scale for them (Lloyd), a fixed number of times.

    Args:
        kept: shape (rows, entries); NaN marks an entry that lies beyond the last column.
        bits: k.
        grid: ``midtread`` or ``midrise``.
        rule: ``minmax`` or ``mse``.
        scale_group: entries that share a scale; 0 for all of a row.
        scale_dtype: ``BF16`` or ``F32``.

    Returns:
        Fields u, uint8 of shape (rows, entries), 0 where ``kept`` is NaN; scales, float32 of shape (rows, groups).

    Raises:
        UsageError: a scale would overflow its dtype.
    """
    rows, entries = kept.shape
    size = scale_group or max(entries, 1)
    groups = -(-entries // size) if entries else 1
    padded = np.full((rows, groups * size), np.nan, np.float32)
    padded[:, :entries] = kept
    cells = padded.reshape(rows, groups, size)
    inside = ~np.isnan(cells)
    magnitude = np.where(inside, np.abs(cells), np.float32(0))
    largest = magnitude.max(axis=2)
    scales = minmax_scale(largest, bits, grid, scale_dtype)
    if rule == "mse":
        searched = _search(magnitude, inside, largest, bits, grid)
        searched = np.maximum(widen(narrow(searched, scale_dtype), scale_dtype), SMALLEST)
        scales = np.where(largest >= TINY, searched, scales)
    check_scales(scales)
    fields = np.where(inside, assign(np.where(inside, cells, np.float32(0)), scales[:, :, None], bits, grid), 0)
    return fields.astype(np.uint8).reshape(rows, -1)[:, :entries], scales


def minmax_scale(largest: NDArray[np.float32], bits: int, grid: str, scale_dtype: str) -> NDArray[np.float32]:
    """Return the smallest scale of its dtype that reaches the largest magnitude (0 for 0)."""
    if grid == "midtread":
        exact = largest / np.float32(2 ** (bits - 1) - 1)
    else:
        exact = largest / np.float32((2**bits - 1) / 2)
    exact = np.where(largest > 0, np.maximum(exact, SMALLEST), np.float32(0)).astype(np.float32)
    return widen(bf16_up(exact), "BF16") if scale_dtype == "BF16" else exact


def check_scales(scales: NDArray[np.float32]) -> None:
    """Refuse scales that overflowed."""
    if not np.isfinite(scales).all():
        raise UsageError("a delta is too large for its scale's dtype")


def assign(values: NDArray[np.float32], scales: NDArray[np.float32], bits: int, grid: str) -> NDArray[np.int32]:
    """Return the fields of the levels nearest to ``values``."""
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0)).astype(np.float32)
    steps = values * inverse
    half = 2 ** (bits - 1)
    low = 1 - half if grid == "midtread" else -half
    nearest = np.rint(steps) if grid == "midtread" else np.floor(steps)
    levels: NDArray[np.int32] = np.clip(nearest, low, half - 1).astype(np.int32) - low
    return levels


def _search(
    magnitude: NDArray[np.float32],
    inside: NDArray[np.bool_],
    largest: NDArray[np.float32],
    bits: int,
    grid: str,
) -> NDArray[np.float32]:
    """Return the least-squares scale of every cell whose largest magnitude is at least TINY."""
    usable = largest >= TINY
    safe = np.where(usable, largest, np.float32(1))
    units = np.rint(magnitude * (np.float32(UNIT) / safe)[:, :, None]).astype(np.int32)
    units[~usable] = 0
    top = 2 ** (bits - 1) - 1
    count = np.maximum(inside.sum(axis=2), 1)
    step = units.sum(axis=2, dtype=np.int64) / count * start_step(bits, grid)
    step = np.where(step > 0, step, 1.0)
    for _ in range(ITERATIONS):
        scaled = units.astype(np.float32) * (1.0 / step).astype(np.float32)[:, :, None]
        if grid == "midtread":
            level = 2 * np.minimum(np.rint(scaled).astype(np.int64), top)
        else:
            level = np.where(inside, 2 * np.minimum(np.floor(scaled).astype(np.int64), top) + 1, 0)
        products = (units * level).sum(axis=2)
        squares = (level * level).sum(axis=2)
        step = np.where(squares > 0, 2.0 * products / np.maximum(squares, 1), step)
        step = np.where(step > 0, step, 1.0)
    return (step * (safe.astype(np.float64) / UNIT)).astype(np.float32)
