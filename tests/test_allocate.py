"""Choosing alternatives under a budget, against all combinations of small problems."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt.pipeline import allocate
from deltafmt.pipeline.allocate import Alternative, least_size, total_loss, total_size

sizes = st.integers(0, 40)
losses = st.integers(0, 50).map(float)
problems = st.integers(1, 5).flatmap(
    lambda count: st.lists(
        st.lists(st.builds(Alternative, sizes, losses), min_size=count, max_size=count), min_size=1, max_size=5
    )
)


@given(problems, st.integers(0, 200))
@settings(deadline=None)
def test_the_best_of_all_combinations(items: list[list[Alternative]], budget: int) -> None:
    found = allocate.allocate(items, budget)
    every = itertools.product(*(range(len(alternatives)) for alternatives in items))
    fitting = [total_loss(items, choice) for choice in every if total_size(items, choice) <= budget]
    if not fitting:
        assert found is None
        assert least_size(items) > budget
        return
    assert found is not None
    assert total_size(items, found) <= budget
    assert total_loss(items, found) == min(fitting)


@given(problems, st.integers(0, 200))
@settings(deadline=None)
def test_many_items_come_within_one_step(items: list[list[Alternative]], budget: int) -> None:
    few, allocate.FEW_ITEMS = allocate.FEW_ITEMS, 0
    try:
        found = allocate.allocate(items, budget)
    finally:
        allocate.FEW_ITEMS = few
    best = allocate.allocate(items, budget)
    if found is None or best is None:
        assert found is best
        return
    assert total_size(items, found) <= budget
    step = max(max(o.loss for o in alternatives) - min(o.loss for o in alternatives) for alternatives in items)
    assert total_loss(items, found) <= total_loss(items, best) + step


@given(problems, st.integers(0, 200))
@settings(deadline=None)
def test_never_worse_than_one_alternative_for_all(items: list[list[Alternative]], budget: int) -> None:
    found = allocate.allocate(items, budget)
    for number in range(len(items[0])):
        uniform = [number] * len(items)
        if total_size(items, uniform) <= budget:
            assert found is not None
            assert total_loss(items, found) <= total_loss(items, uniform)


def test_thousands_of_alternatives_in_units() -> None:
    rng = np.random.default_rng(0)
    items = [
        [Alternative(int(size), float(scale / size)) for size in rng.integers(1000, 100_000, 40)]
        for scale in rng.exponential(1000, 300)
    ]
    budget = 300 * 20_000
    found = allocate.allocate(items, budget)
    assert found is not None
    assert 0.999 * budget <= total_size(items, found) <= budget


def test_nothing_to_choose() -> None:
    assert allocate.allocate([], 0) == []
