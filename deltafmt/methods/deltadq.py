"""DeltaDQ: Group-wise Balanced Dropout and Delta Quantization.

"DeltaDQ: Distribution-Driven Delta Compression for Fine-tuned LLMs" (ACL submission; v2 is arXiv 2410.08666).
Section 3.4: in each group of M consecutive elements of a row, N chosen at random are kept and multiplied by M / N, the
others dropped, so that the expected product is unchanged. Section 3.5: what is kept is quantized uniformly to k bits
with the min-max scale of equation 9.

Beyond the paper: rows may share their positions (``share``), a scale serves a row rather than a matrix, the midrise
grid and the least-squares scale help below 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.method_routines import Routines
from deltafmt.methods.options import option, parse_nm
from deltafmt.methods.quantize import SCALE_RULES, default_grid, default_rule
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout


def read_nm(text: str) -> dict[str, int]:
    """Return the fields n and m for ``N:M``."""
    return dict(zip(("n", "m"), parse_nm(text), strict=True))


@dataclass(frozen=True, slots=True)
class DeltaDQ(Method):
    """Options of the method.

    Attributes:
        n, m: N and M: entries kept in each group of M columns.
        bits: k, width of a code.
        index: ``seeded`` (no index bytes; M a power of two to 128), ``fixed`` or ``rank`` (any M to 255).
        share: v, consecutive rows that keep the same positions; 1 is the paper's method to the letter.
        grid: ``midtread``, ``midrise`` or None: midrise for k of 1 and 2, midtread above.
        scale: ``minmax`` (eq. 9), ``mse`` or None: mse for k below 4, minmax from there on.
        scale_group: kept entries that share a scale; 0 for one scale a row.
        scale_dtype: ``BF16`` or ``F32``.
        rescale: multiply what is kept by M / N (section 3.4, step 2).

    Raises:
        UsageError: an option is out of range.
    """

    n: int = option(4, "keep N of every M columns (4:16)", "N:M", key="nm", parse=read_nm)
    m: int = 16
    bits: int = option(4, "bits of a code: 1-6 or 8 (4)", "K")
    index: str = option("seeded", "seeded (no index bytes), fixed, or rank (cold files)", "KIND")
    share: int = option(4, "rows that share positions: 1, 2, 4, 8 (4)", "V")
    grid: str | None = option(None, "midtread or midrise (midrise for 1 and 2 bits)", "KIND")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_group: int = option(0, "kept entries that share a scale (a whole row)", "G")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")
    rescale: bool = option(True, "multiply what is kept by M/N (yes)")

    name = "deltadq"
    at_random = True
    summary = "group-wise balanced dropout with rescale, and k-bit quantization (DeltaDQ)"

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale not in SCALE_RULES:
            raise UsageError(f"scale rule {self.scale!r} is not one of {', '.join(SCALE_RULES)}")
        _ = self.layout

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        return self.scale or default_rule(self.bits)

    @property
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
        return text if self.rescale else f"{text} unrescaled"

    def draw(self, rows: DeltaRows, seed: int) -> NDArray[np.uint8]:
        """Return the positions that a run of rows keeps, shape (mask rows, groups, N)."""
        layout, routines = self.layout, rows.routines
        count, columns = rows.shape
        draw = routines.codec.seeded if self.index == "seeded" else routines.uniform
        return draw(seed, rows.first // self.share, layout.mask_rows(count), layout.groups(columns), layout.n, layout.m)

    @property
    def factor(self) -> np.float32:
        """What kept entries are multiplied by."""
        return np.float32(self.m / self.n if self.rescale else 1)

    def quantize(self, positions: NDArray[np.uint8], kept: NDArray[np.float32], routines: Routines) -> NMArrays:
        """Return the arrays of entries that are kept; NaN marks one beyond the last column."""
        codes, scales = routines.quantize(
            kept, self.bits, self.layout.grid, self.scale_rule, self.scale_group, self.scale_dtype
        )
        return NMArrays(positions, codes, scales)

    def compress(self, rows: DeltaRows, seed: int) -> tuple[NMArrays]:
        """Drop, rescale and quantize a run of rows with the tensor's seed, 32 bits."""
        positions = self.draw(rows, seed)
        kept = rows.gather(positions, self.m, self.share, self.factor)
        return (self.quantize(positions, kept, rows.routines),)
