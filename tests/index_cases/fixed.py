"""The cases of ``fixed``."""

from __future__ import annotations

from index_cases import IndexCases

CASES = IndexCases(fields=lambda layout, columns: (layout.kept(columns), layout.position_bits))
