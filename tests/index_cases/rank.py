"""The cases of ``rank``."""

from __future__ import annotations

import math
from functools import cache

from index_cases import IndexCases


@cache
def rankable(m: int) -> tuple[int, ...]:
    """Return the Ns whose ranks fit into 64 bits."""
    return tuple(n for n in range(1, m + 1) if math.comb(m, n) < 2**64)


CASES = IndexCases(fields=lambda layout, columns: (layout.groups(columns), layout.rank_bits), n=rankable)
