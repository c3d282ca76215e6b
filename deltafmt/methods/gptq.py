"""GPTQ: every element to k bits, each column's error made up for by the columns after it.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323), algorithm 1 and eq. 2 to 5, on a delta and the second moments of the fine-tune's own
inputs; :mod:`deltafmt.methods.gptq_solver` has it.

Not as in the paper: below 3 bits the scales are refitted to the codes by default, without which 1 bit is worse than
rounding to nearest.

A matrix without moments is rounded to nearest as :mod:`deltafmt.methods.rtn` does, in the same layout. The bytes of a
file depend on the libraries that run the model and the linear algebra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.gptq_solver import gptq
from deltafmt.methods.grids import Grid
from deltafmt.methods.hessian import DAMPING
from deltafmt.methods.options import option
from deltafmt.methods.quantize import default_rule
from deltafmt.methods.rtn import RTN
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout

REFITS = 2


def check_solver(damping: float, refits: int | None) -> None:
    """Check the options that GPTQ and SparseGPT share.

    Raises:
        UsageError: one is out of range.
    """
    if not 0 <= damping < math.inf:
        raise UsageError(f"damping {damping} is not a number from 0 up")
    if refits is not None and refits < 0:
        raise UsageError(f"{refits} refits are fewer than none")


def default_refits(bits: int, refits: int | None) -> int:
    """Return how often scales are refitted: as asked for, or below 3 bits twice and otherwise never."""
    return refits if refits is not None else REFITS if bits < 3 else 0


def damping_note(asked: float, used: float) -> list[str]:
    """Return what there is to say about the damping that a matrix took."""
    return [f"singular second moments: damping raised from {asked:g} to {used:g}"] if used > asked else []


@dataclass(frozen=True, slots=True)
class GPTQ(Method):
    """Options of the method.

    Attributes:
        bits: k, width of a code: 1 to 8.
        grid: ``midtread``, ``midrise``, ``asymmetric`` (a zero point for every scale) or None: midrise for k of 1
            and 2, midtread above.
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_group: consecutive columns of a row that share a scale; 0 for one scale a row.
        scale_dtype: ``BF16`` or ``F32``.
        act_order: round the columns of the largest moments first.
        damping: share of the mean second moment that is added to all.
        refits: how often scales are refitted to the codes, which are then found anew; None: 2 for k below 3, 0 above.

    Raises:
        UsageError: an option is out of range.
    """

    bits: int = option(4, "bits of a code: 1-8 (4)", "K")
    grid: str | None = option(None, "midtread, midrise or asymmetric (midrise for 1 and 2 bits)", "KIND")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_group: int = option(128, "columns that share a scale; 0: a whole row (128)", "G")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")
    act_order: bool = option(False, "columns of the largest moments first (no)")
    damping: float = option(DAMPING, "added to the moments, as a share of their mean (0.01)", "SHARE")
    refits: int | None = option(None, "times that scales are refitted to the codes (2 below 3 bits, else 0)", "N")

    name = "gptq"
    summary = "every element to k bits, each error made up for by later columns (GPTQ; needs --calibration)"
    whole = True
    calibration = "required"

    def __post_init__(self) -> None:
        check_solver(self.damping, self.refits)
        _ = self.layout, self.quantizer

    @property
    def nearest(self) -> RTN:
        """What a matrix without moments is compressed by."""
        return RTN(self.bits, self.grid, self.scale, self.scale_group, self.scale_dtype)

    @property
    def layout(self) -> LowbitLayout:
        """The layout of the term."""
        return self.nearest.layout

    @property
    def quantizer(self) -> Grid:
        """The grid and the rule of its scales."""
        rule = self.scale or default_rule(self.bits)
        return Grid(self.bits, self.layout.grid, rule, self.scale_group, self.scale_dtype)

    def layouts(self, rows: int, columns: int) -> tuple[LowbitLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (self.layout,)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        how = f"{self.quantizer.rule} damping={self.damping} refits={default_refits(self.bits, self.refits)}"
        return f"gptq {self.layout.describe()} {how}{' act_order' if self.act_order else ''}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowbitArrays]:
        """Quantize a matrix, or round it to nearest where no moments of its inputs are given."""
        if rows.hessian is None:
            return self.nearest.compress(rows, seed)
        solved = gptq(
            rows.dense(),
            rows.hessian,
            self.quantizer,
            damping=self.damping,
            act_order=self.act_order,
            refits=default_refits(self.bits, self.refits),
        )
        rows.notes.extend(damping_note(self.damping, solved.damping))
        found = solved.quantized
        return (LowbitArrays(found.codes, found.scales, found.zeros),)
