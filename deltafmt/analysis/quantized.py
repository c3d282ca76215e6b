"""Histograms of a delta's values before and after quantization (DeltaDQ, section 3.5 and figure 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.analysis.pairs import Floats, TensorPair
from deltafmt.methods.quantize import quantize
from deltafmt.methods.sampling import gather, uniform

MAX_ROWS = 256  # the values of at most so many consecutive rows from the middle of a matrix are counted
REACH = 6.0  # the histogram reaches this many root mean squares to both sides
BINS = 121  # an odd number, so that zero is in the middle of a bin


def kept_and_quantized(delta: Floats, n: int, m: int, bits: int, seed: int) -> tuple[Floats, Floats]:
    """Keep N of every M columns at random, and quantize them by DeltaDQ's equations 8 and 9 with one scale a row.

    Args:
        delta: the delta, shape (rows, columns).
        n, m: N and M, at most 255.
        bits: k, at least 2.
        seed: the seed of the positions, 32 bits.

    Returns:
        The kept values before and after quantization, without the rescale by M / N; both have the shape (values,).
    """
    rows, columns = delta.shape
    positions = uniform(seed, 0, rows, -(-columns // m), n, m)
    kept = gather(delta, positions, m, 1, np.float32(1))
    fields, scales = quantize(kept, bits, "midtread", "minmax", 0, "F32")
    values = (fields.astype(np.int32) - (2 ** (bits - 1) - 1)).astype(np.float32) * scales
    inside = ~np.isnan(kept)
    return kept[inside], values[inside]


@dataclass(slots=True)
class Histogram:
    """Counts of values before and after quantization, in units of the root mean square of their matrix's delta.

    Attributes:
        all, kept, quantized: the counts of all values, of the kept values, and of the kept values after quantization.
            Each has BINS counts, and one more at either end for values beyond REACH.
    """

    all: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS + 2, np.int64))
    kept: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS + 2, np.int64))
    quantized: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS + 2, np.int64))

    def add(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self.all = self.all + other.all
        self.kept = self.kept + other.kept
        self.quantized = self.quantized + other.quantized

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        return {
            "edges": [float(edge) for edge in edges()],
            "all": self.all.tolist(),
            "kept": self.kept.tolist(),
            "quantized": self.quantized.tolist(),
        }


def edges() -> NDArray[np.float64]:
    """Return the edges of the bins, in root mean squares."""
    return np.linspace(-REACH, REACH, BINS + 1)


def count(values: Floats, rms: float) -> NDArray[np.int64]:
    """Return the number of values below all bins, in each bin, and above all bins."""
    return np.bincount(np.searchsorted(edges(), values / (rms or 1.0), side="right"), minlength=BINS + 2)


def histogram_of(pair: TensorPair, rms: float, n: int, m: int, bits: int, seed: int) -> Histogram:
    """Return the histogram of some rows of a matrix's delta; ``rms`` is the root mean square of the whole delta."""
    start = max(pair.rows - MAX_ROWS, 0) // 2
    delta = pair.rows_of(start, min(start + MAX_ROWS, pair.rows)).delta
    kept, quantized = kept_and_quantized(delta, n, m, bits, seed)
    return Histogram(count(delta.reshape(-1), rms), count(kept, rms), count(quantized, rms))
