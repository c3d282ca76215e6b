"""Vectors of deltas of several terms (section 10)."""

from __future__ import annotations

from vector_tools import summed, vector

from deltafmt.terms.coding import Coding
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout


@vector("ok", "two terms: their float32 sum is the delta")
def sum_of_terms() -> bytes:
    return summed(NMLayout(1, 4, 4), NMLayout(2, 16, 2, grid="midrise", share=8), rows=20, columns=32)


@vector("ok", "a sum of kinds: two bands of vectors, a seeded nm term, a lowbit term, a sparse term")
def sum_of_kinds() -> bytes:
    bands = LowRankLayout(2, Coding(8, scale_group=32)), LowRankLayout(5, Coding(3, scale_group=32))
    others = NMLayout(1, 8, 4, share=4), LowbitLayout(2, "midrise"), SparseLayout("F32", 2, 256)
    return summed(*bands, *others, rows=70, columns=50)
