"""Distilled scales of signs: the closed forms against definitions, against plain means, and through the method."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.bitdelta import MEANS, BitDelta
from deltafmt.methods.distill import distilled_columns, distilled_level, distilled_rows, signs
from deltafmt.methods.hessian import output_error
from problems import Floats, layer
from strategies import examples


def decoded(method: BitDelta, delta: Floats, hessian: Floats | None) -> Floats:
    raw = delta.view(np.uint32)
    rows = DeltaRows(raw, "F32", np.zeros_like(raw), "F32", 0, hessian=hessian)
    (arrays,) = method.compress(rows, 0)
    return signs(delta) * arrays.scales.repeat(delta.shape[1] // arrays.scales.shape[1], axis=1) / 2


@examples(20)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(2, 6))
def test_levels_are_of_least_error(seed: int, rows: int, groups: int) -> None:
    delta, hessian = layer(seed, rows, 8 * groups)
    s, h, d = signs(delta).astype(np.float64), hessian.astype(np.float64), delta.astype(np.float64)
    level = distilled_level(delta, hessian, 1.0)
    for other in (0.99 * level, 1.01 * level):
        assert output_error(delta - level * s, h) <= output_error(delta - other * s, h)
    scales = distilled_rows(delta, hessian, np.ones((rows, 1), np.float32), 8 * groups, "F32")[:, 0]
    exact = np.einsum("ij,ij->i", s @ h, d) / np.einsum("ij,ij->i", s @ h, s)
    np.testing.assert_allclose(scales, np.where(exact > 0, 2 * exact, 1), rtol=1e-4)
    levels = distilled_columns(delta, hessian, np.full(8 * groups, level))
    assert (levels >= 0).all()


@pytest.mark.parametrize("mean", MEANS)
def test_outputs_are_closer_than_with_means(mean: str) -> None:
    delta, hessian = layer(0, 24, 64)
    method = BitDelta(mean, 16 if mean == "group" else 128, "F32")
    plain, distilled = (decoded(method, delta, moments) for moments in (None, hessian))
    assert output_error(delta - distilled, hessian) < output_error(delta - plain, hessian)
    # Inputs that have nothing in common, and all the same size, want the means.
    same = decoded(method, delta, np.eye(64, dtype=np.float32))
    np.testing.assert_allclose(same, plain, rtol=1e-4)


def test_moments_that_do_not_fit_are_refused() -> None:
    delta = np.ones((3, 4), np.float32)
    with pytest.raises(UsageError, match="does not fit 4 columns"):
        distilled_level(delta, np.eye(5, dtype=np.float32), 1.0)
    with pytest.raises(NonFiniteError):
        distilled_columns(delta, np.full((4, 4), np.nan, np.float32), np.ones(4))


def test_without_inputs_the_means_stay() -> None:
    delta, nothing = np.ones((3, 4), np.float32), np.zeros((4, 4), np.float32)
    assert distilled_level(delta, nothing, 0.5) == 0.5
    np.testing.assert_array_equal(distilled_columns(delta, nothing, np.full(4, 0.5)), np.full(4, 0.5))
