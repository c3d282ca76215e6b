"""The cases of ``seeded``."""

from __future__ import annotations

from hypothesis import strategies as st

from deltafmt.terms.nm import hashing
from index_cases import IndexCases

CASES = IndexCases(
    fields=lambda _layout, _columns: (0, 0),
    m=lambda max_m: st.integers(1, min(7, max_m.bit_length() - 1)).map(lambda log_m: 2**log_m),
    positions=lambda _rng, layout, seed, mask_rows, groups: hashing.seeded(
        seed, 0, mask_rows, groups, layout.n, layout.m
    ),
)
