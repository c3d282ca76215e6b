"""Uniform grids: the symmetric ones as methods/quantize has them, the asymmetric one against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods import quantize
from deltafmt.methods.grids import Grid
from deltafmt.terms.coding import CODING_GRIDS
from deltafmt.terms.floats import narrow, widen
from strategies import deltas, examples, shapes

SLACK = 2.0**-15


@st.composite
def grids(draw: st.DrawFn, **fixed: object) -> Grid:
    """Give any grid."""
    kind = draw(st.sampled_from(CODING_GRIDS))
    options: dict[str, object] = {
        "bits": draw(st.integers(2 if kind == "midtread" else 1, 8)),
        "kind": kind,
        "rule": draw(st.sampled_from(quantize.SCALE_RULES)),
        "group": draw(st.one_of(st.just(0), st.integers(1, 200))),
        "scale_dtype": draw(st.sampled_from(("BF16", "F32"))),
    }
    return Grid(**{**options, **fixed})  # type: ignore[arg-type]


@examples(80)
@given(grids(), shapes(12, 150), st.data())
def test_a_matrix_is_rounded_to_what_is_stored(grid: Grid, shape: tuple[int, int], data: st.DataObject) -> None:
    matrix = data.draw(deltas(*shape))
    found = grid.quantize(matrix)
    assert found.codes.shape == shape
    assert int(found.codes.max()) <= grid.top
    assert found.scales.shape == (shape[0], grid.groups(shape[1]))
    assert (found.zeros is not None) == (grid.kind == "asymmetric")
    if grid.scale_dtype == "BF16":
        np.testing.assert_array_equal(widen(narrow(found.scales, "BF16"), "BF16"), found.scales)
    if grid.rule == "minmax":
        scale = np.repeat(found.scales.astype(np.float64), grid.size(shape[1]), axis=1)[:, : shape[1]]
        assert (np.abs(found.dense().astype(np.float64) - matrix) <= (0.5 + SLACK) * scale).all()


@examples(60)
@given(grids(), shapes(12, 150), st.data())
def test_rows_do_not_depend_on_each_other(grid: Grid, shape: tuple[int, int], data: st.DataObject) -> None:
    matrix = data.draw(deltas(*shape))
    whole = grid.quantize(matrix)
    for row in (0, shape[0] - 1):
        alone = grid.quantize(matrix[row : row + 1])
        np.testing.assert_array_equal(alone.codes[0], whole.codes[row])
        np.testing.assert_array_equal(alone.scales[0], whole.scales[row])


@pytest.mark.parametrize("kind", ["midtread", "midrise"])
@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
def test_symmetric_grids_are_those_of_the_other_methods(kind: str, rule: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 70), np.float32)
    found = Grid(3, kind, rule, 16).quantize(matrix)
    codes, scales = quantize.quantize(matrix, 3, kind, rule, 16, "BF16")
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales, scales)


def least_asymmetric_error(row: NDArray[np.float32], bits: int) -> float:
    """Search scale and zero point exhaustively."""
    top = 2**bits - 1
    span = float(max(row.max(), 0) - min(row.min(), 0))
    best = np.inf
    for zero in range(top + 1):
        for scale in np.linspace(0.1, 1.6, 400) * span / top:
            codes = np.clip(np.rint(row / scale) + zero, 0, top)
            best = min(best, float((((codes - zero) * scale - row) ** 2).sum()))
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shift", [0.0, 1.0, -3.0])
def test_asymmetric_mse_is_near_an_exhaustive_search(bits: int, shift: float) -> None:
    rng = np.random.default_rng(bits)
    matrix = (rng.standard_normal((8, 96)) + shift).astype(np.float32)
    found = Grid(bits, "asymmetric", "mse", 0, "F32").quantize(matrix)
    error = ((found.dense().astype(np.float64) - matrix) ** 2).sum(axis=1)
    best = np.array([least_asymmetric_error(row, bits) for row in matrix])
    assert error.sum() <= 1.05 * best.sum()
    minmax = Grid(bits, "asymmetric", "minmax", 0, "F32").quantize(matrix)
    assert (error <= ((minmax.dense().astype(np.float64) - matrix) ** 2).sum(axis=1) * (1 + 1e-6)).all()


def test_asymmetric_grids_hold_zero() -> None:
    matrix = np.array([[5.0, 6.0, 7.0, 0.0], [-1, -2, -3, 0]], np.float32)
    dense = Grid(4, "asymmetric").quantize(matrix).dense()
    assert not dense[:, 3].any()


def test_stored_bits_count_scales_and_zero_points() -> None:
    matrix = np.zeros((3, 130), np.float32)
    assert Grid(4, "asymmetric", group=128).quantize(matrix).stored_bits == 3 * (130 * 4 + 2 * (16 + 4))
    assert Grid(2, "midrise", scale_dtype="F32").quantize(matrix).stored_bits == 3 * (130 * 2 + 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits k = 9 is outside 1 to 8"),
        ({"bits": 1}, "a midtread grid of 1 bit"),
        ({"bits": 2, "kind": "log"}, "grid 'log' is not one of"),
        ({"bits": 2, "rule": "best"}, "scale rule 'best' is not one of"),
        ({"bits": 2, "group": -1}, "a scale group of -1 columns"),
        ({"bits": 2, "scale_dtype": "F8"}, "scale dtype 'F8' is not one of"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Grid(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["midtread", "asymmetric"])
def test_a_scale_that_overflows_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="too large"):
        Grid(2, kind).quantize(np.array([[3.4e38, -3.4e38]], np.float32))
