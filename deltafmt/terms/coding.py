"""A row of numbers as k-bit codes with scales (specification, section 12.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from deltafmt.errors import UsageError
from deltafmt.terms.tiles import GRIDS, MAX_SCALE_GROUP, SCALE_BYTES, scale_words, stream_words

MAX_BITS: Final = 8
CODING_GRIDS: Final = (*GRIDS, "asymmetric")


def check_scales(bits: int, grid: str, scale_dtype: str, scale_group: int, grids: tuple[str, ...]) -> None:
    """Check how codes of k bits are scaled, for a layout whose grid may be one of ``grids``.

    Raises:
        UsageError: a parameter, or the combination, is outside the specification.
    """
    if grid not in grids:
        raise UsageError(f"grid {grid!r} is not one of {', '.join(grids)}")
    if grid == "midtread" and bits == 1:
        raise UsageError("a midtread grid of 1 bit has no level but zero; use midrise")
    if scale_dtype not in SCALE_BYTES:
        raise UsageError(f"scale dtype {scale_dtype!r} is not one of {', '.join(SCALE_BYTES)}")
    if not 0 <= scale_group <= MAX_SCALE_GROUP:
        raise UsageError(f"scale group {scale_group} is outside 0 to {MAX_SCALE_GROUP}")


@dataclass(frozen=True, slots=True)
class Coding:
    """k-bit codes, one for every number, and scales for runs of them.

    Attributes:
        bits: k, width of a code: 1 to 8.
        grid: ``midtread``, ``midrise``, or ``asymmetric``: every scale has a zero point.
        scale_dtype: ``BF16`` or ``F32``.
        scale_group: consecutive numbers of a row that share a scale; 0 for one scale a row.

    Raises:
        UsageError: a parameter, or the combination, is outside the specification.
    """

    bits: int
    grid: str = "midtread"
    scale_dtype: str = "BF16"
    scale_group: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise UsageError(f"bits k = {self.bits} is outside 1 to {MAX_BITS}")
        check_scales(self.bits, self.grid, self.scale_dtype, self.scale_group, CODING_GRIDS)

    @property
    def has_zero_points(self) -> bool:
        """True if every scale has a zero point."""
        return self.grid == "asymmetric"

    @property
    def top(self) -> int:
        """The largest stored field u. On the symmetric grids, u = top / 2 would mean zero."""
        return (1 << self.bits) - (2 if self.grid == "midtread" else 1)

    def words(self, count: int) -> int:
        """Return the packed words of a row of ``count`` numbers."""
        return stream_words(count, self.bits)

    def scales(self, count: int) -> int:
        """Return the scales of a row of ``count`` numbers."""
        return -(-count // self.scale_group) if self.scale_group else 1

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form of this coding."""
        return {
            "bits": self.bits,
            "grid": self.grid,
            "scale_dtype": self.scale_dtype,
            "scale_group": self.scale_group,
        }

    def describe(self) -> str:
        """Return a short form such as ``k=3 midtread scale/128``."""
        return f"k={self.bits} {self.grid}{scale_words(self.scale_group, self.scale_dtype)}"
