"""The codec of each kind of term, by the kind's name."""

from __future__ import annotations

from typing import Any, Final

from deltafmt.terms.codec import TermArrays, TermCodec
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.codec import LowbitCodec
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.codec import LowRankCodec
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.codec import NMCodec
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.codec import SparseCodec
from deltafmt.terms.sparse.layout import SparseLayout

AnyCodec = TermCodec[Any, Any]

CODECS: Final[dict[str, type[AnyCodec]]] = {
    NMLayout.kind: NMCodec,
    LowbitLayout.kind: LowbitCodec,
    LowRankLayout.kind: LowRankCodec,
    SparseLayout.kind: SparseCodec,
}


def term_codec(layout: TermLayout, rows: int, columns: int, seed: int = 0, slots: int = 0) -> AnyCodec:
    """Return the codec of a term with this layout, shape, seed and number of slots."""
    return CODECS[layout.kind](layout, rows, columns, seed, slots)


def fitted(layout: TermLayout, arrays: TermArrays, columns: int) -> tuple[TermLayout, int]:
    """Return the layout and the number of slots of a term that holds these arrays.

    Args:
        layout: what the method planned from the shape alone.
        arrays: what the method gave for a delta.
        columns: the columns of the matrix.
    """
    found: tuple[TermLayout, int] = CODECS[layout.kind].fit(layout, arrays, columns)
    return found
