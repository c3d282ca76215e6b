"""The hot loops of the methods, compiled by numba; each equals its numpy reference bit for bit.

Importing this module imports numba (optional, extra ``fast``). Every function releases the GIL. Results live in the
Scratch that is given, as in :mod:`deltafmt.terms.codec_numba`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.accel import compiled
from deltafmt.methods import quantize as reference
from deltafmt.terms.codec_numba import Scratch, _difference, _mix
from deltafmt.terms.floats import Raw, narrow, subtract, widen
from deltafmt.terms.nm.hashing import BLOCK_STEP, ROW_STEP

_ROW_STEP = np.uint32(ROW_STEP)
_BLOCK_STEP = np.uint32(BLOCK_STEP)
_UNIT = np.float32(reference.UNIT)
_TINY = reference.TINY


@compiled
def _uniform(seed, first, keep, group, out):  # type: ignore[no-untyped-def]
    count, groups = out.shape[0], out.shape[1]
    for r in range(count):
        key = _mix(np.uint32(np.uint32(seed) + np.uint32(np.uint32(first + r) * _ROW_STEP)))
        for g in range(groups):
            needed = keep
            p = 0
            while needed:
                counter = np.uint32(np.int64(g) * group + p)
                number = np.uint64(_mix(np.uint32(key + np.uint32(counter * _BLOCK_STEP))))
                if (number * np.uint64(group - p)) >> np.uint64(32) < np.uint64(needed):
                    out[r, g, keep - needed] = np.uint8(p)
                    needed -= 1
                p += 1


@compiled
def _columns(pos, mask_row, group, at):  # type: ignore[no-untyped-def]
    """Write the column of every kept entry of a mask row; unsigned, so that no index is checked for its sign."""
    keep = pos.shape[2]
    for g in range(pos.shape[1]):
        for i in range(keep):
            at[g * keep + i] = np.uint32(g * group) + np.uint32(pos[mask_row, g, i])


@compiled
def _take(row, at, whole, factor, kept):  # type: ignore[no-untyped-def]
    """Gather one row; entries from ``whole`` on may lie beyond the last column."""
    for e in range(whole):
        kept[e] = row[at[e]] * factor
    for e in range(whole, kept.size):
        kept[e] = row[at[e]] * factor if at[e] < row.size else np.float32(np.nan)


@compiled
def _gather(delta, pos, group, share, factor, out):  # type: ignore[no-untyped-def]
    whole = delta.shape[1] // group * pos.shape[2]
    at = np.empty(out.shape[1], np.uint32)
    for r in range(delta.shape[0]):
        if r % share == 0:
            _columns(pos, r // share, group, at)
        _take(delta[r], at, whole, factor, out[r])


@compiled
def _gather_bf16(finetuned, base, pos, group, share, factor, out):  # type: ignore[no-untyped-def]
    rows, columns = base.shape
    whole = columns // group * pos.shape[2]
    at = np.empty(out.shape[1], np.uint32)
    row = np.empty(columns, np.float32)  # of the delta; it stays in the first-level cache
    largest = np.uint32(0)
    for r in range(rows):
        if r % share == 0:
            _columns(pos, r // share, group, at)
        f, b = finetuned[r], base[r]
        for i in range(columns):
            difference = _difference(f[i], b[i])
            row[i] = difference
            largest = max(largest, np.float32(difference).view(np.uint32) & np.uint32(0x7FFFFFFF))
        _take(row, at, whole, factor, out[r])
    return largest < np.uint32(0x7F800000)


@compiled
def _largest(kept, size, out):  # type: ignore[no-untyped-def]
    rows, entries = kept.shape
    bits = kept.view(np.int32)
    for r in range(rows):
        for c in range(out.shape[1]):
            cell = bits[r, c * size : min(entries, (c + 1) * size)]
            largest = np.int32(0)
            for i in range(cell.size):
                magnitude = cell[i] & np.int32(0x7FFFFFFF)
                largest = max(largest, magnitude if magnitude <= np.int32(0x7F800000) else np.int32(0))
            out[r, c] = np.int32(largest).view(np.float32)


@compiled
def _fit(units, factor, top, midtread):  # type: ignore[no-untyped-def]
    """Return the gain of a step and the best step for the levels that it assigns; see the reference's _search."""
    products = np.int64(0)
    squares = np.int64(0)
    for i in range(units.size):
        unit = units[i]
        scaled = np.float32(unit) * factor
        if midtread:
            level = np.int32(2) * min(np.int32(np.rint(scaled)), top)
        else:
            level = np.int32(2) * min(np.int32(np.floor(scaled)), top) + np.int32(1)
        level = level if unit >= 0 else np.int32(0)
        products += np.int64(unit) * np.int64(level)
        squares += np.int64(level * level)
    p = np.float64(products)
    q = np.float64(squares if squares > 0 else np.int64(1))
    return p * p / q, 2.0 * p / q


@compiled
def _search(kept, size, largest, candidates, refinements, top, midtread, units, out):  # type: ignore[no-untyped-def]
    rows, entries = kept.shape
    for r in range(rows):
        for c in range(out.shape[1]):
            high = largest[r, c]
            if high < _TINY:
                continue
            cell = kept[r, c * size : min(entries, (c + 1) * size)]
            own = units[: cell.size]
            inverse = _UNIT / high
            for i in range(cell.size):
                x = cell[i]
                # An entry beyond the last column gets -1, which no level multiplies.
                own[i] = np.int32(np.rint(abs(x) * inverse)) if x == x else np.int32(-1)
            best = -1.0
            step = 1.0
            for j in range(candidates.size):
                gain, fitted = _fit(own, candidates[j], top, midtread)
                if gain > best:
                    best, step = gain, fitted
            for _ in range(refinements):
                gain, fitted = _fit(own, np.float32(1.0 / (step if step > 0.0 else 1.0)), top, midtread)
                if gain > best:
                    best, step = gain, fitted
            out[r, c] = np.float32(step * (np.float64(high) / np.float64(_UNIT)))


@compiled
def _assign(kept, scales, size, low, high, midtread, out):  # type: ignore[no-untyped-def]
    rows, entries = kept.shape
    for r in range(rows):
        for c in range(scales.shape[1]):
            scale = scales[r, c]
            inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
            start, stop = c * size, min(entries, (c + 1) * size)
            cell, fields = kept[r, start:stop], out[r, start:stop]
            for i in range(cell.size):
                x = cell[i]
                steps = x * inverse
                level = np.rint(steps) if midtread else np.floor(steps)
                level = min(max(level, np.float32(low)), np.float32(high))
                fields[i] = np.uint8(np.int32(level) - np.int32(low)) if x == x else np.uint8(0)


def uniform(
    scratch: Scratch, seed: int, first: int, count: int, groups: int, keep: int, group: int
) -> NDArray[np.uint8]:
    """See :func:`deltafmt.methods.sampling.uniform`."""
    out = scratch.array("uniform", (count, groups, keep), np.uint8)
    _uniform(np.uint32(seed), first, keep, group, out)
    return out


def gather_difference(
    scratch: Scratch,
    finetuned: Raw,
    finetuned_dtype: str,
    base: Raw,
    base_dtype: str,
    positions: NDArray[np.uint8],
    group: int,
    share: int,
    factor: np.float32,
) -> tuple[NDArray[np.float32], bool]:
    """See :func:`deltafmt.methods.sampling.gather_difference`."""
    out = scratch.array("gather", (base.shape[0], positions.shape[1] * positions.shape[2]), np.float32)
    if (finetuned_dtype, base_dtype) == ("BF16", "BF16"):
        return out, bool(_gather_bf16(finetuned, base, positions, group, share, factor, out))
    delta, finite = subtract(finetuned, finetuned_dtype, base, base_dtype)
    _gather(delta, positions, group, share, factor, out)
    return out, finite


def quantize(
    scratch: Scratch,
    kept: NDArray[np.float32],
    bits: int,
    grid: str,
    rule: str,
    scale_group: int,
    scale_dtype: str,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """See :func:`deltafmt.methods.quantize.quantize`."""
    rows, entries = kept.shape
    size = max(min(scale_group or entries, entries), 1)
    groups = -(-entries // size) if entries else 1
    largest = np.empty((rows, groups), np.float32)
    _largest(kept, size, largest)
    reference.check_scales(largest)
    scales = reference.minmax_scale(largest, bits, grid, scale_dtype)
    midtread = grid == "midtread"
    half = 2 ** (bits - 1)
    if rule == "mse":
        searched = np.ones((rows, groups), np.float32)
        units = scratch.array("units", (size,), np.int32)
        candidates = np.array([1.0 / step for step in reference.candidate_steps(bits, grid)], np.float32)
        refinements = reference.REFINEMENTS if bits > 1 else 0
        _search(kept, size, largest, candidates, refinements, np.int32(half - 1), midtread, units, searched)
        searched = np.maximum(widen(narrow(searched, scale_dtype), scale_dtype), reference.SMALLEST)
        scales = np.where(largest >= reference.TINY, searched, scales)
    reference.check_scales(scales)
    fields = scratch.array("fields", (rows, entries), np.uint8)
    low = 1 - half if midtread else -half
    _assign(kept, scales, size, np.int32(low), np.int32(half - 1), midtread, fields)
    return fields, scales
