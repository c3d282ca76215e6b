"""Uniform grids with a scale for every group of columns; matrices are quantized to them.

=================  ==============================================================
``midtread``       value = (u - (2**(k-1) - 1)) * scale: 2**k - 1 levels, zero among them
``midrise``        value = (2u - (2**k - 1)) * scale / 2: 2**k levels, none zero
``asymmetric``     value = (u - zero_point) * scale, zero_point an integer of 0 to 2**k - 1
=================  ==============================================================

A scale is rounded to its dtype before anything is quantized with it, so that the measured error is the stored one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods import quantize as symmetric
from deltafmt.terms.coding import CODING_GRIDS, check_scales
from deltafmt.terms.floats import bf16_up, narrow, widen

Floats = NDArray[np.float32]
Fields = NDArray[np.uint8]

SCALE_BITS = {"BF16": 16, "F32": 32}

# The least-squares search of an asymmetric grid tries these shares of the min-max range, at few bits with the zero
# point a step up and down, and refines the best.
SHRINK = tuple(np.float32(1 - j / 32) for j in range(24))
REFINEMENTS = 3


@dataclass(frozen=True, slots=True)
class Grid:
    """The options of a quantizer.

    Attributes:
        bits: k, width of a code: 1 to 8.
        kind: ``midtread``, ``midrise`` or ``asymmetric``.
        rule: ``minmax``, which clips nothing, or ``mse``, the scale of least squared error.
        group: columns that share a scale; 0 for all of a row. The last group may be short.
        scale_dtype: ``BF16`` or ``F32``.

    Raises:
        UsageError: an option, or the combination, is out of range.
    """

    bits: int
    kind: str = "midtread"
    rule: str = "minmax"
    group: int = 0
    scale_dtype: str = "BF16"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits k = {self.bits} is outside 1 to 8")
        if self.rule not in symmetric.SCALE_RULES:
            raise UsageError(f"scale rule {self.rule!r} is not one of {', '.join(symmetric.SCALE_RULES)}")
        if self.group < 0:
            raise UsageError(f"a scale group of {self.group} columns is negative")
        check_scales(self.bits, self.kind, self.scale_dtype, self.group, CODING_GRIDS)

    @property
    def top(self) -> int:
        """The largest field."""
        return (1 << self.bits) - (2 if self.kind == "midtread" else 1)

    def size(self, columns: int) -> int:
        """Columns of a whole group in a row of ``columns``."""
        return max(min(self.group or columns, columns), 1)

    def groups(self, columns: int) -> int:
        """Groups in a row of ``columns``."""
        return -(-columns // self.size(columns))

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of codes, scales and zero points of a matrix, without any padding."""
        side = SCALE_BITS[self.scale_dtype] + (self.bits if self.kind == "asymmetric" else 0)
        return rows * (columns * self.bits + self.groups(columns) * side)

    def fit(self, values: Floats) -> Steps:
        """Return the scales and zero points of a matrix; NaN marks an element to be left out.

        Raises:
            UsageError: a scale would overflow its dtype.
        """
        if self.kind == "asymmetric":
            return _fit_asymmetric(values, self)
        _, scales = symmetric.quantize(values, self.bits, self.kind, self.rule, self.group, self.scale_dtype)
        return Steps(scales, None)

    def assign(self, values: Floats, scales: Floats, zeros: Fields | None) -> Fields:
        """Return the fields of the levels nearest to ``values``; all arguments broadcast."""
        if zeros is None:
            return symmetric.assign(values, scales, self.bits, self.kind).astype(np.uint8)
        return _assign_asymmetric(values, scales, zeros, self.top)

    def values(self, fields: Fields, scales: Floats, zeros: Fields | None) -> Floats:
        """Return the values of fields; all arguments broadcast."""
        if zeros is not None:
            return (fields.astype(np.float32) - zeros) * scales
        return (2 * fields.astype(np.float32) - np.float32(self.top)) * (scales * np.float32(0.5))

    def quantize(self, matrix: Floats) -> Quantized:
        """Round a matrix to the nearest levels of the scales that fit it.

        Raises:
            UsageError: a scale would overflow its dtype.
        """
        steps = self.fit(matrix)
        scales, zeros = steps.spread(matrix.shape[1], self)
        return Quantized(self, self.assign(matrix, scales, zeros), steps.scales, steps.zeros)


@dataclass(frozen=True, slots=True)
class Steps:
    """Scales and zero points, which place the levels of a grid.

    Attributes:
        scales: float32, shape (rows, groups), exact in the grid's scale dtype.
        zeros: zero points, uint8 of the same shape; None for a symmetric grid.
    """

    scales: Floats
    zeros: Fields | None

    def spread(self, columns: int, grid: Grid) -> tuple[Floats, Fields | None]:
        """Return scale and zero point of every element, shape (rows, columns)."""
        if self.scales.shape[1] == 1:
            shape = len(self.scales), columns
            zeros = None if self.zeros is None else np.broadcast_to(self.zeros, shape)
            return np.broadcast_to(self.scales, shape), zeros
        at = np.arange(columns) // grid.size(columns)
        return self.scales[:, at], None if self.zeros is None else self.zeros[:, at]


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix on a grid.

    Attributes:
        grid: the options.
        codes: fields u, uint8, shape (rows, columns).
        scales: float32, shape (rows, groups).
        zeros: zero points, uint8 of shape (rows, groups); None for a symmetric grid.
    """

    grid: Grid
    codes: Fields
    scales: Floats
    zeros: Fields | None = None

    def dense(self) -> Floats:
        """Return the matrix that was stored, float32."""
        scales, zeros = Steps(self.scales, self.zeros).spread(self.codes.shape[1], self.grid)
        return self.grid.values(self.codes, scales, zeros)

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points, without any padding."""
        rows, columns = self.codes.shape
        return self.grid.stored_bits(rows, columns)


def _fit_asymmetric(values: Floats, grid: Grid) -> Steps:
    """Return the min-max range, widened to hold zero as GPTQ's quantizer does, or the best of several shares of it."""
    rows, columns = values.shape
    size, groups = grid.size(columns), grid.groups(columns)
    padded = np.full((rows, groups * size), np.nan, np.float32)
    padded[:, :columns] = values
    cells = padded.reshape(rows, groups, size)
    inside = ~np.isnan(cells)
    cells = np.where(inside, cells, np.float32(0))
    low, high = cells.min(axis=2, initial=0), cells.max(axis=2, initial=0)
    symmetric.check_scales(low)
    symmetric.check_scales(high)
    scales, zeros = _place(low, high, grid, np.float32(1))
    if grid.rule == "mse":
        best = _error(cells, scales, zeros, inside, grid.top)
        for share in SHRINK:
            shorter, middle = _place(low, high, grid, share)
            for shift in (0, -1, 1) if grid.bits <= 3 else (0,):
                moved = np.clip(middle.astype(np.int16) + shift, 0, grid.top).astype(np.uint8)
                scales, zeros, best = _better(cells, inside, grid.top, (scales, zeros, best), (shorter, moved))
        for _ in range(REFINEMENTS):
            # For fixed codes the best scale is sum(x q) / sum(q q), with q = u - zero_point.
            codes = _assign_asymmetric(cells, scales[:, :, None], zeros[:, :, None], grid.top)
            steps = np.where(inside, codes.astype(np.float64) - zeros[:, :, None], 0.0)
            products, squares = (cells * steps).sum(axis=2), (steps * steps).sum(axis=2)
            fitted = np.where((squares > 0) & (products > 0), products / np.maximum(squares, 1.0), scales)
            rounded = widen(narrow(fitted.astype(np.float32), grid.scale_dtype), grid.scale_dtype)
            scales, zeros, best = _better(cells, inside, grid.top, (scales, zeros, best), (rounded, zeros))
    symmetric.check_scales(scales)
    return Steps(scales, zeros)


def _place(low: Floats, high: Floats, grid: Grid, share: np.float32) -> tuple[Floats, Fields]:
    """Return the scales, rounded up, and zero points that reach from share * low to share * high."""
    with np.errstate(over="ignore"):
        span = (high * share - low * share) / np.float32(grid.top)
    exact: Floats = np.where(high > low, np.maximum(span, symmetric.SMALLEST), 0).astype(np.float32)
    scales = widen(bf16_up(exact), "BF16") if grid.scale_dtype == "BF16" else exact
    symmetric.check_scales(scales)
    zeros = np.rint(-low * share / np.where(scales > 0, scales, np.float32(1)))
    return scales, np.clip(zeros, 0, grid.top).astype(np.uint8)


def _assign_asymmetric(values: Floats, scales: Floats, zeros: Fields, top: int) -> Fields:
    steps = values / np.where(scales > 0, scales, np.float32(1))
    fields: Fields = np.clip(np.rint(steps + zeros), 0, top).astype(np.uint8)
    return fields


def _error(cells: Floats, scales: Floats, zeros: Fields, inside: NDArray[np.bool_], top: int) -> NDArray[np.float64]:
    codes = _assign_asymmetric(cells, scales[:, :, None], zeros[:, :, None], top)
    decoded = (codes.astype(np.float64) - zeros[:, :, None]) * scales[:, :, None]
    error: NDArray[np.float64] = np.where(inside, (decoded - cells) ** 2, 0.0).sum(axis=2)
    return error


def _better(
    cells: Floats,
    inside: NDArray[np.bool_],
    top: int,
    best: tuple[Floats, Fields, NDArray[np.float64]],
    found: tuple[Floats, Fields],
) -> tuple[Floats, Fields, NDArray[np.float64]]:
    """Return, group by group, the better of two placements."""
    error = _error(cells, *found, inside, top)
    less = error < best[2]
    return (
        np.where(less, found[0], best[0]),
        np.where(less, found[1], best[1]),
        np.where(less, error, best[2]),
    )
