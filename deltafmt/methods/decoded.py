"""What a reader makes of the arrays that a method gives: they are packed, and decoded again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.buffers import blank
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.layout import TermLayout


def decoded(layout: TermLayout, arrays: TermArrays, shape: tuple[int, int], seed: int) -> NDArray[np.float32]:
    """Return what a reader makes of the arrays of a term.

    Args:
        layout: the term's layout, as :meth:`deltafmt.methods.base.Method.layouts` gives it.
        arrays: the term's arrays.
        shape: rows and columns of the matrix.
        seed: the tensor's seed, 32 bits.
    """
    rows, columns = shape
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, seed if layout.seeded else 0, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    return codec.decode(packed, 0, rows)
