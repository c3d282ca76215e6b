"""Scales that keep the length of a delta, which quantization would shrink.

The scale of least squared error makes the decoded values Q orthogonal to their error: <Q, X - Q> = 0, hence
<Q, X> = <Q, Q> < <X, X>. A sign times the mean magnitude keeps 64% of a normal delta that way, codes of 2 bits keep
88%. Every layer of a model then moves too little in the same direction, and no later layer averages that out, as it
does the rest of the error. The factor that restores the length along X itself,

    scale * <X, X> / <Q, X>,

errs more in squares of weights and less at the outputs. It does for quantization what the rescale does for dropout.
For one bit it takes sum x^2 / sum |x| in the place of mean |x|.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.floats import narrow, widen

Floats = NDArray[np.float32]

# The name of the rule, where a method has it.
UNBIASED = "unbiased"

# Where hardly anything of a group was kept, nothing sensible restores it.
LARGEST_FACTOR = 8.0


def unbiased_scales(values: Floats, decoded: Floats, scales: Floats, size: int, scale_dtype: str) -> Floats:
    """Return the scales with which the same codes have the values' own length along them.

    Args:
        values: X, float32, shape (rows, entries); NaN marks an entry that lies beyond the last column.
        decoded: Q, the values of the codes at the scales given.
        scales: float32, shape (rows, groups).
        size: entries that share a scale.
        scale_dtype: ``BF16`` or ``F32``, to which the result is rounded.

    Returns:
        Scales, float32, of the same shape; a group is left as it is where its factor is not within 1 / 8 to 8.
    """
    inside = ~np.isnan(values)
    x = np.where(inside, values, 0).astype(np.float64)
    q = np.where(inside, decoded, 0).astype(np.float64)
    starts = np.arange(0, values.shape[1], size)
    energy = np.add.reduceat(x * x, starts, axis=1)
    along = np.add.reduceat(x * q, starts, axis=1)
    factor = energy / np.where(along > 0, along, 1)
    usable = (along > 0) & (factor <= LARGEST_FACTOR) & (factor >= 1 / LARGEST_FACTOR)
    found = np.where(usable, scales * factor, scales).astype(np.float32)
    rounded = widen(narrow(found, scale_dtype), scale_dtype)
    return np.where(usable & np.isfinite(rounded), rounded, scales)
