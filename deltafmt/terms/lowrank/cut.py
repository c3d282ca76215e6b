"""Cuts of ``lowrank`` terms (specification, appendix A.3)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from deltafmt.errors import UsageError
from deltafmt.terms.buffers import Packed, blank
from deltafmt.terms.coding import Coding
from deltafmt.terms.cut_term import CutTerm, finer, spread
from deltafmt.terms.floats import Raw
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowrank.codec import LowRankArrays, LowRankCodec, coded_vectors
from deltafmt.terms.lowrank.layout import LowRankLayout


def cut_lowrank(codec: LowRankCodec, packed: Packed, rows: range, columns: range) -> CutTerm:
    """Return a cut of a term; see :func:`deltafmt.terms.cutting.cut`: of each vector the elements of the cut."""
    layout = codec.layout
    check_rank(layout, codec.shape, rows, columns)
    coding = layout.factors
    if isinstance(coding, Coding):
        # Both sides have groups of one size.
        group = finer(coding.scale_group, max(codec.shape), rows.start, columns.start)
        layout = LowRankLayout(layout.rank, replace(coding, scale_group=group))
    u, v = (_vectors(codec, packed, side, layout.factors, run) for side, run in (("u", rows), ("v", columns)))
    out = blank(layout, len(rows), len(columns))
    LowRankCodec(layout, len(rows), len(columns)).encode(LowRankArrays(u, v), out)
    return CutTerm(layout, len(rows), len(columns), out)


def check_rank(layout: LowRankLayout, _shape: tuple[int, int], rows: range, columns: range) -> None:
    """Refuse a cut with fewer rows or columns than vectors.

    Raises:
        UsageError: it has.
    """
    if layout.rank > min(len(rows), len(columns)):
        raise UsageError(f"a cut of {len(rows)} x {len(columns)} has no {layout.rank} vectors")


def _vectors(codec: LowRankCodec, packed: Packed, side: str, target: Coding | str, run: range) -> LowbitArrays | Raw:
    """Return some elements of the vectors of one side."""
    coding = codec.layout.factors
    if isinstance(coding, str) or isinstance(target, str):
        return np.ascontiguousarray(packed[side][:, run.start : run.stop])
    length = codec.shape[0 if side == "u" else 1]
    whole = coded_vectors(coding, side, packed, length, 0, length)
    where = coding.scale_group, target.scale_group, run.start, len(run)
    zero_points = None if whole.zero_points is None else spread(whole.zero_points, *where)
    return LowbitArrays(whole.codes[:, run.start : run.stop], spread(whole.scales, *where), zero_points)
