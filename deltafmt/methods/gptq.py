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

from dataclasses import dataclass

from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import SolverOptions
from deltafmt.methods.declare import Option, option, values_of
from deltafmt.methods.gptq_solver import gptq
from deltafmt.methods.grids import Grid
from deltafmt.methods.quantize import default_rule
from deltafmt.methods.rtn import RTN, RoundingOptions
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout

REFITS = 2


def default_refits(bits: int, refits: int | None) -> int:
    """Return how often scales are refitted: ``refits`` times, or where that is None twice below 3 bits, else never."""
    return refits if refits is not None else REFITS if bits < 3 else 0


def damping_note(asked: float, used: float) -> list[str]:
    """Return a note if a matrix took more damping than was asked for."""
    return [f"singular second moments: damping raised from {asked:g} to {used:g}"] if used > asked else []


@dataclass(frozen=True)
class GPTQ(SolverOptions, RoundingOptions, Method):
    """The method: the options of :class:`deltafmt.methods.rtn.RoundingOptions`, of the solver, and one of its own.

    Attributes:
        damping: share of the mean second moment that is added to all.
        refits: how often scales are refitted to the codes, which are then found anew; None: 2 for k below 3, 0 above.
        act_order: round the columns of the largest moments first.

    Raises:
        UsageError: an option is out of range.
    """

    act_order: bool = option(False, Option("round the columns whose inputs are largest first"))

    name = "gptq"
    summary = "rtn whose errors are made up for by later columns"
    details = (
        "Columns are rounded one after the other, and each one's error is made up for by the columns after it, given "
        "the second moments of the layer's inputs. A matrix without moments, such as an embedding, is rounded as rtn "
        "does."
    )
    paper = (
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, algorithm 1 "
        "(arXiv 2210.17323)"
    )
    stores = "a lowbit term: codes and scales"
    example = "gptq:bits=2"
    whole = True
    calibration = "required"

    def check(self) -> None:
        """Check that the options make a layout and a grid."""
        _ = self.layout, self.quantizer

    @property
    def nearest(self) -> RTN:
        """The method that compresses a matrix without moments."""
        return RTN(**values_of(RoundingOptions, self))

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
