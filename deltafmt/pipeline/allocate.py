"""Choosing one option for each of many items, so that the losses add up to the least that a number of bytes allows.

The multiple-choice knapsack problem. The lower convex hull of every item's (bytes, loss) points is walked in the order
of loss saved a byte, which gives the best total for Lagrange multipliers, at most one step from the best of all (Sinha
and Zoltners, "The multiple-choice knapsack problem", 1979); what that leaves of the bytes is then used up. For few
items dynamic programming over bytes in small units comes closer.
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
class Option:
    """A way to pack one tensor.

    Attributes:
        size: bytes.
        loss: what is lost, not negative.
    """

    size: int
    loss: float


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Return the number of each item's option, or None where not even the smallest fit.

    The total is never above the best that all items reach with options of the same number.

    Args:
        items: the options of each item, at least one.
        budget: bytes.
    """
    if least_size(items) > budget:
        return None
    useful = [_undominated(options) for options in items]
    found = [_fill(useful, _walk(useful, budget), budget)]
    if len(items) <= FEW_ITEMS:
        found.append(_fill(useful, _by_units(useful, budget), budget))
    choices = [[options[i][0] for options, i in zip(useful, choice, strict=True)] for choice in found]
    for number in range(min(map(len, items), default=0)):
        uniform = [number] * len(items)
        if total_size(items, uniform) <= budget:
            choices.append(uniform)
    return min(choices, key=lambda choice: total_loss(items, choice))


def least_size(items: Sequence[Sequence[Option]]) -> int:
    """Return the bytes of the smallest options."""
    return sum(min(option.size for option in options) for options in items)


def total_size(items: Sequence[Sequence[Option]], choice: Sequence[int]) -> int:
    """Return the bytes of a choice."""
    return sum(options[i].size for options, i in zip(items, choice, strict=True))


def total_loss(items: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    """Return the loss of a choice."""
    return sum(options[i].loss for options, i in zip(items, choice, strict=True))


_Useful = list[tuple[int, Option]]


def _undominated(options: Sequence[Option]) -> _Useful:
    """Return numbered options by size, without those that another one equals or beats in both bytes and loss."""
    useful: _Useful = []
    for number, option in sorted(enumerate(options), key=lambda each: (each[1].size, each[1].loss)):
        if not useful or option.loss < useful[-1][1].loss:
            useful.append((number, option))
    return useful


def _hull(options: _Useful) -> list[int]:
    """Return which options lie on the lower convex hull, from the smallest on."""
    hull: list[int] = []
    for i in range(len(options)):
        while len(hull) > 1 and _saved(options, hull[-2], hull[-1]) <= _saved(options, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _saved(options: _Useful, small: int, large: int) -> float:
    """Return the loss saved for a byte."""
    (_, one), (_, other) = options[small], options[large]
    return (one.loss - other.loss) / (other.size - one.size)


def _walk(items: Sequence[_Useful], budget: int) -> list[int]:
    """Take steps along the hulls while they fit, the one that saves the most a byte first."""
    hulls = [_hull(options) for options in items]
    place = [0] * len(items)
    left = budget - sum(options[0][1].size for options in items)
    steps = [(-_saved(items[i], *hull[:2]), i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, i = heapq.heappop(steps)
        options, hull = items[i], hulls[i]
        step = options[hull[place[i] + 1]][1].size - options[hull[place[i]]][1].size
        if step > left:
            continue  # later steps of this item hang on this one
        left -= step
        place[i] += 1
        if place[i] + 1 < len(hull):
            heapq.heappush(steps, (-_saved(options, hull[place[i]], hull[place[i] + 1]), i))
    return [hull[at] for hull, at in zip(hulls, place, strict=True)]


def _fill(items: Sequence[_Useful], choice: list[int], budget: int) -> list[int]:
    """Use up what is left of the bytes: the option that saves the most of any item, as long as one fits."""
    choice = list(choice)
    left = budget - sum(options[i][1].size for options, i in zip(items, choice, strict=True))

    def best_step(i: int) -> tuple[float, int]:
        """Return the loss that the largest option that fits saves, and its number."""
        options, now = items[i], choice[i]
        fitting = now
        while fitting + 1 < len(options) and options[fitting + 1][1].size - options[now][1].size <= left:
            fitting += 1
        return options[now][1].loss - options[fitting][1].loss, fitting

    waiting = [(-best_step(i)[0], i) for i in range(len(items))]
    heapq.heapify(waiting)
    while waiting:
        known, i = heapq.heappop(waiting)
        saved, option = best_step(i)
        if saved <= 0:
            continue
        if saved < -known:  # less is left than when this was pushed
            heapq.heappush(waiting, (-saved, i))
            continue
        left -= items[i][option][1].size - items[i][choice[i]][1].size
        choice[i] = option
    return choice


def _by_units(items: Sequence[_Useful], budget: int) -> list[int]:
    """Return the best choice for sizes above the smallest ones rounded up to units."""
    smallest = [options[0][1].size for options in items]
    spare = budget - sum(smallest)
    unit = max(-(-spare // UNITS), 1)
    units = spare // unit
    best = np.zeros(units + 1)
    taken = np.zeros((len(items), units + 1), np.uint16)
    for i, options in enumerate(items):
        before = best
        best = before + options[0][1].loss
        for number, (_, option) in enumerate(options[1:], 1):
            more = -(-(option.size - smallest[i]) // unit)
            if more > units:
                break
            other = before[: units + 1 - more] + option.loss
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
