"""Parameters and sizes of the ``lowbit`` layout (spec/deltafmt-v1.md, section 12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from deltafmt.errors import UsageError
from deltafmt.format.checks import Where, parse_fields
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import TILE_ROWS, BufferForm, tiles

AXES: Final = ("row", "column")


@dataclass(frozen=True, slots=True)
class LowbitLayout(Coding, TermLayout):
    """The layout of a ``lowbit`` term: a code for every element.

    Attributes:
        axis: ``row``: scales belong to rows, or to runs of a row; ``column``: there is one scale a column.

    Raises:
        UsageError: a parameter, or the combination, is outside the specification.
    """

    axis: str = "row"

    kind: ClassVar[str] = "lowbit"
    counted_as: ClassVar[Mapping[str, str]] = {"codes": "codes", "scales": "scales", "zero_points": "zero points"}

    def __post_init__(self) -> None:
        Coding.__post_init__(self)
        if self.axis not in AXES:
            raise UsageError(f"axis {self.axis!r} is not one of {', '.join(AXES)}")
        if self.axis == "column" and self.scale_group:
            raise UsageError(f"scales of columns have scale group 0, not {self.scale_group}")
        if self.axis == "column" and self.has_zero_points:
            raise UsageError("an asymmetric grid has its scales along rows")

    def buffers(self, rows: int, columns: int, slots: int = 0) -> dict[str, BufferForm]:  # noqa: ARG002 - of every kind
        """Return the arrays of a term, in the order in which they are stored and digested."""
        scales = (columns,) if self.axis == "column" else (tiles(rows), self.scales(columns), TILE_ROWS)
        forms = {
            "codes": BufferForm("U32", (tiles(rows), self.words(columns), TILE_ROWS)),
            "scales": BufferForm(self.scale_dtype, scales),
        }
        if self.has_zero_points:
            forms["zero_points"] = BufferForm("U8", scales)
        return forms

    @classmethod
    def from_obj(cls, obj: Any, where: Where) -> LowbitLayout:
        """Check a row of the layout table."""
        return parse_fields(cls, obj, where)

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form of this layout (spec section 7.3)."""
        return dict(sorted({**Coding.to_obj(self), "axis": self.axis, "kind": "lowbit"}.items()))

    def describe(self) -> str:
        """Return a short form such as ``k=3 midtread scale/128``."""
        return Coding.describe(self) + (" by column" if self.axis == "column" else "")
