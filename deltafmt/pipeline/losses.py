"""How much each candidate would lose of a tensor, foretold or measured on the tensor before anything is packed.

The squared error of weights does not tell what a model loses: random dropout at 1:8 errs by seven times the delta and
costs little, the singular vectors of half of a delta's energy err by half and cost most of it. The part of a delta D
that an approximation Q keeps along D itself acts on every input alike; the rest of the error is noise, which averages
out over the columns of a row:

    kept = <Q, D> / <D, D>        noise = |(Q - kept D) X|^2 / |D X|^2
    loss = (1 - kept)^2 + w (drawn + OTHER_NOISE (noise - drawn))

*Drawn* is the noise of random positions. What rounding does to large and small elements is the same for every draw, and
does not average out. Noise goes in all directions and the delta in few, in which the inputs are large; the fewer, the
less does noise count at the outputs. It counts by the room that the weights W leave it, too
(:func:`weight_of_noise`).

An embedding or head has a row for every token. Fine-tuning shifts all tokens absent from its texts by the same vector;
that shift dominates the delta and says nothing about accuracy. The two strongest singular directions are therefore left
out of D and Q.

X are the inputs that a calibration has seen, or the identity without one. docs/decisions.md names what the loss was
compared with.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.delta import row_ranges
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.expected import (
    LEAST_REST,
    RUN,
    SAMPLED_ELEMENTS,
    Expected,
    Sampled,
    dot,
    flatness_of,
    some_rows,
    squares_of_rows,
    strength_of,
    with_energy,
)
from deltafmt.methods.factorization import factorize, right_vectors
from deltafmt.methods.grids import Grid
from deltafmt.methods.measured import Heads
from deltafmt.pipeline.plan import Plan
from deltafmt.terms.floats import widen

Floats = NDArray[np.float32]
Floats64 = NDArray[np.float64]

# A larger tensor is sampled: evenly spaced runs of rows, with about so many elements in all.
SAMPLE_ELEMENTS = 1 << 21
# Runs of rows start where super-tiles of any number of sharing rows do.
SAMPLE_ROWS = 256

# Gains that tell what comes of all, the least and the largest, and the step between them.
TRIED_GAINS = (0.5, 1.0, 1.5)
GAINS = (0.25, 4.0)
GAIN_STEP = 0.05
_QUADRATIC = np.linalg.inv(np.vander(TRIED_GAINS, increasing=True)).T
# Elements of the blocks in which a tensor is read to foretell losses.
BLOCK_ELEMENTS = 1 << 18

# The weight of relative noise beside relative bias: for each |D|^2 of |W|^2, and the most.
NOISE_OF_WEIGHTS = 1500.0
MOST_NOISE = 0.15
# Noise that is not drawn at random, but depends on the weights, weighs so many times more.
OTHER_NOISE = 4
# The loss of a method whose scale is a mean over rows most of which do not change: about what nothing at all loses.
NOTHING_KEPT = 1.0


def weight_of_noise(strength: float, flatness: float) -> float:
    """Return w, what relative noise weighs beside relative bias.

    Args:
        strength: |D|^2 / |W|^2 for the base's matrix W: the same relative noise is more to it where D is larger.
        flatness: share of all directions that D uses; noise at the outputs is about so much of noise in the weights.
    """
    return flatness * min(MOST_NOISE, NOISE_OF_WEIGHTS * strength * math.sqrt(flatness))


def weighed(noise: Floats64, drawn: Floats64, weight: float) -> Floats64:
    """Return the loss that noise makes.

    Args:
        noise: |noise|^2 / |D|^2, any shape.
        drawn: what of it is drawn at random, same shape; at most all of it counts.
        weight: w.
    """
    drawn = np.clip(drawn, 0.0, noise)
    found: Floats64 = weight * (drawn + OTHER_NOISE * (noise - drawn))
    return found


def sample_runs(rows: int, columns: int, row_squares: NDArray[np.float64] | None = None) -> list[tuple[int, int]]:
    """Return the runs of rows that are measured of a matrix: all of a small one, evenly spaced ones of a large one.

    Args:
        rows, columns: of the matrix.
        row_squares: the energy of each row. Where evenly spaced rows have little of it, those of most energy are taken.
    """
    total = -(-rows // SAMPLE_ROWS)
    count = max(SAMPLE_ELEMENTS // (columns * SAMPLE_ROWS), 1)
    if count >= total or rows * columns <= SAMPLE_ELEMENTS:
        return [(0, rows)]
    starts = [SAMPLE_ROWS * (2 * i + 1) * total // (2 * count) // SAMPLE_ROWS * SAMPLE_ROWS for i in range(count)]
    runs = [(start, min(start + SAMPLE_ROWS, rows)) for start in starts]
    if row_squares is None:
        return runs
    even = np.concatenate([np.arange(*run) for run in runs])
    numbers, _ = with_energy(even, row_squares, SAMPLE_ROWS)
    return runs if numbers is even else _runs(numbers)


def read_sample(plan: Plan, row_squares: NDArray[np.float64] | None = None) -> DeltaRows:
    """Return the rows of a tensor that are measured, as a matrix of their own: those of :func:`sample_runs`."""
    parts: list[DeltaRows] = []
    for start, stop in sample_runs(plan.shared_rows, plan.tensor.columns, row_squares):
        with _rows(plan, start, stop) as rows:
            parts.append(replace(rows, finetuned=rows.finetuned.copy(), base=rows.base.copy(), first=0))
    return _joined(parts)


class Loss:
    """The predicted loss of one matrix under approximations.

    Args:
        delta: the matrix, float32, shape (rows, columns).
        hessian: second moments of its inputs, shape (columns, columns).
        common: number of strongest singular directions that are left out of the delta and of approximations.
        shared: these directions, if they are known.
        strength: |D|^2 / |W|^2 for the base's matrix W.
        flatness: share of all directions that the delta uses; counted if it is not known.
    """

    def __init__(
        self,
        delta: Floats,
        hessian: NDArray[np.floating] | None = None,
        common: int = 0,
        shared: Floats | None = None,
        strength: float = 1.0,
        flatness: float | None = None,
    ) -> None:
        whole = squares = dot(delta, delta)
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
        flatness = flatness_of(delta, len(delta)) if flatness is None else flatness
        self._weight = weight_of_noise(strength * squares / whole if whole else 1.0, flatness)
        self._inputs: Floats | None = None
        if hessian is not None:
            values, vectors = np.linalg.eigh(hessian.astype(np.float64))
            self._inputs = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        outputs = self._outputs(delta)
        self._energy = dot(outputs, outputs)
        # Noise at the outputs for true inputs is known: it need not be guessed from the flatness.
        if hessian is not None:
            self._weight /= flatness

    def _outputs(self, matrix: Floats) -> Floats:
        return matrix if self._inputs is None else matrix @ self._inputs

    def of(self, approximation: Floats, drawn: float = 0.0) -> float:
        """Return the loss: 0 for the delta itself, 1 for nothing at all.

        Args:
            approximation: Q.
            drawn: the share of the noise that is drawn at random.
        """
        if not self._energy:
            return 0.0
        approximation = approximation - self._common
        kept = dot(approximation, self._delta) / self._squares
        rest = self._outputs(approximation - np.float32(kept) * self._delta)
        noise = np.array(dot(rest, rest) / self._energy)
        return (1 - kept) ** 2 + float(weighed(noise, drawn * noise, self._weight))


def foretell(
    plan: Plan, methods: Sequence[Method | None], seed: int, common: int = 0, sample: Sampled | None = None
) -> list[float]:
    """Return what each method is expected to lose of a tensor: about what :func:`measure` finds, but quickly.

    Dropout has a closed form (docs/expected-errors.md). Of methods that decide row by row, some rows are measured. What
    is left is measured as :func:`measure` does it.

    Args:
        plan: names the tensor and its base.
        methods: methods to try; None stores the tensor whole.
        seed: the tensor's seed.
        common: number of singular directions that are left out.
        sample: what :func:`look_at` has found, if it was called.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """
    sample = sample or look_at(plan, methods, common)
    some = sample.some_delta
    some_loss = Loss(some, shared=sample.some_common, strength=sample.strength, flatness=sample.flatness)
    whole: tuple[Loss, Heads, DeltaRows] | None = None
    found = []
    for method in methods:
        if method is None or not sample.squares:
            found.append(0.0)
            continue
        expected = method.expected(sample)
        if sample.uneven and method.across_rows:
            found.append(NOTHING_KEPT)
        elif expected is not None:
            found.append(float(_expected_loss(expected, sample)))
        elif method.by_rows:
            given = method.approximate(sample.some, seed, Heads(some, 0))
            found.append(some_loss.of(given, float(method.at_random)))
        else:
            if whole is None:
                rows = read_sample(plan, sample.row_squares)
                dense = rows.dense()
                loss = Loss(dense, None, common, strength=sample.strength, flatness=sample.flatness)
                whole = loss, Heads(dense, _most(methods)), rows
            found.append(whole[0].of(method.approximate(whole[2], seed, whole[1]), float(method.at_random)))
    return found


def tuned(sample: Sampled, methods: Sequence[Method | None]) -> list[Method | None]:
    """Return methods with the gain of least expected loss, where they have a gain and nobody has chosen it.

    <Q, D>, |Q|^2 and the variances are quadratic functions of the gain, so three gains tell them. Gains are multiples
    of GAIN_STEP.
    """
    if not sample.squares:
        return list(methods)
    return [method and (_tuned(sample, method) or method) for method in methods]


def _tuned(sample: Sampled, method: Method) -> Method | None:
    tried = []
    for gain in TRIED_GAINS:
        other = method.with_gain(gain)
        expected = None if other is None else other.expected(sample)
        if expected is None:
            return None
        tried.append((expected.along, expected.squares, expected.spread, expected.drawn))
    # Quadratic functions through the values at three gains.
    every = np.array(tried).T @ _QUADRATIC
    gains = np.arange(round(GAINS[0] / GAIN_STEP), round(GAINS[1] / GAIN_STEP) + 1) * GAIN_STEP
    along, squares, spread, drawn = every @ np.stack([np.ones_like(gains), gains, gains**2])
    losses = _expected_loss(Expected(along, squares, spread, drawn), sample)
    best = round(float(gains[np.argmin(losses)]), 4)
    return None if best == 1 else method.with_gain(best)


def _expected_loss(expected: Expected, sample: Sampled) -> Floats64:
    """Return the expected loss of an approximation, or those of many if its figures are arrays."""
    kept, spread, noise, drawn = _parts(expected, sample)
    weight = weight_of_noise(sample.strength * sample.rest / sample.squares, sample.flatness)
    found: Floats64 = (1 - kept) ** 2 + spread + weighed(noise, drawn, weight)
    return found


def _parts(expected: Expected, sample: Sampled) -> tuple[Floats64, Floats64, Floats64, Floats64]:
    """Return what is kept, its variance, the noise, and what of the noise is drawn."""
    kept, spread = np.divide(expected.along, sample.rest), np.divide(expected.spread, sample.rest**2)
    noise = np.maximum(expected.squares / sample.rest - kept**2 - spread, 0.0)
    return kept, spread, noise, np.clip(expected.drawn / sample.rest - spread, 0.0, noise)


def _drawn_share(method: Method, sample: Sampled | None) -> float:
    """Return the share of a method's noise that is drawn at random: as expected, or all or nothing."""
    expected = method.expected(sample) if sample is not None and sample.squares else None
    if expected is None or sample is None:
        return float(method.at_random)
    _, _, noise, drawn = _parts(expected, sample)
    return float(drawn / noise) if noise else 1.0


def look_at(plan: Plan, methods: Sequence[Method | None], common: int) -> Sampled:
    """Return a tensor's delta as far as losses are foretold from it; every row is read once.

    Args:
        plan: names the tensor and its base.
        methods: whose losses will be asked for.
        common: number of singular directions that are left out.

    Raises:
        NonFiniteError: an element of the delta is NaN or infinite.
    """
    rows, columns = plan.shared_rows, plan.tensor.columns
    ranks: dict[Grid, int] = {}
    for method in methods:
        if method and method.head_grid is not None:
            ranks[method.head_grid] = max(ranks.get(method.head_grid, 0), method.head_rank)
    numbers = some_rows(rows, columns, SAMPLED_ELEMENTS)
    parts: list[DeltaRows] = []
    squares = np.zeros(rows)

    def blocks() -> Iterator[Floats]:
        for start, stop in row_ranges(0, rows, columns, 1, BLOCK_ELEMENTS):
            first, last = np.searchsorted(numbers, (start, stop))
            with _rows(plan, start, stop) as block:
                if first < last:
                    at = numbers[first:last] - start
                    parts.append(replace(block, finetuned=block.finetuned[at], base=block.base[at], first=0))
                dense = block.dense()
                squares[start:stop] = squares_of_rows(dense)
                yield dense

    wanted = max([common, *ranks.values()])
    vectors = right_vectors(blocks(), rows, columns, wanted)
    if not parts:  # no vectors are wanted, so nothing was read
        collections.deque(blocks(), 0)
    chosen, share = with_energy(numbers, squares, RUN)
    if chosen is not numbers:
        parts = []
        for start, stop in _runs(chosen):
            with _rows(plan, start, stop) as block:
                parts.append(replace(block, finetuned=block.finetuned.copy(), base=block.base.copy(), first=0))
    return Sampled(_joined(parts), share, vectors, ranks, common, squares)


@contextlib.contextmanager
def _rows(plan: Plan, start: int, stop: int) -> Iterator[DeltaRows]:
    """Give some rows of a tensor."""
    tensor, base = plan.tensor, plan.base
    assert base is not None
    with tensor.row_range(start, stop) as mine, base.row_range(start, stop) as theirs:
        yield DeltaRows(mine, tensor.dtype, theirs, base.dtype, start, tensor.name)


def _joined(parts: Sequence[DeltaRows]) -> DeltaRows:
    """Return the rows of several runs as one matrix."""
    mine, theirs = (np.concatenate([getattr(part, side) for part in parts]) for side in ("finetuned", "base"))
    return replace(parts[0], finetuned=mine, base=theirs)


def _runs(numbers: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers, each as its first and the one behind its last."""
    ends = np.flatnonzero(np.diff(numbers) > 1) + 1
    firsts, lasts = [0, *ends.tolist()], [*ends.tolist(), len(numbers)]
    return [(int(numbers[first]), int(numbers[last - 1]) + 1) for first, last in zip(firsts, lasts, strict=True)]


def _most(methods: Sequence[Method | None]) -> int:
    """Return the highest rank of a head."""
    return max((method.head_rank for method in methods if method), default=0)


def measure(
    plan: Plan,
    methods: Sequence[Method | None],
    seed: int,
    hessian: NDArray[np.floating] | None = None,
    common: int = 0,
    sample: Sampled | None = None,
) -> list[float]:
    """Return what each method would lose of a tensor: the loss that this module's docstring defines.

    Args:
        plan: names the tensor and its base.
        methods: methods to try; None stores the tensor whole.
        seed: the tensor's seed.
        hessian: second moments of the matrix's inputs, to measure with.
        common: number of singular directions that are left out.
        sample: what :func:`look_at` has found. It tells which share of the noise is drawn at random, which one draw
            cannot tell; without it, that is all of the noise or none.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """
    rows = replace(read_sample(plan, None if sample is None else sample.row_squares), hessian=hessian)
    heads = Heads(rows.dense(), _most(methods), hessian)
    strength = strength_of(dot(heads.delta, heads.delta), widen(rows.base, rows.base_dtype))
    flatness = sample.flatness if sample is not None else None
    loss = Loss(heads.delta, hessian, common, strength=strength, flatness=flatness)
    found = []
    for method in methods:
        if method is None:
            found.append(0.0)
        elif sample is not None and sample.uneven and method.across_rows:
            found.append(NOTHING_KEPT)
        else:
            found.append(loss.of(method.approximate(rows, seed, heads), _drawn_share(method, sample)))
    return found
