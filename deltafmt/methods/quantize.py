"""Scales and codes of kept entries: min-max and least-squares uniform quantization on both grids.

Everything is elementwise float32 or exact integer arithmetic, so that any implementation and any order of summation
give the same bits. Compiled: ``kernels/cpu/loops/scales.c``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.errors import UsageError
from deltafmt.terms.floats import bf16_up, narrow, widen

SCALE_RULES = ("minmax", "mse")

# Magnitudes are brought to integers up to 2**20 for the least-squares search, whose sums are then exact.
UNIT = 2**20
# The search tries the min-max step and shorter ones, and refines the best. The more levels, the more valleys the error
# has, so the finer the steps: how many candidates, and how many of them an octave, for 2 bits and for more.
COARSE = (8, 2)
FINE = (24, 8)
REFINEMENTS = 4
# Below this, a row's scale is the min-max one: the search's reciprocal would overflow.
TINY = np.float32(2.0**-100)
SMALLEST = np.float32(2.0**-126)


def default_grid(bits: int) -> str:
    """Return the grid of codes of ``bits`` unless another is asked for: few levels do without a zero."""
    return "midrise" if bits <= 2 else "midtread"


def default_rule(bits: int) -> str:
    """Return the rule of scales unless another is asked for: the fewer the levels, the more clipping gains."""
    return "mse" if bits < 4 else "minmax"


def candidate_steps(bits: int, grid: str) -> list[float]:
    """Return the steps to try, for magnitudes whose largest is UNIT; the levels of 1 bit do not depend on the step."""
    levels = 2**bits - (grid == "midtread")
    longest = 2.0 * UNIT / (levels - 1)
    count, octave = (1, 1) if bits == 1 else COARSE if bits == 2 else FINE
    return [longest * 2.0 ** (-j / octave) for j in range(count)]


def coding_arguments(bits: int, grid: str, rule: str, size: int, scale_dtype: str) -> tuple[object, ...]:
    """Return how codes are made, as the compiled loops take it: ``size`` entries share a scale."""
    search = rule == "mse"
    factors = np.array([1.0 / step for step in candidate_steps(bits, grid)], np.float32)
    refinements = REFINEMENTS if bits > 1 else 0
    return bits, grid == "midtread", search, size, scale_dtype, factors, refinements


def _quantize(
    native: Native,
    kept: NDArray[np.float32],
    bits: int,
    grid: str,
    rule: str,
    scale_group: int,
    scale_dtype: str,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rows, entries = kept.shape
    size = max(min(scale_group or entries, entries), 1)
    fields = np.empty((rows, entries), np.uint8)
    scales = np.empty((rows, -(-entries // size) if entries else 1), np.float32)
    coding = coding_arguments(bits, grid, rule, size, scale_dtype)
    if not native.quantize(np.ascontiguousarray(kept), *coding, fields, scales):
        raise UsageError("a delta is too large for its scale's dtype")
    return fields, scales


@loop(_quantize)
def quantize(
    kept: NDArray[np.float32], bits: int, grid: str, rule: str, scale_group: int, scale_dtype: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize kept entries.

    ``minmax`` is the paper's rule (DeltaDQ eq. 9: scale = max|x| / (2**(k-1) - 1); on the midrise grid
    2 max|x| / (2**k - 1)), rounded up to the scale's dtype so that no entry is clipped. ``mse`` takes the best of
    several steps from the min-max one down and refines it by turns of assigning levels and the closed-form best
    scale for them (Lloyd), so its squared error is never above that of ``minmax`` but for the scale's rounding.

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
    size = max(min(scale_group or entries, entries), 1)
    groups = -(-entries // size) if entries else 1
    padded = np.full((rows, groups * size), np.nan, np.float32)
    padded[:, :entries] = kept
    cells = padded.reshape(rows, groups, size)
    inside = ~np.isnan(cells)
    magnitude = np.where(inside, np.abs(cells), np.float32(0))
    largest = magnitude.max(axis=2)
    check_scales(largest)
    scales = minmax_scale(largest, bits, grid, scale_dtype)
    if rule == "mse":
        searched = _search(magnitude, inside, largest, bits, grid)
        searched = np.maximum(widen(narrow(searched, scale_dtype), scale_dtype), SMALLEST)
        scales = np.where(largest >= TINY, searched, scales)
    check_scales(scales)
    fields = np.where(inside, assign(np.where(inside, cells, np.float32(0)), scales[:, :, None], bits, grid), 0)
    return fields.astype(np.uint8).reshape(rows, groups * size)[:, :entries], scales


def minmax_scale(largest: NDArray[np.float32], bits: int, grid: str, scale_dtype: str) -> NDArray[np.float32]:
    """Return the smallest scale of its dtype that reaches the largest magnitude (0 for 0)."""
    halves = 2 ** (bits - 1) - 1 if grid == "midtread" else (2**bits - 1) / 2
    with np.errstate(over="ignore"):
        exact = largest / np.float32(halves)
    exact = np.where(largest > 0, np.maximum(exact, SMALLEST), np.float32(0)).astype(np.float32)
    return widen(bf16_up(exact), "BF16") if scale_dtype == "BF16" else exact


def check_scales(scales: NDArray[np.float32]) -> None:
    """Refuse scales, or magnitudes, that overflowed."""
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
    """Return the least-squares scale of every cell whose largest magnitude is at least TINY.

    For fixed levels q (in half steps) of magnitudes a, the best step is 2 sum(a q) / sum(q q), and it takes
    sum(a q)**2 / sum(q q) off the squared error: the gain by which steps are compared.
    """
    usable = largest >= TINY
    safe = np.where(usable, largest, np.float32(1))
    units = np.rint(magnitude * (np.float32(UNIT) / safe)[:, :, None]).astype(np.int32)
    units[~usable] = 0
    top = 2 ** (bits - 1) - 1

    def fit(factor: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        scaled = units.astype(np.float32) * factor[:, :, None]
        if grid == "midtread":
            level = 2 * np.minimum(np.rint(scaled).astype(np.int64), top)
        else:
            level = np.where(inside, 2 * np.minimum(np.floor(scaled).astype(np.int64), top) + 1, 0)
        products = (units * level).sum(axis=2).astype(np.float64)
        squares = np.maximum((level * level).sum(axis=2), 1).astype(np.float64)
        return products * products / squares, 2.0 * products / squares

    best = np.full(largest.shape, -1.0)
    step = np.ones(largest.shape)
    for candidate in candidate_steps(bits, grid):
        gain, fitted = fit(np.full(largest.shape, 1.0 / candidate, np.float32))
        step = np.where(gain > best, fitted, step)
        best = np.maximum(gain, best)
    for _ in range(REFINEMENTS if bits > 1 else 0):
        gain, fitted = fit((1.0 / np.where(step > 0, step, 1.0)).astype(np.float32))
        step = np.where(gain > best, fitted, step)
        best = np.maximum(gain, best)
    return (step * (safe.astype(np.float64) / UNIT)).astype(np.float32)
