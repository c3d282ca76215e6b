"""DARE: drop elements at random, and rescale the rest.

Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch"
(arXiv 2311.03099), section 3.2: every element of the delta is set to zero with probability p, the others are divided
by 1 - p (eq. 1 and 2). Which ones are dropped is a function of the tensor's seed, row and column, never of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.options import option
from deltafmt.methods.quantize import SCALE_RULES, default_rule
from deltafmt.methods.unstructured import sparse_layout, sparse_term
from deltafmt.terms.nm.hashing import BLOCK_STEP, ROW_STEP, mix
from deltafmt.terms.sparse.codec import SparseArrays
from deltafmt.terms.sparse.layout import SparseLayout

BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class DARE(Method):
    """Options of the method.

    Attributes:
        drop: p, the probability with which an element is dropped.
        bits: k, width of a code; None keeps values as they are.
        value_dtype: of values that are kept as they are: ``BF16``, ``F16`` or ``F32``.
        scale: of codes: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_dtype: ``BF16`` or ``F32``; there is one scale a row.
        rescale: divide what is kept by 1 - p.

    Raises:
        UsageError: an option is out of range.
    """

    drop: float = option(0.75, "probability with which an element is dropped (0.75)", "P")
    bits: int | None = option(None, "bits of a code: 1-8 (values as they are)", "K")
    value_dtype: str = option("BF16", "of values as they are: BF16, F16 or F32 (BF16)", "DTYPE")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")
    rescale: bool = option(True, "divide what is kept by 1 - P (yes)")

    name = "dare"
    at_random = True
    summary = "random elements, rescaled (DARE)"
    whole = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise UsageError(f"drop probability {self.drop} is not at least 0 and below 1")
        if self.scale is not None and self.scale not in SCALE_RULES:
            raise UsageError(f"scale rule {self.scale!r} is not one of {', '.join(SCALE_RULES)}")
        _ = self.layout

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        return self.scale or ("minmax" if self.bits is None else default_rule(self.bits))

    @property
    def layout(self) -> SparseLayout:
        """The layout of the term."""
        return sparse_layout(1 - self.drop, self.bits, self.value_dtype, self.scale_dtype)

    def layouts(self, rows: int, columns: int) -> tuple[SparseLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (self.layout,)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        rule = "" if self.bits is None else f" {self.scale_rule}"
        text = f"dare p={self.drop} {self.layout.describe()}{rule}"
        return text if self.rescale else f"{text} unrescaled"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[SparseArrays]:
        """Drop and rescale a matrix with the tensor's seed, 32 bits."""
        delta = rows.dense()
        if self.rescale:
            with np.errstate(over="ignore"):
                delta = delta * np.float32(1 / (1 - self.drop))
        kept = draw(seed, *rows.shape, self.drop)
        return (sparse_term(self.layout, delta, kept, self.scale_rule, rows.routines),)


def draw(seed: int, rows: int, columns: int, drop: float) -> NDArray[np.bool_]:
    """Tell which elements of a matrix are kept: those whose 32-bit hash of seed, row and column is at least p 2**32."""
    least = round(drop * 2**32)
    column = np.arange(columns, dtype=np.uint64).astype(np.uint32) * np.uint32(BLOCK_STEP)
    kept = np.empty((rows, columns), np.bool_)
    step = max(BLOCK_ELEMENTS // columns, 1)
    for first in range(0, rows, step):
        row = np.arange(first, min(first + step, rows), dtype=np.uint64).astype(np.uint32)
        key = mix(np.uint32(seed) + row * np.uint32(ROW_STEP))
        kept[first : first + step] = mix(key[:, None] + column) >= least
    return kept
