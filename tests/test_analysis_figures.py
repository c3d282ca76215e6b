"""The figures of an analysis on matrices whose figures are known by hand: norms, products, spectra, histograms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import Raw, raw, write_pair
from deltafmt.analysis.intermediate_results import Products, spread
from deltafmt.analysis.layer_inputs import VECTORS
from deltafmt.analysis.norms import Norms
from deltafmt.analysis.pairs import TensorPair, find_pairs
from deltafmt.analysis.quantized import count, histogram_of, kept_and_quantized
from deltafmt.analysis.spectrum import spectrum_of
from deltafmt.checkpoint.folder import Checkpoint

UP, DOWN = "model.layers.0.up.weight", "model.layers.0.down.weight"


def plus(tensor: Raw, delta: NDArray[Any]) -> Raw:
    return raw(tensor.floats().reshape(tensor.shape) + delta, "F32")


def whole_numbers(seed: int, shape: tuple[int, ...]) -> Raw:
    """Return small whole numbers, which float32 adds and subtracts exactly."""
    return raw(np.random.default_rng(seed).integers(-9, 10, shape), "F32")


def matrix_pair(folder: Path, delta: NDArray[Any]) -> TensorPair:
    base = whole_numbers(0, delta.shape)
    pair = write_pair(folder, {UP: base}, {UP: plus(base, delta)})
    pairs, _ = find_pairs(Checkpoint(pair.base).tensors, Checkpoint(pair.finetuned))
    return pairs[0]


def test_variance_and_range_by_hand() -> None:
    variance, width = spread(np.array([[1, 2, 3], [0, 0, 0]], np.float32), np.array([[1, -1, 2]], np.float32))
    # The products are 1, -2 and 6: their mean is 5/3.
    assert variance == pytest.approx([(4 / 9 + 121 / 9 + 169 / 9) / 3, 0])
    assert width.tolist() == [8, 0]


def test_products_of_normal_inputs(tmp_path: Path) -> None:
    """With x normal, the variance of w x over j is about the mean square of w."""
    pair = matrix_pair(tmp_path, np.full((40, 4000), 0.5))
    found = Products(np.random.default_rng(1).standard_normal((VECTORS, 4000), np.float32), pair.rows)
    for block in pair.blocks():
        found.add(block)
    obj = found.to_obj()
    assert obj["delta"]["mean_variance"] == pytest.approx(0.25, rel=0.02)
    assert obj["base"]["mean_variance"] == pytest.approx(30, rel=0.02)  # (1 + 4 + ... + 81) * 2 / 19
    assert obj["delta"]["mean_range"] < obj["base"]["mean_range"]
    assert obj["delta"]["variance_quantiles"] == sorted(obj["delta"]["variance_quantiles"])


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
@pytest.mark.parametrize("exact", [1024, 4])
def test_a_delta_of_rank_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], exact: int
) -> None:
    monkeypatch.setattr("deltafmt.analysis.spectrum.EXACT", exact)
    delta = np.zeros(shape)
    delta[3, 5], delta[7, 2] = 4, -3
    spectrum = spectrum_of(matrix_pair(tmp_path, delta), 25.0)
    assert spectrum.exact is (exact > 4)
    assert spectrum.values[:2] == pytest.approx([4, 3])
    assert [spectrum.energy[count] for count in (1, 2, 4, 8)] == pytest.approx([16 / 25, 1, 1, 1])
    assert (max(spectrum.energy) >= min(shape)) is spectrum.exact
    assert (spectrum.rank_of(0.5), spectrum.rank_of(0.9), spectrum.stable_rank) == (1, 2, pytest.approx(25 / 16))
    entropy = -(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7))
    assert spectrum.effective_rank == (pytest.approx(math.exp(entropy)) if exact > 4 else None)


def test_singular_values_are_those_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafmt.analysis.pairs.BLOCK_ELEMENTS", 200)  # many blocks
    for number, shape in enumerate([(50, 23), (23, 50)]):
        pair = matrix_pair(tmp_path / str(number), np.random.default_rng(number).integers(-4, 5, shape))
        delta = np.concatenate([block.delta for block in pair.blocks()])
        spectrum = spectrum_of(pair, float(np.square(delta).sum()))
        assert spectrum.values == pytest.approx(np.linalg.svd(delta.astype(float), compute_uv=False), rel=1e-6)
        assert spectrum.energy[16] < 1


def test_a_randomized_spectrum_comes_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On values that fall slowly, as those of a full-parameter delta do, the first hundred are within some percent."""
    monkeypatch.setattr("deltafmt.analysis.spectrum.EXACT", 100)
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.standard_normal((size, 200)))[0] for size in (300, 260))
    values = np.arange(1, 201) ** -0.5
    pair = matrix_pair(tmp_path, left * values @ right.T)
    squares = float((values**2).sum())
    spectrum = spectrum_of(pair, squares)
    assert len(spectrum.values) == 128
    assert spectrum.values[:100] == pytest.approx(values[:100], rel=0.03)
    assert spectrum.energy[64] == pytest.approx((values[:64] ** 2).sum() / squares, rel=0.01)
    assert spectrum.rank_of(0.99) is None


def test_norms_and_a_column_that_stands_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafmt.analysis.pairs.BLOCK_ELEMENTS", 100)
    delta = np.ones((50, 40))
    delta[:, 17] = -20
    pair = matrix_pair(tmp_path, delta)
    norms = Norms()
    for block in pair.blocks():
        norms.add(block)
    base = pair.rows_of(0, 50).base.astype(float)
    assert norms.relative == pytest.approx(math.sqrt((50 * 39 + 50 * 400) / (base**2).sum()))
    assert (norms.outlier_columns, norms.largest, norms.elements) == ([17], 20, 2000)
    assert norms.to_obj()["largest_column_ratio"] == pytest.approx(20 / math.sqrt((39 + 400) / 40))


def test_quantization_by_hand() -> None:
    delta = np.array([[-7, 0.4, 3.6, 7], [14, 1, -1.1, 0]], np.float32)
    kept, quantized = kept_and_quantized(delta, 2, 2, 4, 0)
    assert kept.tolist() == delta.reshape(-1).tolist()
    assert quantized.tolist() == [-7, 0, 4, 7, 14, 0, -2, 0]  # steps of 1 and of 2; ties to even
    assert kept_and_quantized(delta, 2, 2, 2, 0)[1].tolist() == [-7, 0, 7, 7, 14, 0, 0, 0]
    kept, quantized = kept_and_quantized(delta, 1, 3, 8, 0)  # a group reaches beyond the last column
    assert len(kept) == len(quantized) <= 4
    assert set(kept.tolist()) <= set(delta.reshape(-1).tolist())


def test_histograms_count_everything(tmp_path: Path) -> None:
    pair = matrix_pair(tmp_path, np.random.default_rng(3).integers(-5, 6, (300, 32)))
    histogram = histogram_of(pair, 3.0, 4, 16, 4, 0)
    assert histogram.all.sum() == 256 * 32
    assert histogram.kept.sum() == histogram.quantized.sum() == 256 * 8
    counts = count(np.array([-100, 0, 0.001, 6.0, 5.999], np.float32), 1.0)
    assert (counts[0], counts[61], counts[-2], counts[-1], counts.sum()) == (1, 2, 1, 1, 5)
