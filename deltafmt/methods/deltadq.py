"""DeltaDQ: Group-wise Balanced Dropout and Delta Quantization.

"DeltaDQ: Distribution-Driven Delta Compression for Fine-tuned LLMs" (ACL submission; v2 is arXiv 2410.08666).
Section 3.4: in each group of M consecutive elements of a row, N chosen at random are kept and multiplied by M / N, the
others dropped, so that the expected product is unchanged. Section 3.5: kept elements are quantized uniformly to k bits
with the min-max scale of equation 9.

Beyond the paper: rows may share their positions (``share``), a scale serves a row rather than a matrix, the midrise
grid and the least-squares scale help below 4 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.delta import row_ranges
from deltafmt.methods.base import REACH, DeltaRows, Method, PackedTerm
from deltafmt.methods.common import (
    BITS,
    DROPPED,
    GAIN,
    GRID,
    RESCALE,
    SCALE_GROUP,
    BitsOption,
    CodeOptions,
    KeptOptions,
    PositionOptions,
)
from deltafmt.methods.declare import Needs, option
from deltafmt.methods.expected import Expected, Sampled, dropped
from deltafmt.methods.grids import Grid
from deltafmt.methods.pack_kept import pack_kept
from deltafmt.methods.quantize import default_grid, default_rule, quantize
from deltafmt.methods.sampling import uniform
from deltafmt.terms.nm.codec import NMArrays, slice_run
from deltafmt.terms.nm.hashing import seeded
from deltafmt.terms.nm.layout import NMLayout


@dataclass(frozen=True)
class DropoutOptions(CodeOptions, PositionOptions, BitsOption, KeptOptions):
    """Options of group-wise dropout: which entries are kept, and how they are stored.

    Attributes:
        n, m: N and M: entries kept in each group of M columns.
        bits: k, width of a code.
        index: ``seeded`` (no index bytes; M a power of two to 128), ``fixed`` or ``rank`` (any M to 255).
        share: v, consecutive rows that keep the same positions; 1 is the paper's method to the letter.
        grid: ``midtread``, ``midrise`` or None: midrise for k of 1 and 2, midtread above.
        scale: ``minmax`` (eq. 9), ``mse`` or None: mse for k below 4, minmax from there on.
        scale_group: kept entries that share a scale; 0 for one scale a row.
        scale_dtype: ``BF16`` or ``F32``.
        rescale: multiply kept entries by M / N (section 3.4, step 2).
        gain: multiply them by this as well. Codes stay the same, and scales are so many times longer. None is 1 in a
            pack, and the gain of least expected loss where a target chooses.
    """

    bits: int = option(4, BITS, values="1 to 6, or 8")
    grid: str | None = option(
        None, GRID, help="the levels of codes: midtread has a zero, midrise has none", choices=("midtread", "midrise")
    )
    scale_group: int = option(0, SCALE_GROUP, help="consecutive kept entries that share a scale; 0 for one scale a row")
    rescale: bool = option(True, RESCALE)
    gain: float | None = option(None, GAIN)

    @property
    def reach(self) -> float:
        """Kept elements are multiplied by the gain as well."""
        return REACH * max(self.gain or 1.0, 1.0)


@dataclass(frozen=True)
class DeltaDQ(DropoutOptions, Method):
    """The method, with the options of :class:`DropoutOptions`.

    Raises:
        UsageError: an option is out of range.
    """

    name = "deltadq"
    at_random = True
    summary = "random N of every M columns, rescaled, as k-bit codes"
    details = (
        "In each group of M consecutive columns of a row, N random entries are kept and multiplied by M/N, and the "
        "others are dropped. Kept entries are rounded to codes of k bits, with a scale for each row."
    )
    paper = "DeltaDQ: Distribution-Driven Delta Compression for Fine-tuned LLMs, sections 3.4 and 3.5 (ACL submission)"
    stores = "an nm term: codes, scales, and positions that take no bytes unless index says so"
    example = "deltadq:nm=2:16,bits=2"
    needs: ClassVar[Needs] = {"rescale": (DROPPED,)}

    def check(self) -> None:
        """Check that the options make a layout."""
        _ = self.layout

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        return self.scale or default_rule(self.bits)

    @functools.cached_property
    def layout(self) -> NMLayout:
        """The layout of the term."""
        return NMLayout(
            self.n,
            self.m,
            self.bits,
            self.index,
            self.grid or default_grid(self.bits),
            self.share,
            self.scale_dtype,
            self.scale_group,
        )

    def layouts(self, rows: int, columns: int) -> tuple[NMLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (self.layout,)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        text = f"deltadq {self.layout.describe()} {self.scale_rule}"
        text = text if self.rescale else f"{text} unrescaled"
        return text if self.gain is None else f"{text} gain={self.gain:g}"

    def draw(self, rows: DeltaRows, seed: int) -> NDArray[np.uint8]:
        """Return the positions that are kept of a run of rows, shape (mask rows, groups, N)."""
        layout = self.layout
        count, columns = rows.shape
        draw = seeded if self.index == "seeded" else uniform
        return draw(seed, rows.first // self.share, layout.mask_rows(count), layout.groups(columns), self.n, self.m)

    @property
    def factor(self) -> np.float32:
        """The factor that kept entries are multiplied by."""
        return np.float32((self.m / self.n if self.rescale else 1) * (self.gain or 1))

    def quantize(self, positions: NDArray[np.uint8], kept: NDArray[np.float32]) -> NMArrays:
        """Return the arrays of kept entries; NaN marks an entry beyond the last column."""
        codes, scales = quantize(kept, self.bits, self.layout.grid, self.scale_rule, self.scale_group, self.scale_dtype)
        return NMArrays(positions, codes, scales)

    def compress(self, rows: DeltaRows, seed: int) -> tuple[NMArrays]:
        """Drop, rescale and quantize a run of rows with the tensor's seed, 32 bits."""
        positions = self.draw(rows, seed)
        kept = rows.gather(positions, self.m, self.share, self.factor)
        return (self.quantize(positions, kept),)

    @functools.cached_property
    def code_grid(self) -> Grid:
        """The grid of the codes and the rule of their scales."""
        return Grid(self.bits, self.layout.grid, self.scale_rule, self.scale_group, self.scale_dtype)

    def expected(self, sample: Sampled) -> Expected:
        """Return what is expected of dropout: a formula in norms, and the rounding of some rows."""
        remainder = sample.whole()
        kept = remainder.rounded(self.n, self.m, self.code_grid)
        factor = float(self.factor)
        share, squares, more = dropped(self.n, self.m, factor, kept, sample.squares)
        varied = sample.variance(remainder, self.n, self.m, self.share, factor * kept.along)
        beside = squares - (2 * share - 1) * sample.common - 2 * more
        return Expected(share * sample.rest - more, beside, varied, (1 - self.n / self.m) * squares)

    def with_gain(self, gain: float) -> DeltaDQ | None:
        """Return the method with a gain; None if it has one."""
        return _with_gain(self, gain) if self.gain is None else None

    def pack(self, rows: DeltaRows, seed: int, terms: Sequence[PackedTerm]) -> None:
        """Do what :meth:`compress` does, and pack the result, in one pass over the rows."""
        (term,) = terms
        width, step = term.codec.width, term.codec.run_rows
        for start, stop in row_ranges(rows.first, rows.first + rows.shape[0], width, step):
            run = rows.run(start, stop)
            packed = slice_run(term.packed, self.share, start, stop)
            pack_kept(run, self.draw(run, seed), self.layout, self.scale_rule, self.factor, packed)


@functools.lru_cache(4096)
def _with_gain(method: DeltaDQ, gain: float) -> DeltaDQ:
    return replace(method, gain=gain)
