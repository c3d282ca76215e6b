"""The one list of the kinds of terms; :mod:`deltafmt.terms.codecs` and :mod:`deltafmt.kernels.registry` follow it.

The container reads layouts through this list, so it imports no codec.
"""

from __future__ import annotations

from typing import Any, Final

from deltafmt.format.checks import Where, fail
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout

LAYOUTS: Final[dict[str, type[TermLayout]]] = {
    layout.kind: layout for layout in (NMLayout, LowbitLayout, LowRankLayout, SparseLayout)
}


def parse_layout(obj: Any, where: Where) -> TermLayout:
    """Check a row of the layout table.

    Raises:
        InvalidFileError: the kind is unknown, or its parameters are wrong.
    """
    kind = obj.get("kind") if type(obj) is dict else NMLayout.kind
    if type(kind) is not str or kind not in LAYOUTS:
        fail((where, ".kind"), f"unknown layout {kind!r}")
    return LAYOUTS[kind].from_obj(obj, where)
