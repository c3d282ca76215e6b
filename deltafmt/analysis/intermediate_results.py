"""Balanced Intermediate Results (DeltaDQ, section 3.2 and figure 2).

An output of a linear layer is a sum of products w[p, j] * x[j] over the columns j. If the products of a delta vary
little and lie in a narrow range, a random part of them, rescaled, has nearly the same sum. This is why dropout works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.analysis.pairs import Block, Floats

MAX_ROWS = 256  # the products of at most so many rows of a matrix are examined, evenly spaced
SIDES = ("base", "finetuned", "delta")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def spread(rows: Floats, inputs: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the variance and the range (max - min) of the products of every row with every input.

    Args:
        rows: rows of a matrix, shape (rows, columns).
        inputs: input vectors, shape (vectors, columns).

    Returns:
        Two arrays of shape (rows * vectors,): the population variance over the columns, and the range over them.
    """
    variances, ranges = [], []
    for x in inputs:
        products = rows * x
        variances.append(products.var(axis=1, dtype=np.float64))
        ranges.append(np.ptp(products, axis=1).astype(np.float64))
    return np.concatenate(variances), np.concatenate(ranges)


@dataclass(slots=True)
class Products:
    """Variances and ranges of the products of some rows of a tensor, for base, fine-tune and delta.

    Attributes:
        inputs: input vectors x, shape (vectors, columns).
        rows: the number of rows of the tensor.
        variances, ranges: for each side, a list with one array for each block of rows.
    """

    inputs: Floats
    rows: int
    variances: dict[str, list[NDArray[np.float64]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    ranges: dict[str, list[NDArray[np.float64]]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def add(self, block: Block) -> None:
        """Add the examined rows of a block."""
        step = -(-self.rows // MAX_ROWS)
        chosen = slice(-block.first % step, None, step)
        for side in SIDES:
            rows = getattr(block, side)[chosen]
            if len(rows):
                variance, width = spread(rows, self.inputs)
                self.variances[side].append(variance)
                self.ranges[side].append(width)

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        return summary([self])


def pooled(several: list[Products], side: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the variances and the ranges of several tensors."""
    variances = [part for products in several for part in products.variances[side]]
    ranges = [part for products in several for part in products.ranges[side]]
    return np.concatenate(variances), np.concatenate(ranges)


def summary(several: list[Products]) -> dict[str, Any]:
    """Return the means and quantiles of several tensors' products as a plain object for JSON."""
    obj: dict[str, Any] = {}
    for side in SIDES:
        variances, ranges = pooled(several, side)
        obj[side] = {
            "mean_variance": float(variances.mean()),
            "mean_range": float(ranges.mean()),
            "variance_quantiles": [float(value) for value in np.quantile(variances, QUANTILES)],
            "range_quantiles": [float(value) for value in np.quantile(ranges, QUANTILES)],
        }
    return obj
