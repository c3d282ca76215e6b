"""Whether two tensors are one before and after training, told from some of their rows.

Names and shapes cannot tell whether fused rows lie in another order, or which of two equal towers was trained. Training
moves weights little; the weights of another matrix are unrelated to them.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.format.constants import DELTA_DTYPES
from deltafmt.terms.floats import widen

# Rows that are compared, spread over the tensor.
_ROWS: Final = 24
# Elements of a row that are compared.
_COLUMNS: Final = 4096
# The squares of the difference over those of both tensors: about 0 after training, about 1 for unrelated tensors.
_MOST: Final = 0.5


def distance(tensor: Tensor, base: Tensor) -> float | None:
    """Return the squares of the difference of two tensors over the sum of their squares, from some of their rows.

    The result is 0 for equal tensors and near 1 for unrelated ones. It is None if they have no rows to compare, have a
    dtype without deltas, or hold zeros or values that are not finite.
    """
    rows = min(tensor.rows, base.rows)
    if not {tensor.dtype, base.dtype} <= set(DELTA_DTYPES) or tensor.columns != base.columns or not tensor.columns:
        return None
    between = squares = 0.0
    for row in {number * (rows - 1) // max(_ROWS - 1, 1) for number in range(_ROWS)} if rows else ():
        # NaN and infinity count for nothing; a signalling NaN warns when it is cast, too.
        with (
            np.errstate(invalid="ignore", over="ignore"),
            tensor.row_range(row, row + 1) as mine,
            base.row_range(row, row + 1) as theirs,
        ):
            a, b = (
                widen(raw[:, :_COLUMNS], dtype).astype(np.float64)
                for raw, dtype in ((mine, tensor.dtype), (theirs, base.dtype))
            )
            between += float(np.square(a - b).sum())
            squares += float(np.square(a).sum() + np.square(b).sum())
    return between / squares if squares and np.isfinite(squares) else None


def unrelated(tensor: Tensor, base: Tensor) -> bool:
    """Tell whether two tensors can be compared and have nothing to do with each other."""
    found = distance(tensor, base)
    return found is not None and found > _MOST
