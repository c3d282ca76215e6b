"""The kinds of layouts (spec/deltafmt-v1.md, section 7.3): what they have in common, and the one list of them."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Protocol

from deltafmt.format.checks import Where, fail
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import BufferForm


class Layout(Protocol):
    """How a term of one kind arranges its numbers: a value, equal to another with the same parameters.

    Attributes:
        kind: its name in the index.
        has_slots: whether a term says how many slots it has, on which the lengths of its buffers depend.
    """

    kind: ClassVar[str]
    has_slots: ClassVar[bool]

    @property
    def seeded(self) -> bool:
        """Whether a term has a seed."""

    @property
    def cold_only(self) -> bool:
        """Whether only a ``cold`` file may have this layout in its table."""

    def plain(self) -> Layout:
        """Return the layout in which digests are taken and kernels read."""

    def buffers(self, rows: int, columns: int, slots: int = 0) -> dict[str, BufferForm]:
        """Return the arrays of a term by name, sorted: the order in which they are stored and digested.

        Raises:
            UsageError: a term of this shape cannot have so many slots, or so many vectors.
        """

    def buffer_lengths(self, rows: int, columns: int, slots: int = 0) -> dict[str, int]:
        """Byte lengths of :meth:`buffers`."""

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form."""

    def describe(self) -> str:
        """Return a short form, without the kind."""


KINDS: Final[dict[str, type[NMLayout | LowbitLayout | LowRankLayout | SparseLayout]]] = {
    kind.kind: kind for kind in (NMLayout, LowbitLayout, LowRankLayout, SparseLayout)
}


def parse_layout(obj: Any, where: Where) -> Layout:
    """Check a row of the layout table."""
    kind = obj.get("kind") if type(obj) is dict else "nm"
    if type(kind) is not str or kind not in KINDS:
        fail((where, ".kind"), f"unknown layout {kind!r}")
    return KINDS[kind].from_obj(obj, where)
