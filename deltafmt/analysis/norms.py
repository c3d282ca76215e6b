"""Norms of a delta: how large it is, and which of its columns stand out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.analysis.pairs import Block

OUTLIER = 3.0  # a column whose norm is this many times the root mean square of all columns' norms stands out


@dataclass(slots=True)
class Norms:
    """Sums of squares of a tensor, added up block by block.

    Attributes:
        elements: the number of elements.
        base, finetuned, delta: the sums of squares of the base, of the fine-tune and of the delta.
        largest: the largest magnitude in the delta.
        columns: the sums of squares of the delta's columns.
    """

    elements: int = 0
    base: float = 0.0
    finetuned: float = 0.0
    delta: float = 0.0
    largest: float = 0.0
    columns: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, block: Block) -> None:
        """Add a block of rows."""
        squares = np.square(block.delta, dtype=np.float64).sum(axis=0)
        self.columns = squares if not self.elements else self.columns + squares
        self.elements += block.delta.size
        self.base += float(np.square(block.base, dtype=np.float64).sum())
        self.finetuned += float(np.square(block.finetuned, dtype=np.float64).sum())
        self.delta += float(squares.sum())
        self.largest = max(self.largest, float(np.abs(block.delta).max(initial=0)))

    @property
    def relative(self) -> float | None:
        """The Frobenius norm of the delta over the base's; None if the base is zero and the delta is not."""
        return relative(self.delta, self.base)

    @property
    def rms(self) -> float:
        """The root mean square of the delta's elements."""
        return math.sqrt(self.delta / self.elements) if self.elements else 0.0

    @property
    def column_ratios(self) -> NDArray[np.float64]:
        """The norms of the delta's columns over their root mean square."""
        mean = self.columns.mean() if self.columns.size else 0.0
        ratios: NDArray[np.float64] = np.sqrt(self.columns / (mean or 1.0))
        return ratios

    @property
    def outlier_columns(self) -> list[int]:
        """The numbers of the columns that stand out, the largest first."""
        ratios = self.column_ratios
        order = np.argsort(-ratios, kind="stable")
        return [int(column) for column in order if ratios[column] > OUTLIER]

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        outliers = self.outlier_columns
        return {
            "base": math.sqrt(self.base),
            "finetuned": math.sqrt(self.finetuned),
            "delta": math.sqrt(self.delta),
            "relative": self.relative,
            "rms": self.rms,
            "largest": self.largest,
            "outlier_columns": len(outliers),
            "largest_columns": outliers[:16],
            "largest_column_ratio": float(self.column_ratios.max(initial=0)),
        }


def relative(squares: float, reference: float) -> float | None:
    """Return the root of a ratio of sums of squares; 0 for 0 / 0, and None if only the reference is zero."""
    if reference:
        return math.sqrt(squares / reference)
    return None if squares else 0.0
