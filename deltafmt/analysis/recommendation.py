"""Which settings to try first, from a delta's norm, the width of its matrices and its spectrum.

These figures tell apart the kinds of fine-tunes that docs/accuracy.md measures. They say what worked there, not what is
good enough here: only the predictions of the restored model do, which ``deltafmt evaluate`` compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deltafmt.pipeline.file_writer import NARROW_COLUMNS

if TYPE_CHECKING:
    from deltafmt.analysis.report import Report

# Relative norms of the delta up to which it is small, and above which it is large.
SMALL_NORM, LARGE_NORM = 0.025, 0.06
# How many singular values' share of the squares is told.
DIRECTIONS = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting to try.

    Attributes:
        options: of ``deltafmt pack``.
        found: what it kept there, in words.
        times: about so many times smaller the file was, in words.
    """

    options: str
    found: str
    times: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to try first.

    Attributes:
        kind: ``same``, ``narrow``, ``small``, ``middle`` or ``large``.
        relative_norm: norm of all matrices' deltas over that of their bases; None where the base is zero.
        columns: the width of matrices: half of all elements are in matrices of so many columns, or fewer.
        energy: mean share of a delta's squares in its first 8 singular values; None where that is not known.
        settings: what to try, the best first.
    """

    kind: str
    relative_norm: float | None
    columns: int
    energy: float | None
    settings: Sequence[Setting]

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        return asdict(self)


def recommend(report: Report) -> Recommendation | None:
    """Return what to try first for a pair; None if no matrix was analyzed."""
    members = report.everything.members
    if not members:
        return None
    norm, energy = report.everything.relative_norm, report.everything.energy.get(DIRECTIONS)
    columns = median_columns([(one.pair.columns, one.norms.elements) for one in members])
    kind = kind_of(norm, columns)
    return Recommendation(kind, norm, columns, energy, SETTINGS[kind])


def median_columns(widths: Sequence[tuple[int, int]]) -> int:
    """Return the columns that matrices with half of all elements have at most, of (columns, elements) of each."""
    half = sum(elements for _, elements in widths) / 2
    for columns, elements in sorted(widths):
        half -= elements
        if half <= 0:
            return columns
    return 0


def kind_of(norm: float | None, columns: int) -> str:
    """Return the kind of a fine-tune whose delta has a relative norm, in matrices of so many columns."""
    if norm == 0:
        return "same"
    if columns <= NARROW_COLUMNS:
        return "narrow"
    if norm is None or norm > LARGE_NORM:
        return "large"
    return "small" if norm <= SMALL_NORM else "middle"


# Figures of docs/accuracy.md: real models for small and middle deltas, the two trained from nothing for large ones.
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "same": (Setting("--method exact", "nothing is lost, and nothing is stored", "any"),),
    "narrow": (
        Setting("--target-ratio 8", "methods are chosen that do not drop most of a row", "8"),
        Setting("--nm 2:2", "every element is kept and only rounded", "3.5"),
    ),
    "small": (
        Setting("--target-ratio 32", "as accurate as the fine-tune", "32"),
        Setting("--target-ratio 64", "2 to 3 points less", "64"),
        Setting("--target-ratio 128", "4 to 6 points less", "128"),
        Setting("--nm 7:32 --bits 4 --share 1", "as accurate as the fine-tune", "17"),
    ),
    "middle": (
        Setting("--target-ratio 16", "as accurate as the fine-tune", "16"),
        Setting("--target-ratio 32", "within a point", "32"),
        Setting("--target-ratio 64", "2 to 4 points less", "64"),
    ),
    "large": (
        Setting("--target-ratio 8", "as accurate as the fine-tune", "8"),
        Setting("--target-ratio 16", "within a point", "16"),
    ),
}
