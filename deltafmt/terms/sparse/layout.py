"""Parameters and sizes of the ``sparse`` layout (spec/deltafmt-v1.md, section 14)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from deltafmt.errors import UsageError
from deltafmt.format.checks import Where, check_fields, fail, parse_fields
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import TILE_ROWS, BufferForm, stream_words, tiles

GAP_BITS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 16)
SPANS: Final = tuple(2**n for n in range(8, 17))
RAW_VALUES: Final = ("BF16", "F16", "F32")
MAX_TERM_SLOTS: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class SparseLayout(TermLayout):
    """The layout of a ``sparse`` term: entries that stand anywhere.

    Attributes:
        values: how values are coded, with one scale a row, or the dtype in which they are stored as they are:
            ``BF16``, ``F16``, ``F32``.
        gap_bits: g, width of the distance from one entry to the next.
        span: columns of a block, a power of two from 256 to 65536.

    Raises:
        UsageError: a parameter is outside the specification.
    """

    values: Coding | str
    gap_bits: int = 8
    span: int = 4096

    kind: ClassVar[str] = "sparse"
    has_slots: ClassVar[bool] = True
    counted_as: ClassVar[Mapping[str, str]] = {
        "codes": "codes",
        "gaps": "index",
        "scales": "scales",
        "starts": "index",
        "values": "values",
    }

    def __post_init__(self) -> None:
        if isinstance(self.values, str):
            if self.values not in RAW_VALUES:
                raise UsageError(f"dtype of values {self.values!r} is not one of {', '.join(RAW_VALUES)}")
        elif self.values.scale_group or self.values.has_zero_points:
            raise UsageError("sparse values have one scale a row and no zero points")
        if self.gap_bits not in GAP_BITS:
            raise UsageError(f"gap bits {self.gap_bits} is not one of {', '.join(map(str, GAP_BITS))}")
        if self.span not in SPANS:
            raise UsageError(f"span {self.span} is not a power of two from {SPANS[0]} to {SPANS[-1]}")

    @property
    def filler(self) -> int:
        """The gap that stands for no entry, and the number of columns that it skips."""
        return (1 << self.gap_bits) - 1

    def blocks(self, columns: int) -> int:
        """Return the blocks of a row."""
        return -(-columns // self.span)

    def buffers(self, rows: int, columns: int, slots: int = 0) -> dict[str, BufferForm]:
        """Return the arrays of a term, in the order in which they are stored and digested.

        Raises:
            UsageError: so many slots cannot be needed.
        """
        most = min(tiles(rows) * columns, MAX_TERM_SLOTS)
        if slots > most:
            raise UsageError(f"{slots} slots are more than {most}, which is all that the shape can need")
        coding, forms = self.values, {}
        if isinstance(coding, Coding):
            forms["codes"] = BufferForm("U32", (coding.words(slots), TILE_ROWS))
        forms["gaps"] = BufferForm("U32", (stream_words(slots, self.gap_bits), TILE_ROWS))
        if isinstance(coding, Coding):
            forms["scales"] = BufferForm(coding.scale_dtype, (tiles(rows), 1, TILE_ROWS))
        forms["starts"] = BufferForm("U32", (tiles(rows) * self.blocks(columns) + 1,))
        if isinstance(coding, str):
            forms["values"] = BufferForm(coding, (slots, TILE_ROWS))
        return forms

    @classmethod
    def from_obj(cls, obj: Any, where: Where) -> SparseLayout:
        """Check a row of the layout table."""
        gap_bits, _, span, values = check_fields(obj, where, ("gap_bits", "kind", "span", "values"))
        for key, value in (("gap_bits", gap_bits), ("span", span)):
            if type(value) is not int:
                fail((where, ".", key), f"{value!r} is not an integer")
        if type(values) is not str:
            values = parse_fields(Coding, values, (where, ".values"))
        try:
            return cls(values, gap_bits, span)
        except UsageError as error:
            fail(where, str(error))

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form of this layout (spec section 7.3)."""
        values = self.values if isinstance(self.values, str) else self.values.to_obj()
        return {"gap_bits": self.gap_bits, "kind": "sparse", "span": self.span, "values": values}

    def describe(self) -> str:
        """Return a short form such as ``k=4 midtread gaps=5 span=4096``."""
        values = self.values if isinstance(self.values, str) else self.values.describe()
        return f"{values} gaps={self.gap_bits} span={self.span}"
