"""Expected losses: the formulas are the means of many draws, and about what packing loses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import normal
from deltafmt.methods import RTN, SVD, BitDelta, DeltaDQ, Method, Residual
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.expected import Kept, Sampled, dropped, some_rows, spread
from deltafmt.methods.factorization import factorize, sketched
from deltafmt.methods.grids import Floats
from deltafmt.methods.sampling import uniform
from deltafmt.pipeline import losses
from deltafmt.pipeline.budget import default_candidates
from deltafmt.pipeline.losses import foretell, measure


def rows_of(delta: Floats) -> DeltaRows:
    bits = np.ascontiguousarray(delta, np.float32).view(np.uint32)
    return DeltaRows(bits, "F32", np.zeros_like(bits), "F32", 0)


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
def test_what_is_foretold_is_about_what_is_measured(name: str, common: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(deltas()[name])
    monkeypatch.setattr(losses, "read_sample", lambda _: rows)
    methods: list[Method | None] = [*default_candidates(), DeltaDQ(4, 16, 4, rescale=False), SVD(bits_per_weight=1.0)]
    foretold = np.array(foretell(None, [*methods, None], 7, common))  # type: ignore[arg-type]
    measured = np.array(measure(None, [*methods, None], 7, None, common))  # type: ignore[arg-type]
    assert foretold[-1] == measured[-1] == 0
    ratio = foretold[:-1] / measured[:-1]
    worst = int(np.abs(np.log(ratio)).argmax())
    assert 0.8 < ratio[worst] < 1.25, methods[worst]
    assert 0.97 < np.median(ratio) < 1.03


def test_the_rows_that_are_rounded() -> None:
    assert some_rows(40, 100).tolist() == list(range(40))
    found = some_rows(4096, 4096)
    assert found.tolist() == list(range(found[0], found[0] + 16))
    found = some_rows(3000, 256)
    assert len(found) == 256
    assert np.all(np.diff(found) >= 1)
    assert found[0] < 200
    assert found[-1] > 2800


def test_a_delta_of_zeros_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(np.zeros((40, 64), np.float32))
    monkeypatch.setattr(losses, "read_sample", lambda _: rows)
    methods: list[Method | None] = [DeltaDQ(), Residual(rank=2), RTN(2), BitDelta()]
    assert foretell(None, methods, 0) == [0, 0, 0, 0]  # type: ignore[arg-type]


def test_a_sketch_has_nearly_the_energy_of_the_best_vectors() -> None:
    delta = normal(3, (600, 500)).floats() + 4 * np.outer(np.arange(600), np.ones(500)).astype(np.float32) / 600
    best, quick = (np.square(of(delta, 16).values, dtype=np.float64).sum() for of in (factorize, sketched))
    assert 0.97 * best <= quick <= best * (1 + 1e-6)


def test_heads_of_every_rank() -> None:
    delta = deltas()["heads"]
    sample = Sampled(rows_of(delta), 8, 2)
    method = Residual(rank=8)
    head = sample.head(method.head_grid)
    left_out = sample.factors.head(2).dense()
    assert sample.common == pytest.approx(float(np.vdot(left_out, left_out)), rel=1e-4)
    assert sample.squares == pytest.approx(sample.common + sample.rest)
    for rank in (1, 3, 8, 20):
        dense = head.left[:, :rank] @ head.right[:rank]
        expected = [float(np.vdot(dense, other)) for other in (delta, dense, left_out)]
        np.testing.assert_allclose(head.products(rank), expected, rtol=1e-4)
