"""GPTQ against its definition: one column at a time with the inverse Hessian downdated, on tiny and on ragged sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.methods.gptq_solver import gptq, gptq_columns
from deltafmt.methods.grids import Grid
from deltafmt.methods.hessian import damp, inverse_factor, output_error
from deltafmt.methods.refit import refit_scales
from deltafmt.terms.floats import narrow, widen
from problems import Floats, layer, weighted_error
from strategies import examples, shapes


def by_definition(weights: Floats, hessian: Floats, grid: Grid, order: NDArray[np.intp]) -> Floats:
    """Round columns in order; after each, update the others by eq. 2 and the inverse Hessian by eq. 3 (OBQ)."""
    work = weights.astype(np.float64)
    inverse = np.linalg.inv(damp(hessian, 0.01)[0])
    steps = grid.fit(weights)
    scales, zeros = steps.spread(weights.shape[1], grid)
    rounded = np.zeros_like(weights)
    for number, column in enumerate(order):
        zero = None if zeros is None else zeros[:, column]
        codes = grid.assign(work[:, column].astype(np.float32), scales[:, column], zero)
        rounded[:, column] = grid.values(codes, scales[:, column], zero)
        error = (work[:, column] - rounded[:, column]) / inverse[column, column]
        later = order[number + 1 :]
        work[:, later] -= np.outer(error, inverse[column, later])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return rounded


@pytest.mark.parametrize("kind", ["midtread", "midrise", "asymmetric"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_it_is_what_the_definition_says(kind: str, act_order: bool, block: int) -> None:
    weights, hessian = layer(1, 5, 12)
    grid = Grid(3, kind)
    order = np.argsort(-np.diagonal(hessian), kind="stable") if act_order else np.arange(12)
    found = gptq(weights, hessian, grid, act_order=act_order, block=block)
    np.testing.assert_allclose(found.quantized.dense(), by_definition(weights, hessian, grid, order), atol=1e-6)
    assert found.damping == 0.01
    assert found.error == pytest.approx(weighted_error(weights - found.quantized.dense(), hessian))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", ["midtread", "midrise", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_diagonal_hessian_is_rounding_to_nearest(bits: int, kind: str, act_order: bool) -> None:
    rng = np.random.default_rng(bits)
    weights = rng.standard_normal((6, 50), np.float32)
    hessian = np.diag(rng.random(50).astype(np.float32) + 0.1)
    grid = Grid(bits, kind, "mse", 16)
    found = gptq(weights, hessian, grid, act_order=act_order, block=20).quantized
    expected = grid.quantize(weights)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


@examples(40)
@given(
    st.integers(0, 2**32 - 1),
    shapes(20, 90),
    st.integers(2, 4),
    st.sampled_from([0, 8, 24, 40]),
    st.booleans(),
    st.sampled_from(["midrise", "asymmetric"]),
)
def test_it_errs_less_than_rounding_to_nearest(
    seed: int, shape: tuple[int, int], bits: int, group: int, act_order: bool, kind: str
) -> None:
    weights, hessian = layer(seed, *shape)
    grid = Grid(bits, kind, "mse", group)
    found = gptq(weights, hessian, grid, act_order=act_order, block=32)
    nearest = output_error(weights - grid.quantize(weights).dense(), hessian)
    # Greedy as it is, it may lose where there is little to make up for; never by much.
    assert found.error <= (1.0 if shape[1] > 16 and shape[0] > 4 else 1.6) * nearest
    scales = found.quantized.scales
    assert scales.shape == (shape[0], grid.groups(shape[1]))


@pytest.mark.parametrize("group", [0, 5, 8, 64])
def test_the_block_does_not_matter(group: int) -> None:
    weights, hessian = layer(3, 7, 61)
    grid = Grid(3, "midrise", "mse", group)
    one = gptq(weights, hessian, grid, block=1)
    for block in (7, 16, 128):
        other = gptq(weights, hessian, grid, block=block)
        # Sums in another order may tip a tie.
        assert (one.quantized.codes != other.quantized.codes).mean() < 0.02
        assert other.error == pytest.approx(one.error, rel=0.05)


def test_columns_without_inputs_are_rounded_to_nearest() -> None:
    weights, hessian = layer(4, 6, 30)
    dead = [0, 13, 29]
    hessian[dead] = 0
    hessian[:, dead] = 0
    grid = Grid(4, "midrise")
    for act_order in (False, True):
        found = gptq(weights, hessian, grid, act_order=act_order).quantized
        np.testing.assert_array_equal(found.codes[:, dead], grid.quantize(weights).codes[:, dead])
    nothing = gptq(weights, np.zeros_like(hessian), grid)
    np.testing.assert_array_equal(nothing.quantized.codes, grid.quantize(weights).codes)
    assert nothing.error == 0


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    weights, _ = layer(5, 4, 40)
    inputs = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    hessian = inputs.T @ inputs
    found = gptq(weights, hessian, Grid(3), damping=0.0)
    assert found.damping > 0
    assert np.isfinite(found.error)
    assert gptq(weights, hessian, Grid(3)).damping == 0.01


def test_scales_down_the_columns() -> None:
    weights, hessian = layer(6, 300, 4)
    found = gptq_columns(weights, hessian, Grid(3, "asymmetric", group=128))
    assert found.quantized.codes.shape == (4, 300)
    assert found.quantized.scales.shape == (4, 3)
    nearest = Grid(3, "asymmetric", group=128).quantize(np.ascontiguousarray(weights.T)).dense().T
    assert found.error < output_error(weights - nearest, hessian)
    assert found.error == pytest.approx(weighted_error(weights - found.quantized.dense().T, hessian))
    # Inputs that have nothing in common, in the columns' own order and in another.
    for diagonal in ([1, 1, 1, 1], [1, 3, 2, 4]):
        flat = gptq_columns(weights, np.diag(diagonal).astype(np.float32), Grid(3, group=128))
        nearest = Grid(3, group=128).quantize(np.ascontiguousarray(weights.T)).codes
        np.testing.assert_array_equal(flat.quantized.codes, nearest)


@pytest.mark.parametrize("kind", ["midrise", "asymmetric"])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("act_order", [False, True])
def test_refitted_scales_err_less_each_time(kind: str, group: int, act_order: bool) -> None:
    weights, hessian = layer(9, 12, 60)
    grid = Grid(2, kind, "mse", group)
    found = [gptq(weights, hessian, grid, act_order=act_order, refits=count) for count in range(4)]
    errors = [one.error for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]
    for one in found:
        assert one.error == pytest.approx(weighted_error(weights - one.quantized.dense(), hessian))
        scales = one.quantized.scales
        np.testing.assert_array_equal(widen(narrow(scales, "BF16"), "BF16"), scales)


def test_refitted_scales_are_those_of_least_squares() -> None:
    weights, hessian = layer(10, 3, 14)
    levels = np.random.default_rng(0).integers(-3, 4, (3, 14)).astype(np.float32)
    levels[2] = -10 * weights[2]  # whose best scale is negative
    groups = [(levels[:, :8], slice(0, 8)), (levels[:, 8:], slice(8, 14))]
    root = np.linalg.cholesky(hessian.astype(np.float64))
    scales = refit_scales(weights, hessian, groups, np.full((3, 2), 7, np.float32), "F32")
    for row in range(3):
        terms = np.zeros((2, 14))
        terms[0, :8], terms[1, 8:] = levels[row, :8], levels[row, 8:]
        best = np.linalg.lstsq((terms @ root).T, weights[row] @ root, rcond=None)[0]
        expected = best if (best > 0).all() else np.full(2, 7)
        np.testing.assert_allclose(scales[row], expected, rtol=1e-4)
    assert (scales[2] == 7).all()
    empty = refit_scales(weights, hessian, [(0 * levels, slice(0, 14))], np.ones((3, 1), np.float32), "BF16")
    assert (empty == 1).all()


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = layer(7, 1, 25)
    factor = inverse_factor(hessian, 0.02)
    upper = factor.upper.astype(np.float64)
    np.testing.assert_allclose(upper.T @ upper @ damp(hessian, 0.02)[0], np.eye(25), atol=1e-4)
    assert not np.tril(upper, -1).any()
    assert (np.diagonal(upper) > 0).all()


def test_wrong_hessians_are_refused() -> None:
    weights, hessian = layer(8, 3, 10)
    with pytest.raises(UsageError, match=r"a hessian of shape \[9, 9\] does not fit 10 columns"):
        gptq(weights, hessian[:9, :9], Grid(3))
    with pytest.raises(UsageError, match="not positive semidefinite"):
        inverse_factor(np.array([[1, 1e9], [1e9, 1]], np.float32))
    with pytest.raises(UsageError, match=r"damping -0\.1 is negative"):
        gptq(weights, hessian, Grid(3), damping=-0.1)
    with pytest.raises(UsageError, match="a block of 0 columns"):
        gptq(weights, hessian, Grid(3), block=0)
    hessian[2, 3] = np.nan
    with pytest.raises(NonFiniteError, match="the hessian is not finite"):
        gptq(weights, hessian, Grid(3))
