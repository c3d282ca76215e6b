"""Pruning by magnitude and SparseGPT: against sorting, against its definition, against each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.errors import UsageError
from deltafmt.methods import quantize
from deltafmt.methods.hessian import damp, output_error
from deltafmt.methods.largest import keep_largest, threshold
from deltafmt.methods.sampling import gather
from deltafmt.methods.sparsegpt_solver import sparsegpt
from deltafmt.terms.buffers import blank
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout
from problems import Floats, layer, weighted_error
from strategies import examples, generators, layouts, shapes


def by_magnitude(delta: Floats, layout: NMLayout, rule: str) -> NMArrays:
    positions = keep_largest(delta, layout.n, layout.m, layout.share)
    kept = gather(delta, positions, layout.m, layout.share, np.float32(1))
    codes, scales = quantize.quantize(kept, layout.bits, layout.grid, rule, layout.scale_group, layout.scale_dtype)
    return NMArrays(positions, codes, scales)


@examples(60)
@given(generators(), shapes(20, 90), st.integers(2, 20), st.sampled_from([1, 2, 4, 8]), st.data())
def test_the_largest_of_every_group_are_kept(
    rng: np.random.Generator, shape: tuple[int, int], group: int, share: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, group))
    delta = rng.integers(-3, 4, shape).astype(np.float32)  # with ties
    found = keep_largest(delta, keep, group, share)
    rows, columns = shape
    assert found.shape == (-(-rows // share), -(-columns // group), keep)
    for mask, g in itertools.product(range(found.shape[0]), range(found.shape[1])):
        part = delta[mask * share : (mask + 1) * share, g * group : (g + 1) * group]
        scores = (part**2).sum(axis=0).tolist()
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
        best += range(len(scores), len(scores) + keep - len(best))
        assert found[mask, g].tolist() == sorted(best)


@examples(60)
@given(generators(), shapes(20, 60), st.floats(0, 1))
def test_a_threshold_keeps_exactly_a_share(rng: np.random.Generator, shape: tuple[int, int], density: float) -> None:
    delta = rng.integers(-5, 6, shape).astype(np.float32)
    found = threshold(delta, density)
    magnitude = np.abs(delta).ravel()
    expected = sorted(range(delta.size), key=lambda i: (-magnitude[i], i))[: round(density * delta.size)]
    assert found.tolist() == sorted(expected)


def test_a_density_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"density 1\.5 is outside 0 to 1"):
        threshold(np.ones((2, 2), np.float32), 1.5)


@examples(40)
@given(layouts(index="fixed", max_m=20), shapes(20, 90), generators(), st.sampled_from(quantize.SCALE_RULES))
def test_inputs_that_have_nothing_in_common_give_magnitude(
    layout: NMLayout, shape: tuple[int, int], rng: np.random.Generator, rule: str
) -> None:
    delta = rng.standard_normal(shape, np.float32)
    found = sparsegpt(delta, np.eye(shape[1], dtype=np.float32), layout, rule=rule, block=32).arrays
    expected = by_magnitude(delta, layout, rule)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)
    packed = blank(layout, *shape)
    nm.encode(layout, found, packed)
    nm.check(layout, packed, found, shape[1])


def by_definition(delta: Floats, hessian: Floats, layout: NMLayout) -> Floats:
    """Prune and round a column at a time, the inverse Hessian downdated after each."""
    work = delta.astype(np.float64)
    rows, columns = delta.shape
    inverse = np.linalg.inv(damp(hessian, 0.01)[0])
    # The diagonal of the inverse once the columns before have been taken out, which is diag(U)^2.
    importance, rest = np.zeros(columns), inverse.copy()
    for column in range(columns):
        importance[column] = rest[column, column]
        rest = rest - np.outer(rest[:, column], rest[column]) / rest[column, column]
    first = np.zeros(delta.shape, bool)
    kept = np.zeros(delta.shape, bool)
    for r, start in itertools.product(range(rows), range(0, columns, layout.m)):
        score = delta[r, start : start + layout.m] ** 2 / importance[start : start + layout.m]
        first[r, start + np.argsort(-score)[: layout.n]] = True
    largest = np.where(first, np.abs(delta), 0).max(axis=1, keepdims=True)
    scales = quantize.minmax_scale(largest, layout.bits, layout.grid, layout.scale_dtype)[:, 0]
    result = np.zeros(delta.shape)
    for column in range(columns):
        if column % layout.m == 0:
            part = slice(column, column + layout.m)
            score = work[:, part] ** 2 / importance[part]
            for r in range(rows):
                kept[r, column + np.argsort(-score[r])[: layout.n]] = True
        fields = quantize.assign(work[:, column].astype(np.float32), scales, layout.bits, layout.grid)
        rounded = np.where(kept[:, column], (2 * fields - layout.top) * scales / 2, 0)
        result[:, column] = rounded
        error = (work[:, column] - rounded) / inverse[column, column]
        work[:, column + 1 :] -= np.outer(error, inverse[column, column + 1 :])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result.astype(np.float32)


@pytest.mark.parametrize(("keep", "group", "columns"), [(2, 4, 16), (1, 4, 16), (3, 8, 20)])
@pytest.mark.parametrize("block", [1, 8, 128])
def test_it_is_what_the_definition_says(keep: int, group: int, columns: int, block: int) -> None:
    delta, hessian = layer(2, 6, columns)
    layout = NMLayout(keep, group, 4, "fixed", "midtread")
    found = sparsegpt(delta, hessian, layout, block=block)
    dense = nm.dense(layout, found.arrays, columns)
    np.testing.assert_allclose(dense, by_definition(delta, hessian, layout), atol=1e-6)
    assert found.error == pytest.approx(weighted_error(delta - dense, hessian))
    assert found.damping == 0.01


@examples(30)
@given(st.integers(0, 2**32 - 1), st.integers(20, 90), st.sampled_from([1, 2, 4]), st.integers(2, 5))
def test_it_errs_less_than_magnitude(seed: int, columns: int, share: int, bits: int) -> None:
    delta, hessian = layer(seed, 24, columns)
    layout = NMLayout(4, 16, bits, "fixed", "midrise", share)
    found = sparsegpt(delta, hessian, layout, rule="mse", block=32)
    magnitude = nm.dense(layout, by_magnitude(delta, layout, "mse"), columns)
    assert found.error <= output_error(delta - magnitude, hessian)


@pytest.mark.parametrize("scale_group", [0, 8, 6])
@pytest.mark.parametrize("share", [1, 4])
def test_refitted_scales_err_less_each_time(scale_group: int, share: int) -> None:
    delta, hessian = layer(11, 20, 70)
    layout = NMLayout(4, 16, 2, "fixed", "midrise", share, scale_group=scale_group)
    found = [sparsegpt(delta, hessian, layout, rule="mse", refits=count) for count in range(4)]
    errors = [one.error for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]
    for one in found:
        dense = nm.dense(layout, one.arrays, 70)
        assert one.error == pytest.approx(weighted_error(delta - dense, hessian))
        np.testing.assert_array_equal(one.arrays.positions, found[0].arrays.positions)
