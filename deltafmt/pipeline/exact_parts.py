"""Exact parts: what the terms of a delta leave of a tensor, bit for bit (spec/deltafmt-v1.md, section 17.8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.delta import DeltaFile, RunDecoder, row_ranges
from deltafmt.exact.coding import CHUNK_UNITS
from deltafmt.exact.differences import Marks
from deltafmt.exact.units import Units
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import MAX_CHUNK_UNITS
from deltafmt.terms.floats import RAW_DTYPES, add, subtract

# Factors are measured on so many runs of rows, of about so many elements each.
_SAMPLES = 4
_SAMPLE_ELEMENTS = 1 << 15

# A measured factor is rounded to so many bits, so that the last bits of sums decide nothing.
_FACTOR_BITS = 7
_LARGEST_FACTOR = 2.0


class ExactPart:
    """The prediction of one tensor that has terms and an exact part; any number of threads may ask for it.

    Args:
        delta: the delta file, whose terms are read.
        entry: the tensor's entry.
        base: the base tensor.
        factors: the bits of a float32 for each term.
    """

    def __init__(self, delta: DeltaFile, entry: TensorEntry, base: Tensor, factors: Sequence[int]) -> None:
        self._entry = entry
        self._base = base
        self._decoder = RunDecoder(delta, entry)
        self._factors = np.array(factors, np.uint32).view(np.float32)
        self._new = None if entry.data is None else delta.container.buffer(entry.data)

    def predicted(self, first: int, end: int) -> tuple[Units, Marks]:
        """Return the prediction of some units of the tensor, and which of them are marked.

        Raises:
            InvalidFileError: a term breaks the format.
        """
        dtype, columns = self._entry.dtype, self._entry.columns
        shared = self._entry.delta_rows * columns
        units = np.empty(end - first, RAW_DTYPES[dtype])
        marks = np.zeros(end - first, np.bool_)
        for start, stop in self._runs(first, min(end, shared)):
            values, entries = self._rows(start, stop)
            low, high = max(start * columns, first), min(stop * columns, end)
            here, there = slice(low - first, high - first), slice(low - start * columns, high - start * columns)
            units[here], marks[here] = values[there], entries[there]
        if self._new is not None and end > shared:
            low = max(first, shared)
            new = np.frombuffer(self._new, RAW_DTYPES[dtype])
            units[low - first :] = new[low - shared : end - shared]
        return units, marks

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Give runs of rows that cover some of the units that the terms cover; a run ends where one may start."""
        if end > first:
            columns, step = self._entry.columns, self._decoder.step
            stop = min(-(-end // columns // step) * step, self._entry.delta_rows)
            yield from row_ranges(first // columns // step * step, stop, self._decoder.width, step)

    def _rows(self, start: int, stop: int) -> tuple[Units, Marks]:
        """Return the prediction and the marks of a run of rows, as one row."""
        total: NDArray[np.float32] | None = None
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for factor, matrix in zip(self._factors, self._decoder.matrices(start, stop), strict=True):
                part = matrix * factor
                total = part if total is None else total + part
        assert total is not None
        with self._base.row_range(start, stop) as base:
            values = add(base, self._base.dtype, total, self._entry.dtype)
        return values.reshape(-1), self._decoder.marked(start, stop, self._entry.columns).reshape(-1)


def chunk_units(delta: DeltaFile, entry: TensorEntry) -> int:
    """Return how many units a chunk of an exact part has: more where its terms are decoded in runs of long rows."""
    run = 2 * RunDecoder(delta, entry).step * entry.columns
    return min(max(CHUNK_UNITS, 1 << (run - 1).bit_length()), MAX_CHUNK_UNITS)


def measured_factors(delta: DeltaFile, entry: TensorEntry, tensor: Tensor, base: Tensor) -> tuple[int, ...]:
    """Return the factor of each term that brings the sum of the terms nearest to the delta, as bits of a float32.

    A method that drops elements at random multiplies those that it keeps, so that sums come out right. One element is
    predicted best without this factor: it is about N/M for N of M columns. Least squares finds it, whatever the method.

    Args:
        delta: the delta file.
        entry: the tensor's entry.
        tensor, base: the fine-tuned tensor, and the base's.
    """
    decoder = RunDecoder(delta, entry)
    terms = len(entry.terms)
    products, toward = np.zeros((terms, terms)), np.zeros(terms)
    rows = max(_SAMPLE_ELEMENTS // entry.columns // decoder.step, 1) * decoder.step
    starts = {entry.delta_rows * (2 * i + 1) // (2 * _SAMPLES) // decoder.step * decoder.step for i in range(_SAMPLES)}
    for start in sorted(starts):
        stop = min(start + rows, entry.delta_rows)
        with tensor.row_range(start, stop) as mine, base.row_range(start, stop) as theirs:
            wanted = subtract(mine, tensor.dtype, theirs, base.dtype)[0].reshape(-1).astype(np.float64)
        found = np.stack([matrix.reshape(-1).astype(np.float64) for matrix in decoder.matrices(start, stop)])
        products += found @ found.T
        toward += found @ wanted
    if not (np.isfinite(products).all() and np.isfinite(toward).all()):
        return (int(np.float32(1).view(np.uint32)),) * terms
    solved = np.linalg.lstsq(products, toward, rcond=1e-9)[0]
    solved = np.where(np.diagonal(products) > 0, np.clip(solved, 0, _LARGEST_FACTOR), 1)
    fraction, exponent = np.frexp(solved)
    rounded = np.ldexp(np.rint(np.ldexp(fraction, _FACTOR_BITS)), exponent - _FACTOR_BITS)
    return tuple(int(bits) for bits in rounded.astype(np.float32).view(np.uint32))
