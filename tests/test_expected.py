"""Expected losses: the formulas are the means of many draws, and about what packing loses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import normal
from deltafmt.checkpoint.safetensors_file import PagedTensor
from deltafmt.errors import NonFiniteError
from deltafmt.methods import RTN, SVD, BitDelta, DeltaDQ, Method, Residual
from deltafmt.methods.expected import Kept, along_vectors, dropped, some_rows, spread
from deltafmt.methods.factorization import factorize, right_vectors
from deltafmt.methods.grids import Floats
from deltafmt.methods.measured import Heads
from deltafmt.methods.sampling import uniform
from deltafmt.pipeline import losses
from deltafmt.pipeline.budget import default_candidates
from deltafmt.pipeline.losses import foretell, measure
from deltafmt.pipeline.plan import Plan
from deltafmt.terms.nm.codec import NMArrays


@dataclass(frozen=True, slots=True)
class InMemory(PagedTensor):
    """A tensor that no file has."""

    data: bytes = b""

    @contextlib.contextmanager
    def pages(self, start: int, length: int) -> Iterator[memoryview]:
        """Give a view of some bytes."""
        yield memoryview(self.data)[start : start + length]


def plan_of(delta: Floats, base: float = 0.0) -> Plan:
    """Return a plan of a tensor whose base has equal elements."""
    theirs = np.full(delta.shape, base, np.float32)
    tensors = (
        InMemory("w", "F32", side.shape, None, 0, side.nbytes, None, side.tobytes())  # type: ignore[arg-type]
        for side in (theirs + np.asarray(delta, np.float32), theirs)
    )
    return Plan(*tensors, None, undecided=True)


def drawn(delta: Floats, n: int, m: int, share: int, factor: float, seed: int) -> Floats:
    """Drop once, the plain way."""
    rows, columns = delta.shape
    positions = uniform(seed, 0, -(-rows // share), -(-columns // m), n, m)
    mask = np.zeros((len(positions), positions.shape[1] * m), np.bool_)
    at = positions + (np.arange(positions.shape[1]) * m)[None, :, None]
    np.put_along_axis(mask, at.reshape(len(positions), -1), True, axis=1)
    return np.where(mask[np.arange(rows) // share, :columns], delta * np.float32(factor), np.float32(0))


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    group=st.sampled_from([(1, 4), (2, 4), (3, 7), (4, 16), (1, 16), (5, 5)]),
    share=st.sampled_from([1, 2, 4]),
    factor=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_dropout_is_on_average_what_the_formulas_say(
    shape: tuple[int, int], group: tuple[int, int], share: int, factor: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    delta = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    n, m = group
    times = m / n if factor is None else factor
    draws = 400
    found = [drawn(delta, n, m, share, times, seed * draws + i) for i in range(draws)]
    squares = float(np.square(delta, dtype=np.float64).sum())
    along = np.array([float(np.vdot(one, delta)) for one in found])
    energy = np.array([float(np.vdot(one, one)) for one in found])
    a, expected, _ = dropped(n, m, times, Kept(1.0, 1.0), squares)
    variance = spread(delta, n, m, share, times)
    # Five standard errors of the mean; the variance itself is known to a tenth or two, or more where tails are heavy.
    assert abs(along.mean() - a * squares) <= 5 * np.sqrt(variance / draws) + 1e-4 * squares
    assert abs(energy.mean() - expected) <= 5 * energy.std() / np.sqrt(draws) + 1e-4 * squares
    fourth = np.mean((along - along.mean()) ** 4)
    error = np.sqrt(max(fourth - variance**2, 0) / draws)
    assert abs(along.var() - variance) <= 6 * error + 1e-6 * squares**2


def deltas() -> dict[str, Floats]:
    rng = np.random.default_rng(0)
    rough = rng.standard_normal((300, 200)) * np.exp(0.5 * rng.standard_normal((300, 1)))
    heads = rng.standard_normal((256, 3)) @ rng.standard_normal((3, 320)) + rng.standard_normal((256, 320))
    tails = rng.laplace(size=(192, 384))
    return {
        name: (1e-3 * each).astype(np.float32) for name, each in (("rough", rough), ("heads", heads), ("tails", tails))
    }


@pytest.mark.parametrize(("name", "common"), [("rough", 0), ("tails", 0), ("heads", 2)])
def test_what_is_foretold_is_about_what_is_measured(name: str, common: int) -> None:
    plan = plan_of(deltas()[name])
    methods: list[Method | None] = [*default_candidates(), DeltaDQ(4, 16, 4, rescale=False), SVD(bits_per_weight=1.0)]
    foretold = np.array(foretell(plan, [*methods, None], 7, common))
    measured = np.array(measure(plan, [*methods, None], 7, None, common, losses.look_at(plan, methods, common)))
    assert foretold[-1] == measured[-1] == 0
    ratio = foretold[:-1] / measured[:-1]
    worst = int(np.abs(np.log(ratio)).argmax())
    assert 0.75 < ratio[worst] < 1.33, methods[worst]
    assert 0.97 < np.median(ratio) < 1.03


@pytest.mark.parametrize("common", [0, 2])
def test_some_rows_foretell_what_all_rows_do(common: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    strong = rng.standard_normal((2048, 3)) @ rng.standard_normal((3, 640))
    plan = plan_of((1e-3 * (rng.standard_normal((2048, 640)) + strong)).astype(np.float32))
    methods = [DeltaDQ(1, 16, 1), Residual(rank=2), Residual(8, 4, n=5, m=64, bits=1, share=1), RTN(2), BitDelta()]
    monkeypatch.setattr(losses, "SAMPLED_ELEMENTS", 1 << 22)
    every = foretell(plan, methods, 7, common)
    monkeypatch.setattr(losses, "SAMPLED_ELEMENTS", 1 << 17)
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", 50_000)
    np.testing.assert_allclose(foretell(plan, methods, 7, common), every, rtol=0.07)


@pytest.mark.parametrize("changed", [slice(16320, 16384), slice(3000, 3064), slice(8192, 8196), slice(0, 16384, 1024)])
def test_rows_outside_of_an_even_sample_are_not_lossless(changed: slice) -> None:
    """Of an embedding, a few rows were trained: every method was foretold to lose nothing of them."""
    rng = np.random.default_rng(4)
    delta = np.zeros((16384, 512), np.float32)
    few = (1e-3 * rng.standard_normal(delta[changed].shape)).astype(np.float32)
    delta[changed] = few
    methods = [DeltaDQ(2, 32, 1, share=1), DeltaDQ(4, 16, 4), RTN(2), BitDelta("row"), BitDelta(), SVD(energy=0.5)]
    plan, dense = plan_of(delta, 0.02), plan_of(few, 0.02)
    found = np.array(foretell(plan, [*methods, Residual(4, 4, n=1, m=16)], 7))
    assert np.all(found > 0)
    assert found[4] == 1  # a mean over all rows keeps nothing of a few
    expected = np.array(foretell(dense, methods, 7))
    measured = np.array(measure(plan, methods, 7, np.eye(512), 0, losses.look_at(plan, methods, 0)))
    row_wise = [0, 1, 2, 3]
    if few.shape[0] >= 64:
        np.testing.assert_allclose(found[row_wise], expected[row_wise], rtol=0.2)
    assert np.all(measured > 0)


def test_the_rows_that_are_rounded_and_compared_have_energy() -> None:
    """All rows are looked at, but few change; 8 runs of 16 rows are rounded, and every eighth row is compared."""
    rng = np.random.default_rng(5)
    delta = np.zeros((1024, 512), np.float32)
    delta[201:207] = rng.standard_normal(512)  # one direction of the six that six rows can have
    methods = [DeltaDQ(2, 32, 1, share=1), RTN(2)]
    sample = losses.look_at(plan_of(delta), methods, 0)
    assert sample.some_delta.any()
    assert sample.flatness == pytest.approx(1 / 6)
    assert all(loss > 0 for loss in foretell(plan_of(delta), methods, 7, 0, sample))


@pytest.mark.parametrize(("columns", "rows"), [(64, 900), (512, 4000)])
def test_even_deltas_are_looked_at_in_evenly_spaced_rows(columns: int, rows: int) -> None:
    plan = plan_of(normal(3, (rows, columns), "F32").floats())
    sample = losses.look_at(plan, [RTN(2)], 0)
    assert not sample.uneven
    even = losses.sample_runs(rows, columns)
    assert losses.sample_runs(rows, columns, sample.row_squares) == even


def test_any_element_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "SAMPLED_ELEMENTS", 1 << 10)
    delta = normal(0, (512, 40)).floats()
    delta[511, 39] = np.nan
    with pytest.raises(NonFiniteError, match="row 511, column 39"):
        foretell(plan_of(delta), [Residual(rank=2)], 0)


def test_the_rows_that_are_rounded() -> None:
    assert some_rows(40, 100, 1 << 16).tolist() == list(range(40))
    found = some_rows(4096, 4096, 1 << 16)
    assert found.tolist() == list(range(found[0], found[0] + 16))
    found = some_rows(3000, 256, 1 << 16)
    assert len(found) == 256
    assert np.all(np.diff(found) >= 1)
    assert found[0] < 200
    assert found[-1] > 2800


def test_a_delta_of_zeros_loses_nothing() -> None:
    methods: list[Method | None] = [DeltaDQ(), Residual(rank=2), RTN(2), BitDelta()]
    assert foretell(plan_of(np.zeros((40, 64), np.float32)), methods, 0) == [0, 0, 0, 0]


@given(
    shape=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    rank=st.integers(1, 12),
    strong=st.integers(0, 4),
    cuts=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_vectors_of_one_pass_have_nearly_the_energy_of_the_best(
    shape: tuple[int, int], rank: int, strong: int, cuts: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = shape
    delta = 0.1 * rng.standard_normal(shape) + rng.standard_normal((rows, strong)) @ rng.standard_normal(
        (strong, columns)
    )
    delta = delta.astype(np.float32)
    vectors = right_vectors(np.array_split(delta, cuts), rows, columns, rank)
    assert vectors.shape == (min(rank, rows, columns), columns)
    used = vectors[vectors.any(axis=1)]
    np.testing.assert_allclose(used @ used.T, np.eye(len(used)), atol=1e-4)
    best = float(np.square(factorize(delta, rank).values, dtype=np.float64).sum())
    found = float(np.square(delta @ vectors.T, dtype=np.float64).sum())
    # All of the energy of a few strong vectors; of vectors that are all alike, a sketch of one pass has less.
    assert 0.7 * best <= found <= best * (1 + 1e-5)
    if strong >= rank:
        assert found >= 0.98 * best


def test_vectors_of_a_delta_of_few_vectors() -> None:
    rng = np.random.default_rng(0)
    delta = (rng.standard_normal((300, 4)) @ rng.standard_normal((4, 500))).astype(np.float32)
    vectors = right_vectors([delta], 300, 500, 8)
    np.testing.assert_allclose(delta @ vectors[:4].T @ vectors[:4], delta, atol=1e-3)
    assert right_vectors([np.zeros((300, 500), np.float32)], 300, 500, 8).shape == (8, 500)


def test_heads_of_every_rank() -> None:
    delta = deltas()["heads"]
    method = Residual(rank=8)
    sample = losses.look_at(plan_of(delta), [method], 2)
    head = sample.head(method.head_grid)
    left_out = along_vectors(delta, right_vectors([delta], *delta.shape, 8)).head(2).dense()
    assert sample.common == pytest.approx(float(np.vdot(left_out, left_out)), rel=1e-4)
    assert sample.squares == pytest.approx(sample.common + sample.rest)
    for rank in (1, 3, 8, 20):
        dense = head.left[:, :rank] @ head.right[:rank]
        expected = [float(np.vdot(dense, other)) for other in (delta, dense, left_out)]
        np.testing.assert_allclose(head.products(rank), expected, rtol=1e-4)


def test_a_gain_multiplies_scales_and_leaves_codes() -> None:
    seed = 3
    delta = deltas()["tails"]
    rows = losses.read_sample(plan_of(delta))
    for method in (DeltaDQ(3, 16, 1), DeltaDQ(2, 16, 4, share=1), Residual(2, n=1, m=8, bits=2)):
        plain = method.compress(rows, seed)[-1]
        longer = method.with_gain(2.0)
        assert longer is not None
        found = longer.compress(rows, seed)[-1]
        assert isinstance(plain, NMArrays)
        assert isinstance(found, NMArrays)
        np.testing.assert_array_equal(found.codes, plain.codes)
        np.testing.assert_array_equal(found.scales, 2 * plain.scales)
        assert longer.layouts(*delta.shape) == method.layouts(*delta.shape)


@pytest.mark.parametrize(("name", "common", "base"), [("rough", 0, 0.5), ("tails", 0, 0.5), ("heads", 2, 0.05)])
def test_the_gain_of_a_target_loses_the_least(name: str, common: int, base: float) -> None:
    plan = plan_of(deltas()[name], base)
    methods: list[Method | None] = [
        *(DeltaDQ(1, 16, 1), DeltaDQ(1, 64, 2), DeltaDQ(8, 16, 4)),
        *(Residual(4, n=1, m=16, bits=1), Residual(8, 4, n=1, m=64, bits=1)),
    ]
    sample = losses.look_at(plan, methods, common)
    best = losses.tuned(sample, methods)
    least = np.array(foretell(plan, best, 7, common, sample))
    for gain in (0.25, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5, 2.0):
        others = [method and method.with_gain(gain) for method in methods]
        assert np.all(least <= np.array(foretell(plan, others, 7, common, sample)) * 1.002 + 1e-4)
    # One bit shortens what it keeps by a third, and where one of 64 is kept, noise is what costs.
    gains = [method.gain for method in best if isinstance(method, DeltaDQ | Residual)]
    assert (gains[0] or 0) > 1
    assert 0 < (gains[1] or 0) < 1
    plain, fitting = (np.array(measure(plan, some, 7, None, common)) for some in (methods, best))
    assert np.all(fitting <= plain * 1.05)
    assert fitting.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize(
    "method", [DeltaDQ(3, 16, 1, share=1), DeltaDQ(8, 16, 2), Residual(2, n=3, m=16, bits=1), DeltaDQ(16, 16, 2)]
)
def test_what_the_draw_adds_is_what_draws_differ_by(method: Method) -> None:
    plan = plan_of(deltas()["tails"])
    sample = losses.look_at(plan, [method], 0)
    expected = method.expected(sample)
    assert expected is not None
    rows = losses.read_sample(plan)
    heads = Heads(rows.dense(), 2)
    first, second = (method.approximate(rows, seed, heads) for seed in (1, 2))
    # Two draws of one mean differ by twice their variance.
    apart = float(np.square(first - second, dtype=np.float64).sum()) / 2
    assert float(expected.drawn) == pytest.approx(apart, rel=0.05, abs=1e-9)
    # Noise that every draw has weighs more: of all entries at two bits, everything is.
    share = losses._drawn_share(method, sample)
    assert 0 <= share < 1
    assert (share == 0) == (apart == 0)


def test_a_gain_that_the_user_chose_stays() -> None:
    methods: list[Method | None] = [DeltaDQ(1, 16, 1, gain=1.1), RTN(2), None]
    sample = losses.look_at(plan_of(deltas()["rough"]), methods, 0)
    assert losses.tuned(sample, methods) == methods
