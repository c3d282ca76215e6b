"""Separate quantization's parts, and the expected error of balanced dropout against every draw there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.errors import UsageError
from deltafmt.methods.group_size import expected_error, search_group
from problems import Floats, layer, weighted_error
from separate_parts import join, part_costs, split
from strategies import examples, generators, shapes


@examples(80)
@given(generators(), shapes(20, 60), st.integers(1, 8), st.data())
def test_parts_join_to_what_was_split(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, data: st.DataObject
) -> None:
    parts = 2 ** data.draw(st.integers(0, bits))
    kept = rng.random(shape) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    codes = np.where(kept, rng.integers(0, 2**bits, shape), 0).astype(np.uint8)
    found = split(codes, kept, bits, parts)
    assert len(found) == parts
    for number, part in enumerate(found):
        assert part.bits == bits - (parts.bit_length() - 1)
        assert part.offset == number << part.bits
        assert int(part.codes.max(initial=0)) < 2**part.bits
        assert part.indptr[0] == 0
        assert part.indptr[-1] == part.codes.size == part.indices.size
    joined = join(found, shape)
    np.testing.assert_array_equal(joined[0], codes)
    np.testing.assert_array_equal(joined[1], kept)
    costs = part_costs(found, shape)
    assert costs.values == int(kept.sum()) * (bits - (parts.bit_length() - 1))
    assert costs.least <= costs.unsplit + 1
    assert costs.least <= costs.values + costs.lists + 1


def test_parts_are_terms_of_a_sum() -> None:
    rng = np.random.default_rng(0)
    kept = rng.random((7, 40)) < 0.3
    codes = rng.integers(0, 15, (7, 40)).astype(np.uint8)
    top, scale = 14, 0.25
    total = np.zeros((7, 40))
    for part in split(codes, kept, 4, 8):
        rows = np.repeat(np.arange(7), np.diff(part.indptr))
        total[rows, part.indices] += (2.0 * (part.codes + part.offset) - top) * scale / 2
    np.testing.assert_array_equal(total, np.where(kept, (2.0 * codes - top) * scale / 2, 0))


def test_true_bits_of_parts() -> None:
    # One row of 16 columns: 4 entries of 4 bits in 4 parts. The paper counts 2 bits each; lists of columns add 4 bits
    # each and two pointers of 3 bits for each part.
    kept = np.zeros((1, 16), bool)
    kept[0, [1, 5, 9, 13]] = True
    codes = np.zeros((1, 16), np.uint8)
    codes[0, [1, 5, 9, 13]] = [0, 5, 10, 15]
    costs = part_costs(split(codes, kept, 4, 4), (1, 16))
    assert (costs.values, costs.lists, costs.unsplit) == (8, 16 + 24, 16 + 16 + 6)
    # -log2 of a multinomial with counts 12, 1, 1, 1, 1
    assert costs.least == int(np.ceil(12 * np.log2(16 / 12) + 4 * np.log2(16)))


@pytest.mark.parametrize(("bits", "parts"), [(4, 3), (2, 8), (4, 0), (9, 2)])
def test_wrong_numbers_of_parts_are_refused(bits: int, parts: int) -> None:
    with pytest.raises(UsageError):
        split(np.zeros((1, 1), np.uint8), np.ones((1, 1), bool), bits, parts)


def mean_over_every_draw(delta: Floats, hessian: Floats, keep: int, group: int) -> float:
    """Average the outputs' squared error over every choice of positions of a matrix of one row."""
    starts = range(0, delta.shape[1], group)
    errors = []
    for chosen in itertools.product(itertools.combinations(range(group), keep), repeat=len(starts)):
        kept = np.zeros_like(delta)
        for start, positions in zip(starts, chosen, strict=True):
            for position in positions:
                kept[0, start + position] = delta[0, start + position] * group / keep
        errors.append(weighted_error(delta - kept, hessian))
    return float(np.mean(errors))


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (2, 8)])
def test_expected_error_is_the_mean_over_every_draw(keep: int, group: int) -> None:
    delta, hessian = layer(keep * 10 + group, 1, 8)
    found = expected_error(delta, hessian, keep, group)
    assert found == pytest.approx(mean_over_every_draw(delta, hessian, keep, group), rel=1e-5)
    plain = expected_error(delta, None, keep, group)
    assert plain == pytest.approx(expected_error(delta, np.eye(8, dtype=np.float32), keep, group), rel=1e-6)


def test_rows_add_up() -> None:
    delta, hessian = layer(1, 6, 20)
    rows = [expected_error(delta[r : r + 1], hessian, 2, 8) for r in range(6)]
    assert expected_error(delta, hessian, 2, 8) == pytest.approx(sum(rows))
    assert expected_error(delta, hessian, 8, 8) == 0


def test_features_that_go_together_want_small_groups() -> None:
    # Neighbours with the same product: keeping one of each pair, doubled, loses nothing.
    delta = np.repeat(np.random.default_rng(0).standard_normal((4, 16)), 2, axis=1).astype(np.float32)
    inputs = np.repeat(np.random.default_rng(1).standard_normal((200, 16)), 2, axis=1)
    hessian = (inputs.T @ inputs).astype(np.float32)

    def loss(keep: int, group: int) -> float:
        return expected_error(delta, hessian, keep, group)

    assert search_group(loss, 0.5, [2, 4, 8, 16, 32]) == (1, 2)
    assert loss(1, 2) == pytest.approx(0, abs=1e-3)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a group of 6 columns cannot keep a share of 0\.25"):
        search_group(lambda _, __: 0.0, 0.25, [8, 6])
    with pytest.raises(UsageError, match="no group size"):
        search_group(lambda _, __: 0.0, 0.25, [])
    with pytest.raises(UsageError, match="N = 5 is outside 1 to M = 4"):
        expected_error(np.ones((1, 4), np.float32), None, 5, 4)
