"""Scales and codes of kept entries: the error bounds of both rules, the method as a whole, the compiled loops."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.methods import DeltaDQ, quantize
from deltafmt.methods.base import DeltaRows
from deltafmt.terms.buffers import blank
from deltafmt.terms.floats import narrow, subtract, widen
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import BITS, NMLayout
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from strategies import deltas, examples, generators, layouts, ordinary_raws, shapes, sizes

GRIDS = [(bits, grid) for bits in BITS for grid in ("midtread", "midrise") if (bits, grid) != (1, "midtread")]
# float32 arithmetic on up to 2**7 steps of 2**-24 relative error each leaves this fraction of a scale.
SLACK = 2.0**-15


@st.composite
def kept_entries(draw: st.DrawFn) -> NDArray[np.float32]:
    """Give kept entries as gather does: NaN marks what lies beyond the last column, at the end of every row."""
    rows, entries = draw(shapes(20, 200))
    kept = draw(deltas(rows, entries))
    beyond = draw(st.integers(0, min(entries - 1, 10)))
    if beyond:
        rng = draw(generators())
        kept[:, -beyond:][rng.random((rows, beyond)) < 0.5] = np.nan
    return kept


def levels(fields: NDArray[np.uint8], bits: int, grid: str) -> NDArray[np.float64]:
    """Return the levels of fields, in units of the scale, from the design's two formulas."""
    signed = fields.astype(np.float64)
    return signed - (2 ** (bits - 1) - 1) if grid == "midtread" else (2 * signed - (2**bits - 1)) / 2


def spread(scales: NDArray[np.float32], entries: int, scale_group: int) -> NDArray[np.float64]:
    """Return the scale of every entry."""
    return np.repeat(scales.astype(np.float64), min(scale_group, entries) or entries, axis=1)[:, :entries]


def squared_error(kept: NDArray[np.float32], bits: int, grid: str, rule: str) -> NDArray[np.float64]:
    """Quantize rows with one float32 scale each and return their squared errors."""
    fields, scales = quantize.quantize(kept, bits, grid, rule, 0, "F32")
    return ((levels(fields, bits, grid) * scales - kept) ** 2).sum(axis=1)


def least_squared_error(row: NDArray[np.float32], bits: int, grid: str) -> float:
    """Search the scale of least squared error exhaustively, in float64."""
    half = 2 ** (bits - 1)
    largest = float(np.abs(row).max()) / (half - 1 if grid == "midtread" else half - 0.5)
    candidates = np.linspace(0.02, 1.1, 600)[:, None] * largest
    steps = row.astype(np.float64) / candidates
    if grid == "midtread":
        steps = np.clip(np.rint(steps), 1 - half, half - 1)
    else:
        steps = np.clip(np.floor(steps), -half, half - 1) + 0.5
    return float(((steps * candidates - row) ** 2).sum(axis=1).min())


@examples(120)
@given(
    kept_entries(),
    st.sampled_from(GRIDS),
    st.one_of(st.just(0), st.integers(1, 300)),
    st.sampled_from(["BF16", "F32"]),
)
def test_minmax_errs_by_half_a_scale_at_most(
    kept: NDArray[np.float32], kind: tuple[int, str], scale_group: int, scale_dtype: str
) -> None:
    bits, grid = kind
    fields, scales = quantize.quantize(kept, bits, grid, "minmax", scale_group, scale_dtype)
    inside = ~np.isnan(kept)
    assert fields.dtype == np.uint8
    assert fields.shape == kept.shape
    assert int(fields.max()) <= NMLayout(1, 2, bits, grid=grid).top
    assert not fields[~inside].any()
    assert (scales >= 0).all()
    if scale_dtype == "BF16":
        np.testing.assert_array_equal(widen(narrow(scales, "BF16"), "BF16"), scales)
    scale = spread(scales, kept.shape[1], scale_group)
    error = np.abs(levels(fields, bits, grid) * scale - kept)
    assert (error[inside] <= (0.5 + SLACK) * scale[inside]).all()
    # A scale is no larger than the largest magnitude asks for, up to one step of its dtype.
    count = -(-kept.shape[1] // (scale_group or kept.shape[1]))
    assert scales.shape == (kept.shape[0], count)
    for g in range(count):
        size = scale_group or kept.shape[1]
        cell = np.nan_to_num(kept[:, g * size : (g + 1) * size], nan=0.0)
        largest = np.abs(cell).max(axis=1).astype(np.float64)
        reach = largest / (2 ** (bits - 1) - (1 if grid == "midtread" else 0.5))
        assert (scales[:, g] <= np.where(largest > 0, np.maximum(reach * 1.0079, 2.0**-126), 0)).all()


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_minmax_takes_the_nearest_level(bits: int, grid: str) -> None:
    rng = np.random.default_rng(bits)
    kept = rng.standard_normal((4, 50), np.float32)
    fields, scales = quantize.quantize(kept, bits, grid, "minmax", 0, "F32")
    every = levels(np.arange(NMLayout(1, 2, bits, grid=grid).top + 1).astype(np.uint8), bits, grid)
    assert np.array_equal(every, -every[::-1])
    best = np.abs(every * scales[:, :, None] - kept[:, :, None]).min(axis=2)
    error = np.abs(levels(fields, bits, grid) * scales - kept)
    assert (error <= best + SLACK * scales).all()


def rows_like(kind: str, entries: int) -> NDArray[np.float32]:
    """Draw 12 rows of one distribution."""
    rng = np.random.default_rng(entries)
    shape = (12, entries)
    values = {
        "normal": rng.standard_normal(shape),
        "laplace": rng.laplace(size=shape),
        "mostly zero": rng.standard_normal(shape) * (rng.random(shape) < 0.3),
        "uniform": rng.uniform(-1, 1, shape),
    }[kind]
    return (values * 0.01).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "laplace", "mostly zero", "uniform"])
@pytest.mark.parametrize(("bits", "grid"), [kind for kind in GRIDS if kind[0] <= 4])
def test_mse_is_near_an_exhaustive_search(bits: int, grid: str, kind: str) -> None:
    kept = rows_like(kind, 200)
    best = np.array([least_squared_error(row, bits, grid) for row in kept])
    found = squared_error(kept, bits, grid, "mse")
    # A few percent: a row may rest in a valley beside the lowest, the rows together may not.
    assert found.sum() <= 1.03 * best.sum()
    assert (found <= 1.15 * best).all()


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_mse_errs_no_more_than_minmax(bits: int, grid: str) -> None:
    ratios = {}
    for kind in ("normal", "laplace", "mostly zero", "uniform"):
        kept = rows_like(kind, 1000)
        ratios[kind] = squared_error(kept, bits, grid, "mse").sum() / squared_error(kept, bits, grid, "minmax").sum()
    assert max(ratios.values()) <= 1 + 1e-6, ratios


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
@pytest.mark.parametrize(("bits", "grid"), GRIDS)
@pytest.mark.parametrize("exponent", [-149, -140, -126, -101, -99, 0, 100])
def test_rows_of_one_magnitude(bits: int, grid: str, rule: str, exponent: int) -> None:
    value = np.float32(2.0**exponent)
    kept = np.array([[value, -value, value], [0, 0, 0]], np.float32)
    fields, scales = quantize.quantize(kept, bits, grid, rule, 0, "F32")
    assert scales[1, 0] == 0
    decoded = levels(fields, bits, grid) * scales
    assert not decoded[1].any()
    limit = max(float(value) * 2.0**-20, 2.0**-126 / 2)
    assert (np.abs(decoded[0] - kept[0]) <= limit).all()


@pytest.mark.parametrize(
    ("bits", "grid", "value", "rule"),
    [
        (1, "midrise", 3e38, "minmax"),  # whose least-squares scale, twice the mean, does not overflow
        (2, "midtread", 3.4e38, "minmax"),
        (2, "midtread", 3.4e38, "mse"),
        (2, "midrise", np.inf, "minmax"),
        (2, "midrise", np.inf, "mse"),
    ],
)
def test_a_scale_that_overflows_is_refused(bits: int, grid: str, value: float, rule: str) -> None:
    kept = np.array([[1, value, 0], [1, 2, 3]], np.float32)
    for implementation in IMPLEMENTATIONS:
        with running(implementation), pytest.raises(UsageError, match="too large"):
            quantize.quantize(kept, bits, grid, rule, 0, "BF16")


def test_memory_does_not_grow_with_the_scale_group() -> None:
    kept = np.ones((1, 4), np.float32)
    tracemalloc.start()
    try:
        quantize.quantize(kept, 4, "midtread", "minmax", 2**22, "F32")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@needs_core
@examples(150)
@given(
    kept_entries(),
    st.sampled_from(GRIDS),
    st.sampled_from(quantize.SCALE_RULES),
    st.one_of(st.just(0), st.integers(1, 300)),
    st.sampled_from(["BF16", "F32"]),
)
def test_compiled_quantize_equals_the_reference(
    kept: NDArray[np.float32],
    kind: tuple[int, str],
    rule: str,
    scale_group: int,
    scale_dtype: str,
) -> None:
    expected = quantize.quantize.reference(kept, *kind, rule, scale_group, scale_dtype)
    for implementation in COMPILED:
        with running(implementation):
            found = quantize.quantize(kept, *kind, rule, scale_group, scale_dtype)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), strict=True)


@examples(60)
@given(generators(), st.sampled_from(GRIDS), st.sampled_from(quantize.SCALE_RULES), st.integers(2, 30), st.integers(1))
def test_quantize_does_not_depend_on_the_cut(
    rng: np.random.Generator, kind: tuple[int, str], rule: str, rows: int, cut: int
) -> None:
    kept = rng.standard_normal((rows, 77), np.float32)
    cut = cut % (rows - 1) + 1
    whole = quantize.quantize(kept, *kind, rule, 9, "BF16")
    parts = [quantize.quantize(kept[run], *kind, rule, 9, "BF16") for run in (slice(0, cut), slice(cut, None))]
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i], strict=True)


@st.composite
def methods(draw: st.DrawFn) -> DeltaDQ:
    """Give any method whose layout is valid."""
    layout = draw(layouts())
    return DeltaDQ(
        layout.n,
        layout.m,
        layout.bits,
        layout.index,
        layout.share,
        layout.grid,
        draw(st.sampled_from(quantize.SCALE_RULES)),
        layout.scale_group,
        layout.scale_dtype,
        draw(st.booleans()) or layout.n == layout.m,  # where all is kept, there is no rescale to leave out
    )


def compress(
    method: DeltaDQ, weights: tuple[NDArray[np.uint16], NDArray[np.uint16]], seed: int, first: int = 0
) -> NMArrays:
    """Compress the rows from ``first`` on."""
    run = [raw[first:] for raw in weights]
    (found,) = method.compress(DeltaRows(run[0], "BF16", run[1], "BF16", first), seed)
    return found


@examples(100)
@given(methods(), generators(), shapes(40, 150), st.integers(0, 2**32 - 1))
def test_decoded_delta_is_right_where_kept_and_zero_elsewhere(
    method: DeltaDQ, rng: np.random.Generator, shape: tuple[int, int], seed: int
) -> None:
    rows, columns = shape
    layout = method.layout
    weights = ordinary_raws(rng, "BF16", shape), ordinary_raws(rng, "BF16", shape)
    arrays = compress(method, weights, seed)
    packed = blank(layout, rows, columns)
    nm.encode(layout, arrays, packed)
    decoded = nm.decode(layout, packed, seed, 0, rows, columns)
    nm.check(layout, packed, decoded, columns)
    dense = nm.dense(layout, decoded, columns)
    delta, _ = subtract(weights[0], "BF16", weights[1], "BF16")
    factor = np.float32(method.m / method.n if method.rescale else 1)
    kept = np.zeros(shape, bool)
    scale = np.zeros(shape)
    scale_group = layout.scale_group or layout.kept(columns)
    for row in range(rows):
        for entry in range(layout.kept(columns)):
            g, i = divmod(entry, layout.n)
            column = g * layout.m + int(arrays.positions[row // layout.share, g, i])
            if column < columns:
                kept[row, column] = True
                scale[row, column] = arrays.scales[row, entry // scale_group]
    assert not dense[~kept].view(np.uint32).any()
    if method.scale_rule == "minmax":
        error = np.abs(dense.astype(np.float64) - delta * factor)
        assert (error[kept] <= (0.5 + SLACK) * scale[kept]).all()
    else:
        top = layout.top / 2
        assert (np.abs(dense[kept]) <= top * scale[kept] * (1 + SLACK)).all()


@examples(60)
@given(methods(), generators(), sizes(150), st.integers(0, 2**32 - 1))
def test_runs_and_compiled_loops_give_the_whole(
    method: DeltaDQ, rng: np.random.Generator, columns: int, seed: int
) -> None:
    step = nm.run_rows(method.layout)
    rows = step + int(rng.integers(1, 60))
    weights = ordinary_raws(rng, "BF16", (rows, columns)), ordinary_raws(rng, "BF16", (rows, columns))
    with running("numpy"):
        whole = compress(method, weights, seed)
    masks = step // method.share
    for implementation, first in itertools.product(IMPLEMENTATIONS, (0, step)):
        with running(implementation):
            part = compress(method, weights, seed, first)
        skipped = masks if first else 0
        np.testing.assert_array_equal(part.positions, whole.positions[skipped:], strict=True)
        np.testing.assert_array_equal(part.codes, whole.codes[first:], strict=True)
        np.testing.assert_array_equal(part.scales, whole.scales[first:], strict=True)


def test_dropout_is_unbiased() -> None:
    # Over many seeds the decoded 8-bit delta averages to the delta itself: each entry is kept with probability N / M
    # and multiplied by M / N, so that its mean over 2000 draws has a deviation of sqrt((M / N - 1) / 2000) of itself.
    method = DeltaDQ(2, 8, 8, share=1, scale="minmax", scale_dtype="F32")
    finetuned = narrow(np.array([[1, -2, 4, 8, -1, 2, -4, 8, 1, 1, -1]], np.float32), "BF16")
    base = np.zeros_like(finetuned)
    total = np.zeros(finetuned.shape)
    for seed in range(2000):
        arrays = compress(method, (finetuned, base), seed)
        total += nm.dense(method.layout, arrays, finetuned.shape[1])
    ratio = total / 2000 / widen(finetuned, "BF16")
    assert (np.abs(ratio - 1) < 6 * np.sqrt(3 / 2000) + 0.01).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 36])
def test_a_delta_that_is_not_finite_is_refused(value: float, column: int) -> None:
    base = np.zeros((40, 37), np.uint16)
    finetuned = base.copy()
    finetuned[39, column] = narrow(np.array([value], np.float32), "BF16")[0]
    for implementation in IMPLEMENTATIONS:
        with running(implementation), pytest.raises(NonFiniteError, match=rf"row 39, column {column} is"):
            compress(DeltaDQ(), (finetuned, base), 5)
