"""Magnitude pruning: keep the largest elements of a delta, wherever they stand or N of every M columns.

Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks" (arXiv 1506.02626),
section 3, applied to the delta; N of M as in Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv
2104.08378), section 3. Kept elements are not rescaled by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import BITS, NM, RESCALE, VALUE_DTYPE, ChosenPositionOptions, ScaleOptions
from deltafmt.methods.declare import Need, Needs, Option, option
from deltafmt.methods.largest import keep_largest, threshold
from deltafmt.methods.quantize import default_grid, default_rule, quantize
from deltafmt.methods.sampling import gather
from deltafmt.methods.unstructured import sparse_layout, sparse_term
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays

DENSITY = 0.1
NM_BITS = 4


ANYWHERE = Need("no nm, which says what is kept", lambda options: options.n is None)
OF_GROUPS = Need("nm: only N of every M columns have positions of their own", lambda options: options.n is not None)
CODES = Need(
    "bits or nm: without them, values are stored as they are",
    lambda options: options.bits is not None or options.n is not None,
)
VALUES = Need(
    "values that are stored as they are: leave bits and nm out",
    lambda options: options.bits is None and options.n is None,
)
SOME = Need(
    "elements that are dropped: where all is kept nothing is rescaled",
    lambda options: options.density != 1 if options.n is None else options.n != options.m,
)


@dataclass(frozen=True)
class LargestOptions:
    """The elements that magnitude pruning keeps, and how it stores them.

    Attributes:
        density: share of a matrix's elements that are kept, wherever they stand; DENSITY where neither this nor N:M is
            given.
        bits: k, width of a code; None keeps values as they are, or with N:M has codes of NM_BITS bits.
        n, m: N and M: entries kept in each group of M columns of a row.
        value_dtype: dtype of values that are kept as they are: ``BF16``, ``F16`` or ``F32``.
    """

    density: float | None = option(
        None, Option("share of the elements that are kept", "D", "a number above 0, up to 1", otherwise=str(DENSITY))
    )
    bits: int | None = option(
        None, BITS, values="1 to 8; 1 to 6 or 8 with nm", otherwise=f"none: values as they are; {NM_BITS} with nm"
    )
    n: int | None = option(None, NM, help="keep the largest N of every M columns", otherwise="none")
    m: int | None = None
    value_dtype: str = option("BF16", VALUE_DTYPE)


@dataclass(frozen=True)
class Magnitude(ScaleOptions, ChosenPositionOptions, LargestOptions, Method):
    """The method: the options of :class:`LargestOptions`, positions of N:M, scales of codes, and one of its own.

    Attributes:
        index: ``fixed``, or ``rank`` for cold files.
        share: v, consecutive rows that keep the same positions, those of the largest sums of squares.
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_dtype: ``BF16`` or ``F32``; there is one scale a row.
        rescale: divide kept elements by the share that is kept.

    Raises:
        UsageError: an option, or the combination, is out of range.
    """

    rescale: bool = option(False, RESCALE, help="divide what is kept by the share that is kept")

    name = "magnitude"
    summary = "the largest elements, anywhere or N of every M columns"
    details = (
        "The largest elements of a matrix are kept, or with nm the largest N of every M columns of a row. Large "
        "elements are not what matters in a delta: deltadq loses far less at the same size."
    )
    paper = "Learning both Weights and Connections for Efficient Neural Networks, section 3 (arXiv 1506.02626)"
    stores = "a sparse term: gaps, and values or codes; with nm an nm term: codes, scales and positions"
    example = "magnitude:nm=2:4"
    needs: ClassVar[Needs] = {
        "density": (ANYWHERE,),
        "nm": (Need("no density, which says what is kept", lambda options: options.density is None),),
        "value_dtype": (VALUES,),
        "index": (OF_GROUPS,),
        "share": (OF_GROUPS,),
        "scale": (CODES,),
        "scale_dtype": (CODES,),
        "rescale": (SOME,),
    }

    def check(self) -> None:
        """Check that the options go together and make a layout."""
        if (self.n is None) != (self.m is None):
            raise UsageError("N and M are given together")
        if self.n is not None and self.density is not None:
            raise UsageError(f"density {self.density} and {self.n}:{self.m} both say what is kept")
        _ = self.layout

    @property
    def whole(self) -> bool:
        """True if the other rows decide what is kept of a row."""
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
        delta, layout = rows.dense(), self.layout
        factor = np.float32(1 / self.kept if self.rescale else 1)
        if isinstance(layout, SparseLayout):
            kept = np.zeros(delta.shape, np.bool_)
            kept.reshape(-1)[threshold(delta, self.kept)] = True
            with np.errstate(over="ignore"):
                return (sparse_term(layout, delta * factor, kept, self.scale_rule),)
        assert self.n is not None
        assert self.m is not None
        positions = keep_largest(delta, self.n, self.m, layout.share)
        values = gather(delta, positions, self.m, layout.share, factor)
        codes, scales = quantize(values, layout.bits, layout.grid, self.scale_rule, 0, self.scale_dtype)
        return (NMArrays(positions, codes, scales),)
