"""Parameters and sizes of the ``lowrank`` layout (spec/deltafmt-v1.md, section 13)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from deltafmt.errors import UsageError
from deltafmt.format.checks import Where, check_fields, fail, parse_fields
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import BufferForm

MAX_VECTORS: Final = 65535
RAW_FACTORS: Final = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class LowRankLayout(TermLayout):
    """How a ``lowrank`` term arranges one band of vectors: a sum of outer products.

    Attributes:
        rank: R, vectors on either side.
        factors: how every vector is coded, or the dtype in which it is stored as it is: ``BF16``, ``F16``, ``F32``.

    Raises:
        UsageError: a parameter is outside the specification.
    """

    rank: int
    factors: Coding | str

    kind: ClassVar[str] = "lowrank"
    counted_as: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("u", "v"), "factors"),
        **dict.fromkeys(("u_codes", "v_codes"), "codes"),
        **dict.fromkeys(("u_scales", "v_scales"), "scales"),
        **dict.fromkeys(("u_zero_points", "v_zero_points"), "zero points"),
    }

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_VECTORS:
            raise UsageError(f"rank R = {self.rank} is outside 1 to {MAX_VECTORS}")
        if isinstance(self.factors, str) and self.factors not in RAW_FACTORS:
            raise UsageError(f"dtype of factors {self.factors!r} is not one of {', '.join(RAW_FACTORS)}")

    def buffers(self, rows: int, columns: int, slots: int = 0) -> dict[str, BufferForm]:  # noqa: ARG002 - of every kind
        """Return the arrays of a term, in the order in which they are stored and digested.

        Raises:
            UsageError: there are more vectors than a matrix of this shape can need.
        """
        if self.rank > min(rows, columns):
            raise UsageError(f"rank R = {self.rank} is more than a matrix of {rows} x {columns} has")
        return {**self._factor("u", rows), **self._factor("v", columns)}

    def _factor(self, side: str, length: int) -> dict[str, BufferForm]:
        coding = self.factors
        if isinstance(coding, str):
            return {side: BufferForm(coding, (self.rank, length))}
        scales = self.rank, coding.scales(length)
        forms = {
            f"{side}_codes": BufferForm("U32", (self.rank, coding.words(length))),
            f"{side}_scales": BufferForm(coding.scale_dtype, scales),
        }
        if coding.has_zero_points:
            forms[f"{side}_zero_points"] = BufferForm("U8", scales)
        return forms

    @classmethod
    def from_obj(cls, obj: Any, where: Where) -> LowRankLayout:
        """Check a row of the layout table."""
        factors, _, rank = check_fields(obj, where, ("factors", "kind", "rank"))
        if type(rank) is not int:
            fail((where, ".rank"), f"{rank!r} is not an integer")
        if type(factors) is not str:
            factors = parse_fields(Coding, factors, (where, ".factors"))
        try:
            return cls(rank, factors)
        except UsageError as error:
            fail(where, str(error))

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form of this layout (spec section 7.3)."""
        coding = self.factors
        factors = coding if isinstance(coding, str) else coding.to_obj()
        return {"factors": factors, "kind": "lowrank", "rank": self.rank}

    def describe(self) -> str:
        """Return a short form such as ``r=32 k=3 midtread scale/128``."""
        return f"r={self.rank} {self.factors if isinstance(self.factors, str) else self.factors.describe()}"
