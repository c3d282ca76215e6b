"""Magnitude pruning: keep the largest elements of a delta, wherever they stand.

Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks" (arXiv 1506.02626),
section 3, applied to the delta; what is kept is not rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltafmt.codecs.sparse import SparseArrays
from deltafmt.errors import UsageError
from deltafmt.layout.sparse import SparseLayout
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.magnitude import threshold
from deltafmt.methods.options import option
from deltafmt.methods.quantize import SCALE_RULES
from deltafmt.methods.unstructured import sparse_layout, sparse_term


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Options of the method.

    Attributes:
        density: share of a matrix's elements that are kept.
        bits: k, width of a code; None keeps values as they are.
        value_dtype: of values that are kept as they are: ``BF16``, ``F16`` or ``F32``.
        scale: of codes: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_dtype: ``BF16`` or ``F32``; there is one scale a row.

    Raises:
        UsageError: an option is out of range.
    """

    density: float = option(0.1, "share of the elements that are kept (0.1)", "D")
    bits: int | None = option(None, "bits of a code: 1-8 (values as they are)", "K")
    value_dtype: str = option("BF16", "of values as they are: BF16, F16 or F32 (BF16)", "DTYPE")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")

    name = "magnitude"
    summary = "the largest elements"
    whole = True

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale not in SCALE_RULES:
            raise UsageError(f"scale rule {self.scale!r} is not one of {', '.join(SCALE_RULES)}")
        _ = self.layout

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        return self.scale or ("mse" if self.bits is not None and self.bits < 4 else "minmax")

    @property
    def layout(self) -> SparseLayout:
        """The layout of the term."""
        return sparse_layout(self.density, self.bits, self.value_dtype, self.scale_dtype)

    def layouts(self, rows: int, columns: int) -> tuple[SparseLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (self.layout,)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        rule = "" if self.bits is None else f" {self.scale_rule}"
        return f"magnitude {self.density} {self.layout.describe()}{rule}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[SparseArrays]:  # noqa: ARG002 - nothing is drawn
        """Keep the largest elements of a matrix; of equal ones, the first."""
        delta = rows.dense()
        kept = np.zeros(delta.shape, np.bool_)
        kept.reshape(-1)[threshold(delta, self.density)] = True
        return (sparse_term(self.layout, delta, kept, self.scale_rule, rows.routines),)
