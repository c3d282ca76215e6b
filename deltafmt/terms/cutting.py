"""Cuts of the matrices of all kinds of terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from deltafmt.terms.buffers import Packed
from deltafmt.terms.codecs import AnyCodec
from deltafmt.terms.cut_term import CutTerm, is_whole
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.cut import cut_lowbit
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.cut import check_rank, cut_lowrank
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.cut import check_groups, cut_nm
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.cut import cut_sparse
from deltafmt.terms.sparse.layout import SparseLayout

CUTS: Final[dict[str, Callable[[Any, Packed, range, range], CutTerm]]] = {
    NMLayout.kind: cut_nm,
    LowbitLayout.kind: cut_lowbit,
    LowRankLayout.kind: cut_lowrank,
    SparseLayout.kind: cut_sparse,
}
_CHECKS: Final[dict[str, Callable[[Any, tuple[int, int], range, range], None]]] = {
    NMLayout.kind: check_groups,
    LowRankLayout.kind: check_rank,
}


def check_cut(layout: TermLayout, shape: tuple[int, int], rows: range, columns: range) -> None:
    """Refuse a cut that no term of this kind holds, before a byte is read.

    Raises:
        UsageError: says why.
    """
    if layout.kind in _CHECKS and not is_whole(rows, columns, shape):
        _CHECKS[layout.kind](layout, shape, rows, columns)


def cut(codec: AnyCodec, packed: Packed, rows: range, columns: range) -> CutTerm:
    """Return a cut of a term's matrix as a term of its own, in the form that kernels read.

    Args:
        codec: the term's codec.
        packed: the term's packed arrays.
        rows, columns: the cut.

    Raises:
        UsageError: no term of this kind holds the cut; see :func:`check_cut`.
        InvalidFileError: the buffers break the format.
    """
    layout: TermLayout = codec.layout
    if is_whole(rows, columns, codec.shape):
        plain = layout.plain()
        return CutTerm(plain, *codec.shape, codec.converted(packed, plain), codec.seed, codec.slots)
    return CUTS[layout.kind](codec, packed, rows, columns)
