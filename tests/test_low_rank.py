"""Singular vectors, bands of them, and the head of a sum: energies, budgets, errors against the full decomposition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.methods import factorization
from deltafmt.methods.bands import band_grid, dense, fill, quantize_bands, search_bands
from deltafmt.methods.factorization import factorize, rank_for_energy
from deltafmt.methods.grids import Grid
from deltafmt.methods.hessian import output_error
from deltafmt.methods.residual import split_head
from deltafmt.methods.vectors import coding_of, vector_bytes
from deltafmt.terms.lowrank.layout import LowRankLayout
from problems import Floats, layer, weighted_error
from strategies import examples, shapes


def decaying(seed: int, rows: int, columns: int, power: float = 0.7) -> Floats:
    """Return a matrix whose singular values fall as those of deltas do."""
    rng = np.random.default_rng(seed)
    least = min(rows, columns)
    left, _ = np.linalg.qr(rng.standard_normal((rows, least)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, least)))
    return ((left * np.arange(1.0, least + 1) ** -power) @ right.T).astype(np.float32)


@examples(30)
@given(st.integers(0, 2**32 - 1), shapes(40, 60), st.integers(0, 70))
def test_the_error_is_the_energy_that_is_left_out(seed: int, shape: tuple[int, int], rank: int) -> None:
    delta = np.random.default_rng(seed).standard_normal(shape, np.float32)
    found = factorize(delta, rank)
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    assert found.values.size == min(rank, *shape)
    np.testing.assert_allclose(found.values, values[:rank], rtol=1e-4, atol=1e-5)
    left_out = (values[rank:] ** 2).sum()
    assert ((found.dense() - delta) ** 2).sum() == pytest.approx(left_out, rel=1e-3, abs=1e-6)
    a, b = found.balanced()
    np.testing.assert_allclose(a @ b, found.dense(), atol=1e-4)
    np.testing.assert_allclose((a**2).sum(axis=0), (b**2).sum(axis=1), rtol=1e-3)
    assert (found.left.max(axis=0, initial=0) >= -found.left.min(axis=0, initial=0) - 1e-6).all()


def test_the_randomized_decomposition_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = decaying(1, 300, 200)
    exact = factorize(delta, 24)
    monkeypatch.setattr(factorization, "EXACT_SIZE", 100)
    found = factorize(delta, 24)
    again = factorize(delta, 24)
    np.testing.assert_allclose(found.values, exact.values, rtol=5e-3)
    errors = [float(((one.dense() - delta) ** 2).sum()) for one in (found, exact)]
    assert errors[0] <= 1.005 * errors[1]
    for one, other in ((found.left, again.left), (found.values, again.values), (found.right, again.right)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_weighted_factors_err_least_at_the_outputs(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorization, "DAMPING", 0.0)
    delta, hessian = layer(2, 30, 20, tokens=100)
    found = factorize(delta, rank, hessian=hessian)
    error = weighted_error(delta - found.dense(), hessian)
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    root = (vectors * np.sqrt(values)) @ vectors.T
    least = (np.linalg.svd(delta @ root, compute_uv=False)[rank:] ** 2).sum()
    assert error == pytest.approx(least, rel=1e-3)
    assert error < weighted_error(delta - factorize(delta, rank).dense(), hessian)


def test_weighting_bears_singular_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without damping the first factorization fails.
    monkeypatch.setattr(factorization, "DAMPING", 0.0)
    delta, _ = layer(3, 9, 12)
    inputs = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    assert np.isfinite(factorize(delta, 3, hessian=inputs.T @ inputs).dense()).all()
    plain, weighted = factorize(delta, 3), factorize(delta, 3, hessian=np.zeros((12, 12), np.float32))
    np.testing.assert_allclose(weighted.dense(), plain.dense(), atol=1e-4)


@examples(50)
@given(st.lists(st.floats(0, 10), max_size=20), st.floats(0, 1))
def test_rank_for_energy_is_the_smallest(values: list[float], share: float) -> None:
    falling = np.sort(np.array(values, np.float64))[::-1]
    rank = rank_for_energy(falling, share)
    total = (falling**2).sum()
    assert (falling[:rank] ** 2).sum() >= share * total * (1 - 1e-9)
    assert rank == 0 or (falling[: rank - 1] ** 2).sum() < share * total


def test_what_cannot_be_factorized_is_refused() -> None:
    with pytest.raises(UsageError, match="rank -1 is negative"):
        factorize(np.ones((2, 2), np.float32), -1)
    with pytest.raises(NonFiniteError, match="not finite"):
        factorize(np.full((2, 2), np.inf, np.float32), 1)
    with pytest.raises(UsageError, match="outside 0 to 1"):
        rank_for_energy(np.ones(3), 1.5)


COME = Grid(2, "asymmetric", "minmax", 128)


@examples(100)
@given(
    shapes(70, 300),
    st.lists(st.tuples(st.none() | st.integers(0, 40), st.integers(1, 8)), min_size=1, max_size=4),
    st.integers(0, 20000),
)
def test_bands_fill_a_budget(shape: tuple[int, int], widths: list[tuple[int | None, int]], budget: int) -> None:
    def cost(bits: int) -> int:
        return vector_bytes(coding_of(band_grid(COME, bits)), *shape)

    found = fill(widths, min(shape), budget, cost)
    assert all(count > 0 for count, _ in found)
    count = sum(count for count, _ in found)
    assert count <= min(shape)
    spent = 0
    for band in quantize_bands(factorize(decaying(0, *shape), count), found, COME):
        layout = LowRankLayout(band.right.codes.shape[0], coding_of(band.right.grid))
        stored = sum(layout.buffer_lengths(*shape).values())
        assert 8 * stored >= band.stored_bits
        spent += stored
    assert spent == sum(number * cost(bits) for number, bits in found) <= budget
    if count < min(shape) and widths[-1][0] is None:
        assert spent + cost(widths[-1][1]) > budget


def test_bands_sum_to_the_delta() -> None:
    delta = decaying(4, 90, 130)
    factors = factorize(delta, 90)
    bands = quantize_bands(factors, [(2, 8), (20, 8), (68, 8)], COME)
    total = dense(bands, delta.shape)
    assert ((total - delta) ** 2).sum() <= 1e-3 * (delta**2).sum()
    np.testing.assert_allclose(total, sum(band.dense() for band in bands), atol=1e-6)
    # The first band is the first vectors, alone.
    head = quantize_bands(factors.head(2), [(2, 8)], COME)[0]
    np.testing.assert_array_equal(bands[0].left.codes, head.left.codes)
    np.testing.assert_array_equal(bands[0].right.codes, head.right.codes)
    assert not dense([], (3, 4)).any()


@pytest.mark.parametrize("kind", ["asymmetric", "midrise"])
def test_calibrated_bands_err_less_at_the_outputs(kind: str) -> None:
    _, hessian = layer(5, 1, 120)
    delta = decaying(5, 100, 120)
    grid = Grid(2, kind, "mse", 64)
    factors = factorize(delta, 60)
    widths = [(2, 8), (20, 3), (38, 2)]
    nearest = dense(quantize_bands(factors, widths, grid), delta.shape)
    solved = dense(quantize_bands(factors, widths, grid, hessian=hessian), delta.shape)
    refitted = quantize_bands(factors, widths, grid, hessian=hessian, delta=delta)
    errors = [output_error(delta - found, hessian) for found in (nearest, solved, dense(refitted, delta.shape))]
    assert errors[2] < errors[1] < errors[0]


def test_one_bit_is_a_sign() -> None:
    band = quantize_bands(factorize(decaying(9, 20, 30), 5), [(5, 1)], COME)[0]
    assert band.left.grid.kind == band.right.grid.kind == "midrise"
    assert len(np.unique(np.abs(band.right.dense()[0]))) == 1


def test_refitting_helps_without_calibration() -> None:
    delta = decaying(6, 100, 120)
    factors = factorize(delta, 60)
    widths = [(4, 8), (56, 2)]
    grid = Grid(2, "midrise", "mse", 64)
    plain = dense(quantize_bands(factors, widths, grid), delta.shape)
    refitted = dense(quantize_bands(factors, widths, grid, delta=delta), delta.shape)
    assert ((refitted - delta) ** 2).sum() < ((plain - delta) ** 2).sum()


def test_more_vectors_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match="bands of 9 vectors where there are 5"):
        quantize_bands(factorize(decaying(0, 5, 8), 5), [(2, 8), (7, 2)], COME)


def test_the_search_finds_the_best_counts_again_and_again() -> None:
    seen: list[tuple[int, ...]] = []

    def loss(counts: tuple[int, ...]) -> float:
        seen.append(counts)
        return float(sum((count - wanted) ** 2 for count, wanted in zip(counts, (3, 12, 40), strict=True)))

    bits, costs = (8, 3, 2), (80, 30, 20)
    budget = 3 * 80 + 12 * 30 + 40 * 20
    best, found = search_bands(loss, bits, costs, budget, 64, seed=3)
    assert len(seen) == len(set(seen))
    assert all(sum(c * n for c, n in zip(costs, counts, strict=True)) <= budget for counts in seen)
    assert all(sum(counts) <= 64 for counts in seen)
    assert found <= 2
    assert search_bands(loss, bits, costs, budget, 64, seed=3) == (best, found)
    assert search_bands(loss, bits, costs, budget, 64, start=[(3, 12, 0)])[1] == 0
    assert search_bands(lambda _: float("nan"), bits, costs, budget, 64, generations=2)[1] == np.inf
    with pytest.raises(UsageError, match="3 widths and 2 costs"):
        search_bands(loss, bits, costs[:2], budget, 64)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_head_and_its_residual_make_the_delta(weighted: bool) -> None:
    delta, hessian = layer(7, 40, 30)
    band, residual = split_head(delta, 8, hessian=hessian if weighted else None)
    assert band.left.codes.shape == (8, 40)
    np.testing.assert_allclose(band.dense() + residual, delta, atol=1e-5)
    if not weighted:
        best = factorize(delta, 8)
        assert (residual**2).sum() <= 1.01 * ((delta - best.dense()) ** 2).sum()
    whole, nothing = split_head(decaying(8, 5, 4), 9)
    assert whole.right.codes.shape == (4, 4)
    assert np.abs(nothing).max() < 0.02
