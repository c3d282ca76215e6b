"""Which checkpoints of several to keep whole as bases, so that all together take least: a greedy choice."""

from __future__ import annotations

from collections.abc import Mapping

# Bytes that a base (first) saves of a fine-tune (second); pairs that save nothing are left out.
Gains = Mapping[tuple[int, int], int]


def choose_bases(count: int, gains: Gains, named: Mapping[int, int] | None = None) -> dict[int, list[int]]:
    """Return the fine-tunes of each base, both by their numbers.

    A base that a fine-tune names is taken if it saves something of it. Of those that are left, the base that saves most
    is taken first, the earlier of two that save the same. At the end, each fine-tune goes to the base that it names, or
    to the one that saves most of it.

    Args:
        count: number of checkpoints.
        gains: what each saves of each.
        named: the base that a fine-tune names, by the fine-tune; no base names another one.
    """
    told = {each: base for each, base in (named or {}).items() if gains.get((base, each), 0) > 0}
    bases = list(dict.fromkeys(told.values()))
    left = {each for each in range(count) if each not in bases and each not in told}
    left -= {each for each in left if any(gains.get((base, each), 0) > 0 for base in bases)}
    while left:
        sums = {base: sum(gains.get((base, each), 0) for each in left if each != base) for base in sorted(left)}
        base = max(sums, key=lambda each: sums[each])
        if sums[base] <= 0:
            break
        bases.append(base)
        left -= {base, *(each for each in left if gains.get((base, each), 0) > 0)}
    found: dict[int, list[int]] = {base: [] for base in bases}
    for each in range(count):
        if each in told:
            found[told[each]].append(each)
        elif each not in found:
            best = max(bases, key=lambda base: gains.get((base, each), 0), default=None)
            if best is not None and gains.get((best, each), 0) > 0:
                found[best].append(each)
    return found
