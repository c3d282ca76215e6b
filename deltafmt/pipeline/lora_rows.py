"""Trained rows of an embedding (``trainable_token_indices``) as a term, ``lowrank`` or ``sparse``: the smaller one."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import NonFiniteError
from deltafmt.pipeline.entry_writer import TermBytes, packed_bytes
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import AnyCodec, term_codec
from deltafmt.terms.floats import add, narrow, widen
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.sparse.codec import SparseCodec
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays

# A base plus a difference in float32 may miss a float32 by this part of the larger of the two.
_ROUNDING: Final = 2.0**-23


def rows_term(base: Tensor, rows: tuple[tuple[int, ...], Tensor]) -> TermBytes | None:
    """Return the term that replaces rows of a matrix, or None if the matrix has to be stored whole.

    The base plus the term is the new row: bit for bit in BF16 and F16, and within the rounding of one addition in F32.

    Args:
        base: the matrix.
        rows: numbers of rows, and the rows. The last one counts if a number stands twice.

    Raises:
        NonFiniteError: a row has NaN or infinity.
    """
    numbers, tensor = rows
    order = sorted({number: place for place, number in enumerate(numbers)}.items())
    with tensor.row_range(0, tensor.rows) as raw:
        trained = widen(raw, tensor.dtype)[[place for _, place in order]]
    if not np.isfinite(trained).all():
        raise NonFiniteError(f'{tensor.file.path}: tensor "{tensor.name}" is not finite')
    wanted = narrow(trained, base.dtype)
    deltas = np.zeros(trained.shape, np.float32)
    for place, (number, _) in enumerate(order):
        with base.row_range(number, number + 1) as old:
            before = widen(old, base.dtype)
            deltas[place] = widen(wanted[place : place + 1], base.dtype) - before
            found = widen(add(old, base.dtype, deltas[place : place + 1], base.dtype), base.dtype)
        new = widen(wanted[place : place + 1], base.dtype)
        room = _ROUNDING * np.maximum(np.abs(before), np.abs(new)) if base.dtype == "F32" else 0.0
        if not (np.abs(found - new) <= room).all():
            return None
    places = np.array([number for number, _ in order], np.int64)
    terms = [_sparse(base, places, deltas)]
    if places.size <= min(base.rows, base.columns):
        terms.append(_lowrank(base, places, deltas))
    best = min(terms, key=_nbytes)
    return best if _nbytes(best) < base.nbytes else None


def _nbytes(term: TermBytes) -> int:
    return sum(len(data) for data in term.buffers.values() if isinstance(data, bytes | bytearray | memoryview))


def _lowrank(base: Tensor, places: NDArray[np.int64], deltas: NDArray[np.float32]) -> TermBytes:
    """Return one pair of vectors a row: a unit vector, and the row's difference."""
    layout = LowRankLayout(places.size, "F32")
    u = np.zeros((places.size, base.rows), np.float32)
    u[np.arange(places.size), places] = 1
    codec = term_codec(layout, base.rows, base.columns)
    packed = blank(layout, base.rows, base.columns)
    codec.encode(LowRankArrays(narrow(u, "F32"), narrow(deltas, "F32")), packed, 0)
    return packed_bytes(codec, packed)


def _sparse(base: Tensor, places: NDArray[np.int64], deltas: NDArray[np.float32]) -> TermBytes:
    """Return the rows' elements, one after the other."""
    counts = np.zeros(base.rows, np.int64)
    counts[places] = base.columns
    columns = np.tile(np.arange(base.columns, dtype=np.int64), places.size)
    arrays = SparseArrays(np.cumsum(counts), columns, narrow(deltas, "F32").reshape(-1))
    layout, slots = SparseCodec.fit(SparseLayout("F32", gap_bits=1), arrays, base.columns)
    codec: AnyCodec = term_codec(layout, base.rows, base.columns, 0, slots)
    packed = blank(layout, base.rows, base.columns, slots)
    codec.encode(arrays, packed, 0)
    return packed_bytes(codec, packed)
