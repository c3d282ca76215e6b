"""DARE: drop elements at random, and rescale the rest.

Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch"
(arXiv 2311.03099), section 3.2: every element of the delta is set to zero with probability p, the others are divided
by 1 - p (eq. 1 and 2). The tensor's seed, the row and the column decide which elements are dropped, never the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltafmt.methods.base import REACH, DeltaRows, Method
from deltafmt.methods.common import BITS, CODED, RAW, RESCALE, VALUE_DTYPE, ScaleOptions
from deltafmt.methods.declare import Need, Needs, Option, option
from deltafmt.methods.quantize import default_rule
from deltafmt.methods.sampling import draw
from deltafmt.methods.unstructured import sparse_layout, sparse_term
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays

DROP = Option(
    "probability with which an element is dropped",
    "P",
    "a number from 0 to below 1",
    noun="drop probability",
    right=lambda drop: 0 <= drop < 1,
    wrong="is not at least 0 and below 1",
)


@dataclass(frozen=True)
class KeptValueOptions:
    """The elements that DARE keeps, and how it stores them.

    Attributes:
        drop: p, the probability with which an element is dropped.
        bits: k, width of a code; None keeps values as they are.
        value_dtype: dtype of values that are kept as they are: ``BF16``, ``F16`` or ``F32``.
    """

    drop: float = option(0.75, DROP)
    bits: int | None = option(None, BITS, otherwise="none: values as they are")
    value_dtype: str = option("BF16", VALUE_DTYPE)


@dataclass(frozen=True)
class DARE(ScaleOptions, KeptValueOptions, Method):
    """The method: the options of :class:`KeptValueOptions`, scales of codes, and one of its own.

    Attributes:
        rescale: divide what is kept by 1 - p.

    Raises:
        UsageError: an option is out of range.
    """

    rescale: bool = option(True, RESCALE, help="divide what is kept by 1 - P; products then keep their expected size")

    name = "dare"
    at_random = True
    summary = "random elements, rescaled"
    details = (
        "Every element is dropped with probability p, and the others are divided by 1 - p. Kept elements are stored as "
        "they are, or as codes of k bits with a scale for each row."
    )
    paper = (
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, section 3.2 "
        "(arXiv 2311.03099)"
    )
    stores = "a sparse term: gaps, and values or codes"
    example = "dare:drop=0.9,bits=4"
    whole = True
    needs: ClassVar[Needs] = {
        "value_dtype": (RAW,),
        "scale": (CODED,),
        "scale_dtype": (CODED,),
        "rescale": (Need("drop above 0: where all is kept nothing is rescaled", lambda options: options.drop > 0),),
    }

    def check(self) -> None:
        """Check that the options make a layout."""
        _ = self.layout

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        return self.scale or ("minmax" if self.bits is None else default_rule(self.bits))

    @property
    def layout(self) -> SparseLayout:
        """The layout of the term."""
        return sparse_layout(1 - self.drop, self.bits, self.value_dtype, self.scale_dtype)

    @property
    def reach(self) -> float:
        """Kept elements are divided by 1 - p."""
        return REACH / (1 - self.drop)

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
        return (sparse_term(self.layout, delta, kept, self.scale_rule),)
