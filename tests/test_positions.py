"""Kept positions: the seeded draw bit by bit, fixed and rank indexes, and the compiled draw against numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltafmt.errors import InvalidFileError
from deltafmt.terms import words
from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.codec import transcode_index
from deltafmt.terms.nm.index.codec import check_ascending
from deltafmt.terms.nm.index.rank import positions_of, ranks_of
from deltafmt.terms.nm.layout import NMLayout
from implementations import COMPILED, IMPLEMENTATIONS, needs_core, running
from index_cases import ascending
from index_words import decoded, encoded
from strategies import examples, generators, layouts, sizes

SEEDS = st.integers(0, 2**32 - 1)
FIRST_ROWS = st.one_of(st.integers(0, 1000), st.integers(2**32 - 40, 2**32 + 40))
SEEDED_PAIRS = [(keep, 2**m) for m in range(1, 8) for keep in sorted({1, 2, 2 ** (m - 1), 2**m - 1, 2**m})]


def mix_by_definition(x: int) -> int:
    """Return the 32-bit mix, with Python integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ x >> shift) * factor % 2**32
    return x


def mix64_by_definition(x: int) -> int:
    """Return the 64 bits of a mixed number, with Python integers."""
    product = (x ^ x >> 16) * 0xCD9E8D57
    return (product >> 32 ^ product % 2**32) * 0xFFFEB2D5


def seeded_by_definition(seed: int, row: int, group_number: int, keep: int, group: int) -> list[int]:
    """Draw one group with Python integers, as the specification words it."""
    log_m = int(math.log2(group))
    needed = log_m + (log_m - 1 if keep > 1 else 0)
    width = next(width for width in (4, 8, 16) if needed <= width)
    per_hash = 64 // width
    key = mix_by_definition((seed + row * 0x9E3779B1) % 2**32)
    h = mix64_by_definition((key + group_number // per_hash * 0x85EBCA6B) % 2**32)
    lane = h >> group_number % per_hash * width
    b = lane % group
    a = 2 * (lane >> log_m) % group + 1
    return [(a * i + b) % group for i in range(keep)]


def chi_square(counts: NDArray[np.int64]) -> float:
    """Return the distance of counts from equal ones, in standard deviations of the chi-square distribution."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@examples(60)
@given(SEEDS, FIRST_ROWS, st.integers(1, 4), st.integers(1, 12), st.data())
def test_seeded_is_the_definition(seed: int, first: int, count: int, groups: int, data: st.DataObject) -> None:
    keep, group = data.draw(st.sampled_from(SEEDED_PAIRS))
    drawn = hashing.seeded(seed, first, count, groups, keep, group)
    expected = [[seeded_by_definition(seed, first + r, g, keep, group) for g in range(groups)] for r in range(count)]
    assert drawn.dtype == np.uint8
    assert drawn.tolist() == expected


def test_mix_is_a_bijection() -> None:
    known = np.array([mix_by_definition(x) for x in range(4096)], np.uint32)
    np.testing.assert_array_equal(hashing.mix(np.arange(4096, dtype=np.uint32)), known, strict=True)
    assert hashing.mix(np.zeros(1, np.uint32))[0] == 0
    spread = np.arange(2**17, dtype=np.uint32) * np.uint32(0x9E3779B1)
    assert np.unique(hashing.mix(spread)).size == spread.size


@pytest.mark.parametrize(("keep", "group"), SEEDED_PAIRS)
def test_seeded_positions_are_distinct_and_below_m(keep: int, group: int) -> None:
    drawn = np.sort(hashing.seeded(7, 3, 50, 21, keep, group), axis=2).astype(int)
    assert drawn.max() < group
    assert (np.diff(drawn, axis=2) > 0).all()


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (1, 16), (4, 16), (2, 32), (1, 64), (8, 128), (3, 4)])
def test_seeded_positions_are_uniform(keep: int, group: int) -> None:
    drawn = hashing.seeded(20240611, 0, 600, 64, keep, group)
    # Every entry of a group by itself, then every place of a group in a hash, then every row by itself.
    for i in range(keep):
        assert chi_square(np.bincount(drawn[:, :, i].ravel(), minlength=group)) < 6
    for g in range(8):
        assert chi_square(np.bincount(drawn[:, g::8, 0].ravel(), minlength=group)) < 6
    if keep > 1:
        step = (drawn[:, :, 1].astype(int) - drawn[:, :, 0]) % group
        assert chi_square(np.bincount(step.ravel() // 2, minlength=group // 2)) < 6


@pytest.mark.parametrize(("keep", "group"), [(1, 16), (4, 16), (1, 128)])
def test_seeded_rows_groups_and_seeds_are_independent(keep: int, group: int) -> None:
    drawn = hashing.seeded(1, 0, 512, 64, keep, group)[:, :, 0].astype(int)
    other = hashing.seeded(2, 0, 512, 64, keep, group)[:, :, 0].astype(int)
    for pair in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn, other)):
        difference = (pair[0] - pair[1]) % group
        assert chi_square(np.bincount(difference.ravel(), minlength=group)) < 6


@examples(60)
@given(SEEDS, FIRST_ROWS, sizes(40), st.integers(0, 40), st.integers(1, 40), st.sampled_from(SEEDED_PAIRS))
def test_seeded_does_not_depend_on_the_cut(
    seed: int, first: int, count: int, cut: int, groups: int, pair: tuple[int, int]
) -> None:
    cut = min(cut, count)
    whole = hashing.seeded(seed, first, count, groups, *pair)
    spans = (first, cut), (first + cut, count - cut)
    parts = [hashing.seeded(seed, start, rows, groups, *pair) for start, rows in spans]
    np.testing.assert_array_equal(np.concatenate(parts), whole, strict=True)
    # Nor do a row's first groups depend on how many follow.
    fewer = hashing.seeded(seed, first, count, (groups + 1) // 2, *pair)
    np.testing.assert_array_equal(fewer, whole[:, : (groups + 1) // 2], strict=True)


@needs_core
@examples(100)
@given(SEEDS, FIRST_ROWS, sizes(40), sizes(70), st.sampled_from(SEEDED_PAIRS))
def test_compiled_seeded_equals_the_reference(
    seed: int, first: int, count: int, groups: int, pair: tuple[int, int]
) -> None:
    expected = hashing.seeded.reference(seed, first, count, groups, *pair)
    for implementation in COMPILED:
        with running(implementation):
            found = hashing.seeded(seed, first, count, groups, *pair)
        np.testing.assert_array_equal(found, expected, strict=True)


@examples(60)
@given(st.data(), generators(), sizes(40), st.integers(1, 12))
def test_fixed_and_rank_hold_the_positions(
    data: st.DataObject, rng: np.random.Generator, mask_rows: int, groups: int
) -> None:
    ranked = data.draw(layouts("rank"))
    fixed = ranked.with_index("fixed")
    positions = ascending(rng, mask_rows, groups, ranked.n, ranked.m)
    as_rank, as_fixed = encoded(positions, ranked), encoded(positions, fixed)
    np.testing.assert_array_equal(decoded(as_rank, ranked, mask_rows, groups), positions, strict=True)
    np.testing.assert_array_equal(decoded(as_fixed, fixed, mask_rows, groups), positions, strict=True)
    columns = groups * ranked.m
    np.testing.assert_array_equal(transcode_index(ranked, as_rank, mask_rows, columns, fixed), as_fixed, strict=True)
    np.testing.assert_array_equal(transcode_index(fixed, as_fixed, mask_rows, columns, ranked), as_rank, strict=True)


@examples(30)
@given(st.data(), generators(), sizes(40), st.integers(1, 12))
def test_fixed_holds_the_positions_of_any_layout(
    data: st.DataObject, rng: np.random.Generator, mask_rows: int, groups: int
) -> None:
    layout = data.draw(layouts("fixed"))
    positions = ascending(rng, mask_rows, groups, layout.n, layout.m)
    packed = encoded(positions, layout)
    assert packed.nbytes == layout.buffer_lengths(mask_rows * layout.share, groups * layout.m)["index"]
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            found = decoded(packed, layout, mask_rows, groups)
            np.testing.assert_array_equal(found, positions, strict=True)


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (2, 2), (1, 7), (2, 4), (3, 7), (4, 8), (8, 9)])
def test_rank_counts_every_subset_once(keep: int, group: int) -> None:
    layout = NMLayout(keep, group, 4, "rank")
    # Colexicographic order: by the largest position, then by the next.
    subsets = sorted(itertools.combinations(range(group), keep), key=lambda subset: subset[::-1])
    ranks = np.arange(len(subsets), dtype=np.uint64)[None, :]
    packed = words.pack(ranks, layout.rank_bits)
    found = decoded(packed, layout, 1, len(subsets))
    assert found[0].tolist() == [list(subset) for subset in subsets]
    np.testing.assert_array_equal(encoded(found, layout), packed, strict=True)


def test_largest_ranks() -> None:
    # C(67, 33) is the largest central binomial coefficient below 2**64; 255 positions, all but a few kept, reach far
    # beyond it on the way.
    for keep, group in ((33, 67), (249, 255), (8, 255)):
        layout = NMLayout(keep, group, 4, "rank")
        total = math.comb(group, keep)
        packed = words.pack(np.array([[total - 1, 0]], np.uint64), layout.rank_bits)
        last, first = decoded(packed, layout, 1, 2)[0].tolist()
        assert last == list(range(group - keep, group))
        assert first == list(range(keep))
        assert total < 2**64


@pytest.mark.parametrize(("keep", "group"), [(2, 5), (3, 7), (4, 16), (33, 67), (8, 255)])
def test_rank_beyond_the_last_subset_is_refused(keep: int, group: int) -> None:
    layout = NMLayout(keep, group, 4, "rank")
    total = math.comb(group, keep)
    for rank in {total, 2**layout.rank_bits - 1}:
        packed = words.pack(np.array([[0, 1], [0, rank]], np.uint64), layout.rank_bits)
        with pytest.raises(InvalidFileError, match=rf"mask row 1, group 1: rank {rank} is not below {total}"):
            decoded(packed, layout, 2, 2)


@pytest.mark.parametrize(
    ("wrong", "entry"), [([3, 3, 4], 1), ([4, 3, 9], 1), ([0, 9, 1], 2), ([0, 1, 10], 2), ([15, 1, 2], 0)]
)
def test_fixed_that_does_not_ascend_below_m_is_refused(wrong: list[int], entry: int) -> None:
    layout = NMLayout(3, 10, 4, "fixed")
    positions = np.array([[[0, 1, 2], [7, 8, 9]], [[0, 5, 9], wrong]], np.uint8)
    packed = encoded(positions, layout)
    with pytest.raises(InvalidFileError, match=rf"mask row 1, group 1: entry {entry} is at {wrong[entry]}"):
        decoded(packed, layout, 2, 2)


@needs_core
@examples(100)
@given(st.data(), generators(), sizes(40), st.integers(0, 12))
def test_compiled_ranks_equal_the_reference(
    data: st.DataObject, rng: np.random.Generator, mask_rows: int, groups: int
) -> None:
    layout = data.draw(layouts("rank"))
    n, m = layout.n, layout.m
    total = math.comb(m, n)
    ranks = rng.integers(0, total, (mask_rows, groups), np.uint64)
    ranks[rng.random(ranks.shape) < 0.1] = total - 1
    ranks[rng.random(ranks.shape) < 0.1] = 0
    positions = positions_of.reference(ranks, n, m)
    np.testing.assert_array_equal(ranks_of.reference(positions, m), ranks, strict=True)
    strided = np.repeat(positions, 2, axis=1)[:, ::2]
    for implementation in COMPILED:
        with running(implementation):
            np.testing.assert_array_equal(positions_of(ranks, n, m), positions, strict=True)
            for given_positions in (positions, strided):
                np.testing.assert_array_equal(ranks_of(given_positions, m), ranks, strict=True)


@needs_core
@examples(150)
@given(generators(), sizes(40), st.integers(0, 9), st.integers(2, 255), st.data(), st.integers(0, 3))
def test_compiled_check_of_positions_equals_the_reference(
    rng: np.random.Generator, mask_rows: int, groups: int, m: int, data: st.DataObject, wrong: int
) -> None:
    n = data.draw(st.integers(1, min(m, 12)))
    positions = ascending(rng, mask_rows, groups, n, m)
    for _ in range(wrong if groups else 0):
        at = tuple(rng.integers(positions.shape))
        positions[at] = data.draw(st.one_of(st.integers(0, 255), st.just(m)))
    refusals = []
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            try:
                check_ascending(positions, m)
                refusals.append("")
            except InvalidFileError as error:
                refusals.append(str(error))
    assert len(set(refusals)) == 1
    in_order = (np.diff(positions.astype(int), axis=2) > 0).all() and not (positions >= m).any()
    assert (refusals[0] == "") == in_order
