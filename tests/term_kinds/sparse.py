"""The cases of ``sparse``."""

from __future__ import annotations

from typing import Any

import numpy as np

from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays
from strategies import sparse_layouts
from term_kinds import KindCases
from term_kinds.lowbit import random_scales


def arrays(rng: np.random.Generator, layout: SparseLayout, rows: int, columns: int, seed: int) -> SparseArrays:
    """Draw the content of a term; rows, or the whole, may be empty."""
    kept = rng.random((rows, columns)) < rng.choice((0.0, 0.02, 0.3)) * rng.random((rows, 1)) * 2
    ends, column = np.cumsum(kept.sum(axis=1)), np.nonzero(kept)[1]
    if isinstance(layout.values, str):
        return SparseArrays(ends, column, narrow(rng.standard_normal(column.size, np.float32), layout.values))
    codes = rng.integers(0, layout.values.top + 1, column.size).astype(np.uint8)
    return SparseArrays(ends, column, codes, random_scales(rng, (rows, 1)))


def naive(operand: Any) -> Any:
    """Return the dense delta of an operand."""
    from deltafmt.kernels.sparse.naive import sparse_delta

    return sparse_delta(operand.layout, operand.buffers, operand.rows, operand.columns, operand.slots)


def magnitude(operand: Any) -> Any:
    """Return the magnitude of what is summed for each element, float64; a value is one product."""
    return 2 * naive(operand).abs().double()


CASES = KindCases(
    layouts=sparse_layouts(),
    samples=[
        SparseLayout("BF16", 8),
        SparseLayout("F32", 3, 256),
        SparseLayout(Coding(4, "midtread"), 4),
        SparseLayout(Coding(1, "midrise"), 5, 256),
        SparseLayout(Coding(3, "midrise", "F32"), 1),
        SparseLayout(Coding(7, "midtread"), 16),
    ],
    arrays=arrays,
    naive=naive,
    magnitude=magnitude,
    compiled={
        "BF16 gaps=8 span=4096": (SparseLayout("BF16", 8), 1000),
        "k=4 midtread gaps=5 span=4096": (SparseLayout(Coding(4, "midtread"), 5), 1000),
    },
    limits={"BF16 gaps=8 span=4096": (72, 21), "k=4 midtread gaps=5 span=4096": (72, 24)},
)
