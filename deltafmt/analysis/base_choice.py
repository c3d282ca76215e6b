"""Which checkpoints of several to keep whole as bases, so that all together take least: a greedy choice."""

from __future__ import annotations

from collections.abc import Mapping

# Bytes that a base (first) saves of a fine-tune (second); pairs that save nothing are left out.
Gains = Mapping[tuple[int, int], int]


def choose_bases(count: int, gains: Gains) -> dict[int, list[int]]:
    """Return the fine-tunes of each base, both by their numbers.

    The base that saves most of those that are left is taken first, the earlier of two that save the same. At the end,
    each fine-tune goes to the base that saves most of it.

    Args:
        count: number of checkpoints.
        gains: what each saves of each.
    """
    left = set(range(count))
    bases: list[int] = []
    while left:
        sums = {base: sum(gains.get((base, each), 0) for each in left if each != base) for base in sorted(left)}
        base = max(sums, key=lambda each: sums[each])
        if sums[base] <= 0:
            break
        bases.append(base)
        left -= {base, *(each for each in left if gains.get((base, each), 0) > 0)}
    found: dict[int, list[int]] = {base: [] for base in bases}
    for each in range(count):
        if each not in found:
            best = max(bases, key=lambda base: gains.get((base, each), 0), default=None)
            if best is not None and gains.get((best, each), 0) > 0:
                found[best].append(each)
    return found
