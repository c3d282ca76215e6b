"""Parameters and sizes of the ``nm`` layout (spec/deltafmt-v1.md, section 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from deltafmt.errors import UsageError
from deltafmt.format.checks import Where, parse_fields
from deltafmt.terms.coding import check_scales
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm.index.encodings import ENCODINGS, IndexEncoding, position_bits, rank_bits
from deltafmt.terms.tiles import (
    GRIDS,
    TILE_ROWS,
    BufferForm,
    scale_words,
    stream_words,
    tiles,
)

BITS: Final = (1, 2, 3, 4, 5, 6, 8)
SHARES: Final = (1, 2, 4, 8)
MAX_M: Final = 255


@dataclass(frozen=True, slots=True)
class NMLayout(TermLayout):
    """The layout of an ``nm`` term: N kept elements in every group of M columns.

    Attributes:
        n: N, elements kept in each group.
        m: M, consecutive columns of a group.
        bits: k, width of a code.
        index: ``seeded``, ``fixed`` or ``rank``.
        grid: ``midtread`` (2**k - 1 levels, zero among them) or ``midrise`` (2**k levels, none zero).
        share: v, consecutive rows that keep the same positions.
        scale_dtype: ``BF16`` or ``F32``.
        scale_group: kept elements of a row that share a scale; 0 for one scale a row.

    Raises:
        UsageError: a parameter, or the combination, is outside the specification.
    """

    n: int
    m: int
    bits: int
    index: str = "seeded"
    grid: str = "midtread"
    share: int = 1
    scale_dtype: str = "BF16"
    scale_group: int = 0

    kind: ClassVar[str] = "nm"
    counted_as: ClassVar[Mapping[str, str]] = {"codes": "codes", "index": "index", "scales": "scales"}

    def __post_init__(self) -> None:
        if self.index not in ENCODINGS:
            raise UsageError(f"index encoding {self.index!r} is not one of {', '.join(ENCODINGS)}")
        if not 2 <= self.m <= MAX_M:
            raise UsageError(f"group size M = {self.m} is outside 2 to {MAX_M}")
        if not 1 <= self.n <= self.m:
            raise UsageError(f"N = {self.n} is outside 1 to M = {self.m}")
        if self.bits not in BITS:
            raise UsageError(f"bits k = {self.bits} is not one of {', '.join(map(str, BITS))}")
        if self.share not in SHARES:
            raise UsageError(f"share v = {self.share} is not one of {', '.join(map(str, SHARES))}")
        check_scales(self.bits, self.grid, self.scale_dtype, self.scale_group, GRIDS)
        self.encoding.check(self.n, self.m)

    @property
    def encoding(self) -> type[IndexEncoding]:
        """The rules of the index encoding."""
        return ENCODINGS[self.index]

    @property
    def top(self) -> int:
        """The largest stored field u, which is also twice the field that would mean zero.

        Both grids then share one formula: ``value = (2u - top) * scale / 2``.
        """
        return (1 << self.bits) - (2 if self.grid == "midtread" else 1)

    @property
    def seeded(self) -> bool:
        """True if a term has a seed."""
        return self.encoding.seeded

    @property
    def cold_only(self) -> bool:
        """True if only a ``cold`` file may have this layout in its table."""
        return self.encoding.cold_only

    def plain(self) -> NMLayout:
        """Return the layout in which digests are taken and kernels read: ``rank`` made ``fixed``."""
        return self.with_index(self.encoding.plain)

    @property
    def converted_buffers(self) -> tuple[str, ...]:
        """The index, if kernels read it in another encoding."""
        return () if self.encoding.plain == self.index else ("index",)

    @property
    def drops_most(self) -> bool:
        """True if the layout keeps less than half of each row."""
        return 2 * self.n < self.m

    def for_profile(self, profile: str) -> NMLayout:
        """Return the layout that a profile uses: ``fixed`` when hot, ``rank`` when cold where one exists and pays."""
        archived = None if profile == "hot" else self.encoding.archived(self.n, self.m)
        return self.plain() if profile == "hot" else self.with_index(archived) if archived else self

    @property
    def position_bits(self) -> int:
        """Width of a position in a ``fixed`` index: ceil(log2 M)."""
        return position_bits(self.m)

    @property
    def rank_bits(self) -> int:
        """Width of a group's rank in a ``rank`` index: ceil(log2 C(M, N))."""
        return rank_bits(self.n, self.m)

    def groups(self, columns: int) -> int:
        """Return the groups in a row of ``columns`` elements; the last may be short."""
        return -(-columns // self.m)

    def width(self, columns: int) -> int:
        """Return the elements of a row whose last group is made whole: decoding a row needs room for so many."""
        return self.groups(columns) * self.m

    def kept(self, columns: int) -> int:
        """Return the kept elements of a row, those beyond the last column included."""
        return self.groups(columns) * self.n

    def scales_per_row(self, columns: int) -> int:
        """Return the scales of a row."""
        if self.scale_group == 0:
            return 1
        return -(-self.kept(columns) // self.scale_group)

    def mask_rows(self, rows: int) -> int:
        """Return the rows of the index: one for every ``share`` rows."""
        return -(-rows // self.share)

    def row_tiles(self, rows: int) -> int:
        """Return the tiles of the codes and of the scales of ``rows`` rows."""
        return tiles(rows, self.share)

    def index_tiles(self, rows: int) -> int:
        """Return the tiles of the index of ``rows`` rows: the tiles of their mask rows."""
        return tiles(self.mask_rows(rows))

    def codes_words(self, columns: int) -> int:
        """Return the packed words of a row's codes."""
        return stream_words(self.kept(columns), self.bits)

    def index_words(self, columns: int) -> int:
        """Return the packed words of a mask row's index (0 for ``seeded``)."""
        return self.encoding.row_words(self.n, self.m, self.groups(columns))

    def buffers(self, rows: int, columns: int, slots: int = 0) -> dict[str, BufferForm]:  # noqa: ARG002 - of every kind
        """Return the arrays of a term, in the order in which they are stored and digested."""
        tiles_of_rows = self.row_tiles(rows)
        forms = {"codes": BufferForm("U32", (tiles_of_rows, self.codes_words(columns), TILE_ROWS))}
        if not self.seeded:
            forms["index"] = BufferForm("U32", (self.index_tiles(rows), self.index_words(columns), TILE_ROWS))
        forms["scales"] = BufferForm(self.scale_dtype, (tiles_of_rows, self.scales_per_row(columns), TILE_ROWS))
        return forms

    def with_index(self, index: str) -> NMLayout:
        """Return the same layout with another index encoding."""
        return self if index == self.index else replace(self, index=index)

    @classmethod
    def from_obj(cls, obj: Any, where: Where) -> NMLayout:
        """Check a row of the layout table."""
        return parse_fields(cls, obj, where, {"n": "keep", "m": "group"})

    def to_obj(self) -> dict[str, Any]:
        """Return the index's form of this layout (spec section 7.3)."""
        return {
            "bits": self.bits,
            "grid": self.grid,
            "group": self.m,
            "index": self.index,
            "keep": self.n,
            "kind": "nm",
            "scale_dtype": self.scale_dtype,
            "scale_group": self.scale_group,
            "share": self.share,
        }

    def describe(self) -> str:
        """Return a short form such as ``4:16 k=4 midtread seeded v=4``."""
        entries = f"{self.n}:{self.m} k={self.bits} {self.grid} {self.index} v={self.share}"
        return entries + scale_words(self.scale_group, self.scale_dtype)
