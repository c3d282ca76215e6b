"""How much each candidate would lose of a tensor, foretold or measured on the tensor before anything is packed.

The squared error of weights does not tell what a model loses: random dropout at 1:8 errs by seven times the delta and
costs little, the singular vectors of half of a delta's energy err by half and cost most of it. The part of a delta D
that an approximation Q keeps along D itself acts on every input alike; the rest of the error is noise, which averages
out over the columns of a row:

    kept = <Q, D> / <D, D>
    loss = (1 - kept)^2 + w |(Q - kept D) X|^2 / |D X|^2

An embedding or head has a row for every token. Fine-tuning shifts all tokens absent from its texts by the same vector;
that shift dominates the delta and says nothing about accuracy. The two strongest singular directions are therefore
left out of D and Q.

X are the inputs that a calibration has seen, or the identity without one. The noise of dropout is drawn at random, and
weighs less than the noise of rounding, which depends on the weights. docs/decisions.md names what the loss was compared
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.expected import LEAST_REST, Sampled, dot
from deltafmt.methods.factorization import factorize
from deltafmt.methods.measured import Heads
from deltafmt.pipeline.plan import Plan
from deltafmt.terms.floats import Raw

Floats = NDArray[np.float32]

# A larger tensor is sampled: evenly spaced runs of rows, with about so many elements in all.
SAMPLE_ELEMENTS = 1 << 21
# Runs of rows start where super-tiles of any number of sharing rows do.
SAMPLE_ROWS = 256

# The weight of relative noise beside relative bias: where noise is drawn at random, and where it is not.
RANDOM_NOISE = 0.01
OTHER_NOISE = 0.05
# Noise at the outputs for true inputs is relatively smaller, and weighs so many times more.
OF_INPUTS = 6


def sample_runs(rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the runs of rows that are measured of a matrix: all of a small one, evenly spaced ones of a large one."""
    total = -(-rows // SAMPLE_ROWS)
    count = max(SAMPLE_ELEMENTS // (columns * SAMPLE_ROWS), 1)
    if count >= total or rows * columns <= SAMPLE_ELEMENTS:
        return [(0, rows)]
    starts = [SAMPLE_ROWS * (2 * i + 1) * total // (2 * count) // SAMPLE_ROWS * SAMPLE_ROWS for i in range(count)]
    return [(start, min(start + SAMPLE_ROWS, rows)) for start in starts]


def read_sample(plan: Plan) -> DeltaRows:
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
    return DeltaRows(mine, tensor.dtype, theirs, base.dtype, 0, tensor.name)


class Loss:
    """The predicted loss of one matrix under approximations.

    Args:
        delta: the matrix, float32, shape (rows, columns).
        hessian: second moments of its inputs, shape (columns, columns).
        common: number of strongest singular directions that are left out of the delta and of approximations.
        shared: these directions, if they are known.
    """

    def __init__(
        self,
        delta: Floats,
        hessian: NDArray[np.floating] | None = None,
        common: int = 0,
        shared: Floats | None = None,
    ) -> None:
        squares = dot(delta, delta)
        self._common = np.zeros((1, 1), np.float32)
        if shared is not None:
            self._common, delta = shared, delta - shared
            squares = dot(delta, delta)
        elif common:
            shared = factorize(delta, common).dense()
            rest = delta - shared
            if dot(rest, rest) >= LEAST_REST * squares:
                self._common, delta, squares = shared, rest, dot(rest, rest)
        self._delta, self._squares = delta, squares
        self._inputs: Floats | None = None
        if hessian is not None:
            values, vectors = np.linalg.eigh(hessian.astype(np.float64))
            self._inputs = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        outputs = self._outputs(delta)
        self._energy = dot(outputs, outputs)
        self._factor = 1 if hessian is None else OF_INPUTS

    def _outputs(self, matrix: Floats) -> Floats:
        return matrix if self._inputs is None else matrix @ self._inputs

    def of(self, approximation: Floats, weight: float = OTHER_NOISE) -> float:
        """Return the loss: 0 for the delta itself, 1 for nothing at all; ``weight`` is that of noise."""
        if not self._energy:
            return 0.0
        approximation = approximation - self._common
        kept = dot(approximation, self._delta) / self._squares
        noise = self._outputs(approximation - np.float32(kept) * self._delta)
        return (1 - kept) ** 2 + self._factor * weight * dot(noise, noise) / self._energy


def foretell(plan: Plan, methods: Sequence[Method | None], seed: int, common: int = 0) -> list[float]:
    """Return what each method is expected to lose of a tensor: about what :func:`measure` finds, but quickly.

    Dropout has a closed form (docs/expected-errors.md). Of methods that decide row by row, some rows are measured. What
    is left is measured as :func:`measure` does it.

    Args:
        plan: names the tensor and its base.
        methods: methods to try; None stores the tensor whole.
        seed: the tensor's seed.
        common: number of singular directions that are left out.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """
    sample = Sampled(read_sample(plan), max((method.head_rank for method in methods if method), default=0), common)
    some = sample.some_delta
    some_loss = Loss(some, shared=sample.some_common)
    whole: tuple[Loss, Heads] | None = None
    found = []
    for method in methods:
        if method is None or not sample.squares:
            found.append(0.0)
            continue
        weight = RANDOM_NOISE if method.at_random else OTHER_NOISE
        expected = method.expected(sample, seed)
        if expected is not None:
            found.append(expected.loss(sample.rest, weight))
        elif method.by_rows:
            found.append(some_loss.of(method.approximate(sample.some, seed, Heads(some, 0)), weight))
        else:
            if whole is None:
                whole = Loss(sample.delta, None, common), Heads(sample.delta, method.head_rank)
            found.append(whole[0].of(method.approximate(sample.rows, seed, whole[1]), weight))
    return found


def measure(
    plan: Plan,
    methods: Sequence[Method | None],
    seed: int,
    hessian: NDArray[np.floating] | None = None,
    common: int = 0,
) -> list[float]:
    """Return what each method would lose of a tensor: the loss that this module's docstring defines.

    Args:
        plan: names the tensor and its base.
        methods: methods to try; None stores the tensor whole.
        seed: the tensor's seed.
        hessian: second moments of the matrix's inputs, to measure with.
        common: number of singular directions that are left out.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """
    rows = replace(read_sample(plan), hessian=hessian)
    heads = Heads(rows.dense(), max((method.head_rank for method in methods if method), default=0), hessian)
    loss = Loss(heads.delta, hessian, common)
    found = []
    for method in methods:
        if method is None:
            found.append(0.0)
        else:
            weight = RANDOM_NOISE if method.at_random else OTHER_NOISE
            found.append(loss.of(method.approximate(rows, seed, heads), weight))
    return found
