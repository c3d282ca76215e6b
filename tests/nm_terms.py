"""Helpers of the tests of nm terms: arrays encoded into buffers of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.buffers import blank
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout

Packed = dict[str, NDArray[np.generic]]


def pack(layout: NMLayout, arrays: NMArrays, rows: int, columns: int) -> Packed:
    """Encode arrays into buffers of their own."""
    out = blank(layout, rows, columns)
    nm.encode(layout, arrays, out)
    return out
