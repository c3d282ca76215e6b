"""Drawing subsets for fixed and rank indexes, gathering kept entries, and the compiled loops against numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.methods import sampling
from deltafmt.terms.floats import subtract
from deltafmt.terms.nm.hashing import mix
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from index_cases import ascending
from strategies import FLOAT_DTYPES, deltas, examples, generators, layouts, raws, shapes, sizes

SEEDS = st.integers(0, 2**32 - 1)
FIRST_ROWS = st.one_of(st.integers(0, 1000), st.integers(2**32 - 40, 2**32 + 40))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int]:
    """Give N and M, any that a layout may have."""
    group = draw(st.one_of(st.integers(2, 20), st.integers(2, 255)))
    return draw(st.integers(1, group)), group


def chi_square(counts: NDArray[np.int64]) -> float:
    """Return the distance of counts from equal ones, in standard deviations of the chi-square distribution."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def select_by_definition(seed: int, row: int, group_number: int, keep: int, group: int) -> list[int]:
    """Select N of M positions with Python integers (Knuth, algorithm 3.4.2 S)."""
    key = int(mix(np.array([(seed + row * 0x9E3779B1) % 2**32], np.uint32))[0])
    found: list[int] = []
    for p in range(group):
        counter = (group_number * group + p) % 2**32
        number = int(mix(np.array([(key + counter * 0x85EBCA6B) % 2**32], np.uint32))[0])
        if number * (group - p) // 2**32 < keep - len(found):
            found.append(p)
    return found


@examples(40)
@given(SEEDS, FIRST_ROWS, st.integers(1, 3), st.integers(1, 3), pairs())
def test_uniform_is_the_definition(seed: int, first: int, count: int, groups: int, pair: tuple[int, int]) -> None:
    drawn = sampling.uniform(seed, first, count, groups, *pair)
    assert drawn.dtype == np.uint8
    expected = [[select_by_definition(seed, first + r, g, *pair) for g in range(groups)] for r in range(count)]
    assert drawn.tolist() == expected


@examples(60)
@given(SEEDS, FIRST_ROWS, sizes(40), st.integers(0, 40), st.integers(1, 9), pairs())
def test_uniform_ascends_whatever_the_cut(
    seed: int, first: int, count: int, cut: int, groups: int, pair: tuple[int, int]
) -> None:
    cut = min(cut, count)
    whole = sampling.uniform(seed, first, count, groups, *pair)
    assert whole.shape == (count, groups, pair[0])
    assert whole.max() < pair[1]
    assert (np.diff(whole.astype(int), axis=2) > 0).all()
    parts = [
        sampling.uniform(seed, first, cut, groups, *pair),
        sampling.uniform(seed, first + cut, count - cut, groups, *pair),
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole, strict=True)


@pytest.mark.parametrize(("keep", "group"), [(1, 3), (2, 4), (3, 7), (1, 16), (4, 8), (6, 7)])
def test_every_subset_is_equally_likely(keep: int, group: int) -> None:
    drawn = sampling.uniform(20240611, 0, 300, 40, keep, group).reshape(-1, keep)
    numbers = (2 ** drawn.astype(np.int64)).sum(axis=1)
    subsets = sorted(sum(2**p for p in subset) for subset in itertools.combinations(range(group), keep))
    counts = np.bincount(np.searchsorted(subsets, numbers), minlength=len(subsets))
    assert np.isin(numbers, subsets).all()
    assert chi_square(counts) < 6


@pytest.mark.parametrize(("keep", "group"), [(4, 16), (5, 100), (200, 255)])
def test_every_position_is_equally_likely(keep: int, group: int) -> None:
    drawn = sampling.uniform(3, 0, 200, 20, keep, group)
    # The marginals of a subset vary less than those of independent draws, by the factor (M - N) / (M - 1).
    counts = np.bincount(drawn.ravel(), minlength=group)
    expected = counts.sum() / group
    statistic = ((counts - expected) ** 2 / expected).sum() * (group - 1) / (group - keep)
    assert abs(statistic - (group - 1)) < 6 * math.sqrt(2 * (group - 1))


@needs_core
@examples(100)
@given(SEEDS, FIRST_ROWS, sizes(40), st.integers(1, 20), pairs())
def test_compiled_uniform_equals_the_reference(
    seed: int, first: int, count: int, groups: int, pair: tuple[int, int]
) -> None:
    expected = sampling.uniform.reference(seed, first, count, groups, *pair)
    for implementation in COMPILED:
        with running(implementation):
            found = sampling.uniform(seed, first, count, groups, *pair)
        np.testing.assert_array_equal(found, expected, strict=True)


@examples(60)
@given(st.data(), shapes(40, 300), generators())
def test_gather_takes_the_kept_entries(data: st.DataObject, shape: tuple[int, int], rng: np.random.Generator) -> None:
    rows, columns = shape
    layout = data.draw(layouts())
    delta = data.draw(deltas(rows, columns))
    positions = ascending(rng, layout.mask_rows(rows), layout.groups(columns), layout.n, layout.m)
    factor = np.float32(layout.m / layout.n)
    kept = sampling.gather(delta, positions, layout.m, layout.share, factor)
    assert kept.shape == (rows, layout.kept(columns))
    assert kept.dtype == np.float32
    for _ in range(40):
        row, entry = int(rng.integers(rows)), int(rng.integers(kept.shape[1]))
        g, i = divmod(entry, layout.n)
        column = g * layout.m + int(positions[row // layout.share, g, i])
        if column < columns:
            assert kept[row, entry] == delta[row, column] * factor
        else:
            assert np.isnan(kept[row, entry])


@needs_core
@examples(120)
@given(st.data(), shapes(40, 300), generators(), st.booleans())
def test_compiled_gather_equals_the_reference(
    data: st.DataObject, shape: tuple[int, int], rng: np.random.Generator, readonly: bool
) -> None:
    rows, columns = shape
    layout = data.draw(layouts())
    dtypes = data.draw(st.one_of(st.just(("BF16", "BF16")), st.tuples(*[st.sampled_from(FLOAT_DTYPES)] * 2)))
    finetuned, base = (data.draw(raws(dtype, shape)) for dtype in dtypes)
    for raw in (finetuned, base):
        raw.flags.writeable = not readonly
    positions = ascending(rng, layout.mask_rows(rows), layout.groups(columns), layout.n, layout.m)
    arguments = (finetuned, dtypes[0], base, dtypes[1], positions, layout.m, layout.share, np.float32(4))
    with running("numpy"):
        expected, finite = sampling.gather_difference(*arguments)
        assert finite == subtract(finetuned, dtypes[0], base, dtypes[1])[1]
    nan = np.isnan(expected)
    for implementation in COMPILED:
        with running(implementation):
            found, found_finite = sampling.gather_difference(*arguments)
        assert found_finite is finite
        assert np.array_equal(np.isnan(found), nan)
        np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32), strict=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_gather_sees_what_is_dropped(value: float) -> None:
    finetuned = np.zeros((5, 37), np.uint16)
    base = np.zeros((5, 37), np.uint16)
    positions = np.zeros((5, 3, 1), np.uint8)
    arguments = (finetuned, "BF16", base, "BF16", positions, 16, 1, np.float32(1))
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            assert sampling.gather_difference(*arguments)[1] is True
            finetuned[4, 36] = np.array([value], np.float32).view(np.uint32)[0] >> 16
            assert sampling.gather_difference(*arguments)[1] is False
            finetuned[4, 36] = 0


@needs_core
@examples(100)
@given(SEEDS, shapes(70, 300), st.one_of(st.floats(0, 1), st.sampled_from((2.0**-33, 2.0**-32, 0.5, 1 - 2.0**-32))))
def test_compiled_draw_equals_the_reference(seed: int, shape: tuple[int, int], drop: float) -> None:
    expected = sampling.draw.reference(seed, *shape, drop)
    for implementation in COMPILED:
        with running(implementation):
            np.testing.assert_array_equal(sampling.draw(seed, *shape, drop), expected, strict=True)


@needs_core
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_all_or_nothing_is_drawn(drop: float) -> None:
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            assert (sampling.draw(7, 20, 30, drop) == (drop == 0)).all()
