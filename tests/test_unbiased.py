"""Scales that keep the length of what is quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import RTN, BitDelta
from deltafmt.methods.grids import Grid, Quantized
from deltafmt.methods.unbiased import unbiased_scales
from deltafmt.pipeline import compress
from deltafmt.terms.floats import narrow, widen
from method_files import pair_of, round_trip, true_delta
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


@pytest.mark.parametrize("mean", ["matrix", "row", "column", "group"])
def test_bitdelta_keeps_the_length_of_what_has_a_scale(tmp_path: Path, mean: str) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair).astype(np.float64)
    method = BitDelta(mean, 64 if mean == "group" else 128, "F32", scale="unbiased")
    found = round_trip(pair, tmp_path, method).astype(np.float64)
    starts = np.arange(0, delta.shape[1], 64)
    along = {
        "matrix": lambda x: x.sum(),
        "row": lambda x: x.sum(axis=1),
        "column": lambda x: x.sum(axis=0),
        "group": lambda x: np.add.reduceat(x, starts, axis=1),
    }[mean]
    np.testing.assert_allclose(along(found * delta), along(delta * delta), rtol=1e-4)
    magnitudes = np.abs(found)
    assert len(np.unique(magnitudes.round(6))) <= {"matrix": 1, "row": 75, "column": 203, "group": 75 * 4}[mean] + 1
    with pytest.raises(UsageError, match="scale rule 'minmax' is not one of mean, unbiased"):
        BitDelta(scale="minmax")


@pytest.mark.parametrize(("bits", "grid"), [(1, None), (2, "midrise"), (3, "midtread"), (2, "asymmetric")])
@pytest.mark.parametrize("group", [0, 50])
def test_rtn_keeps_the_length_of_every_group(tmp_path: Path, bits: int, grid: str | None, group: int) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair).astype(np.float64)
    method = RTN(bits, grid, None if bits == 1 else "unbiased", group, "F32")
    assert method.describe().endswith(" unbiased")
    found = round_trip(pair, tmp_path, method).astype(np.float64)
    starts = np.arange(0, delta.shape[1], group or delta.shape[1])
    np.testing.assert_allclose(
        np.add.reduceat(found * delta, starts, axis=1), np.add.reduceat(delta * delta, starts, axis=1), rtol=1e-4
    )
    mse = round_trip(pair, tmp_path, RTN(bits, grid, "mse", group, "F32"))
    assert (np.sign(mse) == np.sign(found)).all()


def test_unbiased_scales_do_not_depend_on_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(tmp_path, (700, 203), "BF16")
    for method in (RTN(1), RTN(2, scale="unbiased"), BitDelta("row", scale="unbiased")):
        found = []
        for elements in (1, 1 << 40):
            monkeypatch.setattr(compress, "BATCH_ELEMENTS", elements)
            deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", method=method, force=True)
            found.append((tmp_path / "d.deltafmt").read_bytes())
        assert found[0] == found[1]
