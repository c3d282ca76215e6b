"""What candidates would lose of a tensor, measured on the tensor itself before anything is packed.

The squared error of weights does not tell what a model loses: random dropout at 1:8 errs by seven times the delta and
costs little, the singular vectors of half of a delta's energy err by half and cost most of it. What an approximation Q
keeps of a delta D along D itself acts on every input alike; the rest of the error is noise, which averages out over
the columns of a row:

    kept = <Q, D> / <D, D>
    loss = (1 - kept)^2 + w |(Q - kept D) X|^2 / |D X|^2

Of an embedding or head, with a row for every token, the two strongest singular directions are left out of D and Q:
a fine-tune moves all tokens alike that its texts do not have, which is most of the delta and tells nothing.

X are inputs: those that a calibration has seen, or all alike. What dropout adds is drawn at random, and weighs less
than what rounding adds, which depends on the weights. docs/decisions.md has what the loss was compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.bands import quantize_bands
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.factorization import LowRank, factorize
from deltafmt.methods.grids import Grid
from deltafmt.methods.method_routines import Routines
from deltafmt.methods.residual import Residual
from deltafmt.methods.sampling import gather
from deltafmt.pipeline.plan import Plan
from deltafmt.terms.buffers import blank
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.floats import Raw
from deltafmt.terms.layout import TermLayout

Floats = NDArray[np.float32]

# Of a larger tensor, runs of rows with about so many elements in all are measured, evenly spaced.
SAMPLE_ELEMENTS = 1 << 21
# Runs of rows start where super-tiles of any number of sharing rows do.
SAMPLE_ROWS = 256

# What relative noise weighs beside relative bias: where it is drawn at random, and where it is not.
RANDOM_NOISE = 0.01
OTHER_NOISE = 0.05
# And how much more it weighs at the outputs for true inputs, where it is relatively smaller.
OF_INPUTS = 6
# Strongest directions are not left out where they are all but this of a delta's energy: they are the delta then.
LEAST_REST = 0.02


def sample_runs(rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the runs of rows that are measured of a matrix: all of a small one, evenly spaced ones of a large one."""
    total = -(-rows // SAMPLE_ROWS)
    count = max(SAMPLE_ELEMENTS // (columns * SAMPLE_ROWS), 1)
    if count >= total or rows * columns <= SAMPLE_ELEMENTS:
        return [(0, rows)]
    starts = [SAMPLE_ROWS * (2 * i + 1) * total // (2 * count) // SAMPLE_ROWS * SAMPLE_ROWS for i in range(count)]
    return [(start, min(start + SAMPLE_ROWS, rows)) for start in starts]


def read_sample(plan: Plan, routines: Routines) -> DeltaRows:
    """Return the rows of a tensor that are measured, as a matrix of their own.

    Raises:
        NonFiniteError: an element of the delta is NaN or infinite.
    """
    tensor, base = plan.tensor, plan.base
    assert base is not None
    parts: tuple[list[Raw], list[Raw]] = [], []
    for start, stop in sample_runs(min(tensor.rows, base.rows), tensor.columns):
        for found, source in zip(parts, (tensor, base), strict=True):
            with source.row_range(start, stop) as rows:
                found.append(rows.copy())
    mine, theirs = map(np.concatenate, parts)
    return DeltaRows(mine, tensor.dtype, theirs, base.dtype, 0, routines, tensor.name)


class Approximations:
    """What candidates make of one matrix; singular vectors are computed once for all that ask for some.

    Args:
        rows: the matrix.
        seed: of the tensor.
        most_vectors: the highest rank that a :class:`deltafmt.methods.residual.Residual` will ask for.
    """

    def __init__(self, rows: DeltaRows, seed: int, most_vectors: int) -> None:
        self.delta = rows.dense()
        self._rows = rows
        self._seed = seed
        self._most_vectors = most_vectors
        self._factors: LowRank | None = None
        self._heads: dict[tuple[int, Grid], Floats] = {}

    def of(self, method: Method) -> Floats:
        """Return the decoded delta under a method, float32, of the matrix's shape.

        Raises:
            UsageError: the method cannot have this matrix.
        """
        if isinstance(method, Residual):
            return self._residual(method)
        compressed = method.compress(self._rows, self._seed)
        total = np.zeros(self.delta.shape, np.float32)
        for layout, arrays in zip(method.layouts(*self.delta.shape), compressed, strict=True):
            total += self._decoded(layout, arrays)
        return total

    def _residual(self, method: Residual) -> Floats:
        head = self._head(method.rank, method.head_grid)
        dropout = method.dropout
        positions = dropout.draw(self._rows, self._seed)
        kept = gather(self.delta - head, positions, dropout.m, dropout.share, dropout.factor)
        return head + self._decoded(dropout.layout, dropout.quantize(positions, kept, self._rows.routines))

    def _head(self, rank: int, grid: Grid) -> Floats:
        if (rank, grid) not in self._heads:
            if self._factors is None:
                self._factors = factorize(self.delta, self._most_vectors, hessian=self._rows.hessian)
            factors = self._factors.head(rank)
            (band,) = quantize_bands(factors, [(factors.values.size, grid.bits)], grid)
            self._heads[rank, grid] = band.dense()
        return self._heads[rank, grid]

    def _decoded(self, layout: TermLayout, arrays: TermArrays) -> Floats:
        rows, columns = self.delta.shape
        layout, slots = fitted(layout, arrays, columns)
        codec = term_codec(layout, rows, columns, self._seed if layout.seeded else 0, slots)
        packed = blank(layout, rows, columns, slots)
        routines = self._rows.routines.codec
        codec.encode(arrays, packed, 0, routines)
        return codec.decode(packed, 0, rows, routines)


class Loss:
    """The predicted loss of one matrix under approximations.

    Args:
        delta: the matrix, float32, shape (rows, columns).
        hessian: second moments of its inputs, shape (columns, columns).
        common: strongest singular directions that are left out, of the delta and of approximations.
    """

    def __init__(self, delta: Floats, hessian: NDArray[np.floating] | None = None, common: int = 0) -> None:
        squares = _dot(delta, delta)
        self._common = np.zeros((1, 1), np.float32)
        if common:
            shared = factorize(delta, common).dense()
            rest = delta - shared
            if _dot(rest, rest) >= LEAST_REST * squares:
                self._common, delta, squares = shared, rest, _dot(rest, rest)
        self._delta, self._squares = delta, squares
        self._inputs: Floats | None = None
        if hessian is not None:
            values, vectors = np.linalg.eigh(hessian.astype(np.float64))
            self._inputs = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        outputs = self._outputs(delta)
        self._energy = _dot(outputs, outputs)
        self._factor = 1 if hessian is None else OF_INPUTS

    def _outputs(self, matrix: Floats) -> Floats:
        return matrix if self._inputs is None else matrix @ self._inputs

    def of(self, approximation: Floats, weight: float = OTHER_NOISE) -> float:
        """Return the loss: 0 for the delta itself, 1 for nothing at all; ``weight`` is that of noise."""
        if not self._energy:
            return 0.0
        approximation = approximation - self._common
        kept = _dot(approximation, self._delta) / self._squares
        noise = self._outputs(approximation - np.float32(kept) * self._delta)
        return (1 - kept) ** 2 + self._factor * weight * _dot(noise, noise) / self._energy


def _dot(a: Floats, b: Floats) -> float:
    return float(np.vdot(a, b))


def measure(
    plan: Plan,
    methods: Sequence[Method | None],
    seed: int,
    routines: Routines,
    hessian: NDArray[np.floating] | None = None,
    common: int = 0,
) -> list[float]:
    """Return what each method would lose of a tensor; None keeps it exactly and loses nothing.

    Args:
        plan: names the tensor and its base.
        methods: to try.
        seed: of the tensor.
        routines: the implementation of the hot loops.
        hessian: second moments of the matrix's inputs, to measure with.
        common: singular directions that are left out.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """
    rows = replace(read_sample(plan, routines), hessian=hessian)
    most = max((method.rank for method in methods if isinstance(method, Residual)), default=0)
    approximations = Approximations(rows, seed, most)
    loss = Loss(approximations.delta, hessian, common)
    return [
        0.0 if method is None else loss.of(approximations.of(method), RANDOM_NOISE if method.at_random else OTHER_NOISE)
        for method in methods
    ]
