"""Scales that keep the length of what is quantized."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.codecs.floats import narrow, widen
from deltafmt.methods.grids import Grid, Quantized
from deltafmt.methods.unbiased import unbiased_scales
from strategies import examples, generators, shapes


@examples(60)
@given(generators(), shapes(20, 150), st.integers(1, 4), st.one_of(st.just(0), st.integers(4, 100)))
def test_the_length_along_the_values_is_kept(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, group: int
) -> None:
    values = rng.standard_normal(shape, np.float32)
    grid = Grid(bits, "midrise", "mse", group, "F32")
    found = grid.quantize(values)
    size = grid.size(shape[1])
    scales = unbiased_scales(values, found.dense(), found.scales, size, "F32")
    decoded = Quantized(grid, found.codes, scales).dense()
    for start in range(0, shape[1], size):
        x, q = values[:, start : start + size], decoded[:, start : start + size]
        np.testing.assert_allclose((x * q).sum(axis=1), (x * x).sum(axis=1), rtol=1e-4)


def test_one_bit_is_the_sum_of_squares_over_the_sum_of_magnitudes() -> None:
    values = np.array([[1, -3, 2, 0.5, np.nan]], np.float32)
    signs = np.where(values < 0, -1, 1).astype(np.float32)
    found = unbiased_scales(values, 0.5 * signs, np.ones((1, 1), np.float32), 5, "F32")
    assert found[0, 0] == pytest.approx((14.25 / 6.5) / 0.5)


def test_a_group_with_nothing_to_restore_is_left_as_it_is() -> None:
    values = np.array([[0, 0, 1, 2, 100, 1], [0, 0, 0, 0, 0, 0]], np.float32)
    decoded = np.array([[0, 0, -1, 0, 0, 1], [1, 1, 1, 1, 1, 1]], np.float32)
    scales = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(unbiased_scales(values, decoded, scales, 2, "BF16"), scales)


def test_scales_are_of_their_dtype() -> None:
    values = np.random.default_rng(0).standard_normal((9, 64), np.float32)
    grid = Grid(2, "midrise", "mse")
    found = grid.quantize(values)
    scales = unbiased_scales(values, found.dense(), found.scales, 64, "BF16")
    np.testing.assert_array_equal(widen(narrow(scales, "BF16"), "BF16"), scales)
    assert (scales > found.scales).all()
