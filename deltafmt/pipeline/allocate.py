"""Choosing one alternative for each of many items, so that the sum of the losses is the least that a budget allows.

This is the multiple-choice knapsack problem. Every item is a tensor, and every alternative a way to pack it, with its
bytes and its loss. The lower convex hull of each item's (bytes, loss) points is walked; the step that saves the most
loss for a byte comes first. The result is at most one step from the best (Sinha and Zoltners, "The multiple-choice
knapsack problem", 1979). The bytes that are left are then spent on whatever still fits. For few items, dynamic
programming over bytes in small units comes closer to the best.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Dynamic programming: bytes are counted in this many units, for so many items at most.
UNITS = 1 << 15
FEW_ITEMS = 512


@dataclass(frozen=True, slots=True)
class Alternative:
    """A way to pack one tensor.

    Attributes:
        size: bytes.
        loss: the predicted loss, not negative.
    """

    size: int
    loss: float


def allocate(items: Sequence[Sequence[Alternative]], budget: int) -> list[int] | None:
    """Return the number of the alternative chosen for each item, or None if even the smallest ones do not fit.

    The total loss is never above that of the best choice in which all items have the same number.

    Args:
        items: the alternatives of each item, at least one.
        budget: bytes.
    """
    if least_size(items) > budget:
        return None
    useful = [_undominated(alternatives) for alternatives in items]
    walked, price = _walk(useful, budget)
    found = [_fill(useful, walked, budget)]
    if len(items) <= FEW_ITEMS:
        core = _promising(useful, budget, price, found[0])
        kept = [[alternatives[i] for i in numbers] for alternatives, numbers in zip(useful, core, strict=True)]
        best = [numbers[i] for numbers, i in zip(core, _by_units(kept, budget), strict=True)]
        found.append(_fill(useful, best, budget))
    choices = [[alternatives[i][0] for alternatives, i in zip(useful, choice, strict=True)] for choice in found]
    for number in range(min(map(len, items), default=0)):
        uniform = [number] * len(items)
        if total_size(items, uniform) <= budget:
            choices.append(uniform)
    return min(choices, key=lambda choice: total_loss(items, choice))


def least_size(items: Sequence[Sequence[Alternative]]) -> int:
    """Return the sum of the bytes of each item's smallest alternative."""
    return sum(min(alternative.size for alternative in alternatives) for alternatives in items)


def total_size(items: Sequence[Sequence[Alternative]], choice: Sequence[int]) -> int:
    """Return the bytes of a choice."""
    return sum(alternatives[i].size for alternatives, i in zip(items, choice, strict=True))


def total_loss(items: Sequence[Sequence[Alternative]], choice: Sequence[int]) -> float:
    """Return the loss of a choice."""
    return sum(alternatives[i].loss for alternatives, i in zip(items, choice, strict=True))


_Useful = list[tuple[int, Alternative]]


def _undominated(alternatives: Sequence[Alternative]) -> _Useful:
    """Return alternatives with their numbers, by size; without those that another equals or beats in bytes and loss."""
    useful: _Useful = []
    for number, alternative in sorted(enumerate(alternatives), key=lambda each: (each[1].size, each[1].loss)):
        if not useful or alternative.loss < useful[-1][1].loss:
            useful.append((number, alternative))
    return useful


def _hull(alternatives: _Useful) -> list[int]:
    """Return the places of the alternatives on the lower convex hull, the smallest first."""
    hull: list[int] = []
    for i in range(len(alternatives)):
        while len(hull) > 1 and _saved(alternatives, hull[-2], hull[-1]) <= _saved(alternatives, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _saved(alternatives: _Useful, small: int, large: int) -> float:
    """Return the loss saved for a byte."""
    (_, one), (_, other) = alternatives[small], alternatives[large]
    return (one.loss - other.loss) / (other.size - one.size)


def _walk(items: Sequence[_Useful], budget: int) -> tuple[list[int], float]:
    """Take steps along the hulls while they fit, the one that saves the most a byte first.

    Returns:
        The places that are reached, and the loss that the first step that does not fit would save for a byte; 0 if all
        fit.
    """
    hulls = [_hull(alternatives) for alternatives in items]
    place = [0] * len(items)
    left = budget - sum(alternatives[0][1].size for alternatives in items)
    price = 0.0
    steps = [(-_saved(items[i], *hull[:2]), i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        saved, i = heapq.heappop(steps)
        alternatives, hull = items[i], hulls[i]
        step = alternatives[hull[place[i] + 1]][1].size - alternatives[hull[place[i]]][1].size
        if step > left:
            price = price or -saved
            continue  # later steps of this item hang on this one
        left -= step
        place[i] += 1
        if place[i] + 1 < len(hull):
            heapq.heappush(steps, (-_saved(alternatives, hull[place[i]], hull[place[i] + 1]), i))
    return [hull[at] for hull, at in zip(hulls, place, strict=True)], price


def _promising(items: Sequence[_Useful], budget: int, price: float, found: Sequence[int]) -> list[list[int]]:
    """Return the places of the alternatives that a choice better than one that was found may have.

    With a price for every byte, no choice within the budget loses less than the bound: the sum of each item's least
    loss + price * size, less price * budget. An alternative that is dearer than its item's least by more than lies
    between the bound and the choice found is in no better choice.
    """
    costs = [np.array([each.loss + price * each.size for _, each in alternatives]) for alternatives in items]
    known = sum(alternatives[i][1].loss for alternatives, i in zip(items, found, strict=True))
    bound = sum(float(cost.min()) for cost in costs) - price * budget
    room = (known - bound) * (1 + 1e-6) + 1e-12
    core = []
    for cost, at in zip(costs, found, strict=True):
        near = cost <= cost.min() + room
        near[0] = near[at] = True
        core.append(np.flatnonzero(near).tolist())
    return core


def _fill(items: Sequence[_Useful], choice: list[int], budget: int) -> list[int]:
    """Spend the bytes that are left: as long as an alternative fits, take the one that saves the most loss."""
    choice = list(choice)
    left = budget - sum(alternatives[i][1].size for alternatives, i in zip(items, choice, strict=True))

    def best_step(i: int) -> tuple[float, int]:
        """Return the loss that the largest alternative that fits saves, and its number."""
        alternatives, now = items[i], choice[i]
        fitting = now
        while fitting + 1 < len(alternatives) and alternatives[fitting + 1][1].size - alternatives[now][1].size <= left:
            fitting += 1
        return alternatives[now][1].loss - alternatives[fitting][1].loss, fitting

    waiting = [(-best_step(i)[0], i) for i in range(len(items))]
    heapq.heapify(waiting)
    while waiting:
        known, i = heapq.heappop(waiting)
        saved, alternative = best_step(i)
        if saved <= 0:
            continue
        if saved < -known:  # less is left than when this was pushed
            heapq.heappush(waiting, (-saved, i))
            continue
        left -= items[i][alternative][1].size - items[i][choice[i]][1].size
        choice[i] = alternative
    return choice


def _by_units(items: Sequence[_Useful], budget: int) -> list[int]:
    """Return the best choice, with the bytes beyond each item's smallest alternative rounded up to units."""
    smallest = [alternatives[0][1].size for alternatives in items]
    spare = budget - sum(smallest)
    unit = max(-(-spare // UNITS), 1)
    units = spare // unit
    best = np.zeros(units + 1)
    taken = np.zeros((len(items), units + 1), np.uint16)
    for i, alternatives in enumerate(items):
        before = best
        best = before + alternatives[0][1].loss
        for number, (_, alternative) in enumerate(alternatives[1:], 1):
            more = -(-(alternative.size - smallest[i]) // unit)
            if more > units:
                break
            other = before[: units + 1 - more] + alternative.loss
            view = best[more:]
            better = other < view
            view[better] = other[better]
            taken[i, more:][better] = number
    choice = []
    at = units
    for i in range(len(items) - 1, -1, -1):
        number = int(taken[i, at])
        choice.append(number)
        at -= -(-(items[i][number][1].size - smallest[i]) // unit)
    return choice[::-1]
