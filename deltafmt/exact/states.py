"""Finite-state-entropy codes of small numbers, as zstd has them (RFC 8878, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# The first number of a description is the logarithm of the number of states, less this.
_LEAST_LOG: Final = 5

# A field and its bits.
Field = tuple[int, int]


class States:
    """A code with ``2**log`` states.

    Numbers are coded from the last one to the first one. Each number has a share of the states. The lowest bits of the
    state before it are written and dropped until the state is less than twice the share.

    Args:
        counts: how often each number occurs; at least two do.
        log: the logarithm of the number of states; 64 states at least.
    """

    def __init__(self, counts: Sequence[int], log: int) -> None:
        self.log = log
        size, total = 1 << log, sum(counts)
        shares = [max((count << log) // total, int(count > 0)) for count in counts]
        while not shares[-1]:
            shares.pop()
        while left := size - sum(shares):
            shares[shares.index(max(shares))] += left if left > 0 else -1
        self._shares = shares
        self._states: list[list[int]] = [[] for _ in shares]
        place = 0
        spread = [0] * size
        for number, share in enumerate(shares):
            for _ in range(share):
                spread[place] = number
                place = (place + (size >> 1) + (size >> 3) + 3) % size
        for place, number in enumerate(spread):
            self._states[number].append(size + place)

    def after(self, state: int | None, number: int) -> tuple[int, Field]:
        """Return the state behind a number, and the bits of the state before it that are written."""
        if state is None:
            return self._states[number][0], (0, 0)
        share, bits = self._shares[number], 0
        while state >> bits >= 2 * share:
            bits += 1
        return self._states[number][(state >> bits) - share], (state & (1 << bits) - 1, bits)

    def end(self, state: int | None) -> Field:
        """Return the field of the last state."""
        assert state is not None
        return state - (1 << self.log), self.log

    def description(self) -> list[Field]:
        """Return the fields that describe the code (RFC 8878, section 4.1.1)."""
        fields = [(self.log - _LEAST_LOG, 4)]
        remaining, threshold, width = (1 << self.log) + 1, 1 << self.log, self.log + 1
        number = 0
        while number < len(self._shares):
            share = self._shares[number]
            value, top = share + 1, 2 * threshold - 1 - remaining
            remaining -= share
            if value >= threshold:
                value += top
            fields.append((value, width - (value < top)))
            while remaining < threshold:
                threshold, width = threshold >> 1, width - 1
            number += 1
            if share:
                continue
            # How many more zeros follow: 3 means that a number follows again.
            zeros = 0
            while not self._shares[number + zeros]:
                zeros += 1
            fields += [(3, 2)] * (zeros // 3) + [(zeros % 3, 2)]
            number += zeros
        return fields
