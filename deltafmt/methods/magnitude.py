"""Magnitude pruning: keep the largest elements of a delta, wherever they stand or N of every M columns.

Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks" (arXiv 1506.02626),
section 3, applied to the delta; N of M as in Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv
2104.08378), section 3. What is kept is not rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.deltadq import read_nm
from deltafmt.methods.largest import keep_largest, threshold
from deltafmt.methods.options import option
from deltafmt.methods.quantize import SCALE_RULES, default_grid, default_rule
from deltafmt.methods.sampling import gather
from deltafmt.methods.unstructured import sparse_layout, sparse_term
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.codec import SparseArrays
from deltafmt.terms.sparse.layout import SparseLayout

DENSITY = 0.1
NM_BITS = 4


@dataclass(frozen=True, slots=True)
class Magnitude(Method):
    """Options of the method.

    Attributes:
        density: share of a matrix's elements that are kept, wherever they stand; DENSITY where neither this nor N:M is
            given.
        bits: k, width of a code; None keeps values as they are, or with N:M has codes of NM_BITS bits.
        n, m: N and M: entries kept in each group of M columns of a row.
        value_dtype: of values that are kept as they are: ``BF16``, ``F16`` or ``F32``.
        index: of N:M: ``fixed``, or ``rank`` for cold files.
        share: of N:M: v, consecutive rows that keep the same positions, those of the largest sums of squares.
        scale: of codes: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_dtype: ``BF16`` or ``F32``; there is one scale a row.
        rescale: divide what is kept by the share that is kept.

    Raises:
        UsageError: an option, or the combination, is out of range.
    """

    density: float | None = option(None, "share of the elements that are kept (0.1)", "D")
    bits: int | None = option(None, "bits of a code: 1-8 (values as they are; 4 with N:M)", "K")
    n: int | None = option(None, "keep N of every M columns, in place of a share", "N:M", key="nm", parse=read_nm)
    m: int | None = None
    value_dtype: str = option("BF16", "of values as they are: BF16, F16 or F32 (BF16)", "DTYPE")
    index: str = option("fixed", "of N:M: fixed, or rank (cold files) (fixed)", "KIND")
    share: int = option(1, "of N:M: rows that share positions: 1, 2, 4, 8 (1)", "V")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")
    rescale: bool = option(False, "divide what is kept by the share that is kept (no)")

    name = "magnitude"
    summary = "the largest elements, anywhere or N of every M columns"

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale not in SCALE_RULES:
            raise UsageError(f"scale rule {self.scale!r} is not one of {', '.join(SCALE_RULES)}")
        if (self.n is None) != (self.m is None):
            raise UsageError("N and M are given together")
        if self.n is not None and self.density is not None:
            raise UsageError(f"density {self.density} and {self.n}:{self.m} both say what is kept")
        if self.index == "seeded":
            raise UsageError("index 'seeded' cannot hold positions that the values choose; use fixed or rank")
        _ = self.layout

    @property
    def whole(self) -> bool:
        """Whether what is kept of a row depends on all rows."""
        return self.n is None

    @property
    def kept(self) -> float:
        """The share of the elements that is kept."""
        if self.n is not None and self.m is not None:
            return self.n / self.m
        return DENSITY if self.density is None else self.density

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        bits = NM_BITS if self.bits is None and self.n is not None else self.bits
        return self.scale or ("minmax" if bits is None else default_rule(bits))

    @property
    def layout(self) -> SparseLayout | NMLayout:
        """The layout of the term."""
        if self.n is None or self.m is None:
            return sparse_layout(self.kept, self.bits, self.value_dtype, self.scale_dtype)
        bits = NM_BITS if self.bits is None else self.bits
        return NMLayout(self.n, self.m, bits, self.index, default_grid(bits), self.share, self.scale_dtype)

    def layouts(self, rows: int, columns: int) -> tuple[SparseLayout | NMLayout]:  # noqa: ARG002 - of every shape
        """Return the layout of its one term."""
        return (self.layout,)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        layout = self.layout
        coded = isinstance(layout, NMLayout) or self.bits is not None
        share = "" if isinstance(layout, NMLayout) else f" {self.kept}"
        text = f"magnitude{share} {layout.describe()}{f' {self.scale_rule}' if coded else ''}"
        return f"{text} rescaled" if self.rescale else text

    def compress(self, rows: DeltaRows, seed: int) -> tuple[SparseArrays | NMArrays]:  # noqa: ARG002 - nothing is drawn
        """Keep the largest elements of a matrix, or of a run of rows; of equal ones, the first."""
        delta, layout, routines = rows.dense(), self.layout, rows.routines
        factor = np.float32(1 / self.kept if self.rescale else 1)
        if isinstance(layout, SparseLayout):
            kept = np.zeros(delta.shape, np.bool_)
            kept.reshape(-1)[threshold(delta, self.kept)] = True
            with np.errstate(over="ignore"):
                return (sparse_term(layout, delta * factor, kept, self.scale_rule, routines),)
        positions = keep_largest(delta, layout.n, layout.m, layout.share)
        values = gather(delta, positions, layout.m, layout.share, factor)
        codes, scales = routines.quantize(values, layout.bits, layout.grid, self.scale_rule, 0, self.scale_dtype)
        return (NMArrays(positions, codes, scales),)
