"""Round to nearest: every element to k bits, with scales for groups of columns.

The baseline that calibrated methods are compared with, as in GPTQ (Frantar et al., arXiv 2210.17323, table 1). Beyond
it, scales can be those that keep the delta's length (:mod:`deltafmt.methods.unbiased`), which at 1 bit matters most.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import SCALE, SCALE_GROUP, BitsOption, CodeOptions
from deltafmt.methods.declare import option
from deltafmt.methods.grids import Grid, Quantized
from deltafmt.methods.quantize import default_grid, default_rule, quantize
from deltafmt.methods.unbiased import UNBIASED, unbiased_scales
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout


@dataclass(frozen=True)
class RoundingOptions(CodeOptions, BitsOption):
    """Options of a matrix of which every element becomes a code.

    Attributes:
        bits: k, width of a code: 1 to 8.
        grid: ``midtread``, ``midrise``, ``asymmetric`` (a zero point for every scale) or None: midrise for k of 1
            and 2, midtread above.
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_group: consecutive columns of a row that share a scale; 0 for one scale a row.
        scale_dtype: ``BF16`` or ``F32``.
    """

    scale_group: int = option(128, SCALE_GROUP, help="columns of a row that share a scale; 0 for a whole row")


@dataclass(frozen=True)
class RTN(RoundingOptions, Method):
    """The method, with the options of :class:`RoundingOptions`.

    Attributes:
        scale: also ``unbiased`` (the codes of mse, then the scale that does not shrink the delta), which holds for k
            of 1 where None is given.

    Raises:
        UsageError: an option is out of range.
    """

    scale: str | None = option(
        None,
        SCALE,
        help="how scales are found: minmax clips nothing, mse has the least squared error, unbiased keeps the "
        "length of the delta",
        choices=("minmax", "mse", UNBIASED),
        otherwise="unbiased for 1 bit, mse below 4, else minmax",
    )

    name = "rtn"
    summary = "every element rounded to the nearest of k bits"
    details = "Every element becomes a code of k bits, with a scale for each group of columns of a row."
    paper = "round to nearest, the baseline of GPTQ (arXiv 2210.17323, table 1)"
    stores = "a lowbit term: codes and scales"
    example = "rtn:bits=3"

    def check(self) -> None:
        """Check that the options make a layout and a grid."""
        _ = self.layout, self.quantizer

    @property
    def layout(self) -> LowbitLayout:
        """The layout of the term."""
        grid = self.grid or default_grid(self.bits)
        return LowbitLayout(self.bits, grid, self.scale_dtype, self.scale_group)

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        return self.scale or (UNBIASED if self.bits == 1 else default_rule(self.bits))

    @property
    def quantizer(self) -> Grid:
        """The grid and the rule of its scales, before these are made unbiased."""
        rule = "mse" if self.scale_rule == UNBIASED else self.scale_rule
        return Grid(self.bits, self.layout.grid, rule, self.scale_group, self.scale_dtype)

    def layouts(self, rows: int, columns: int) -> tuple[LowbitLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (self.layout,)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        return f"rtn {self.layout.describe()} {self.scale_rule}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowbitArrays]:  # noqa: ARG002 - nothing is drawn
        """Quantize a run of rows."""
        delta, grid = rows.dense(), self.quantizer
        if grid.kind == "asymmetric":
            found = grid.quantize(delta)
        else:
            codes, scales = quantize(delta, grid.bits, grid.kind, grid.rule, grid.group, grid.scale_dtype)
            found = Quantized(grid, codes, scales)
        scales = found.scales
        if self.scale_rule == UNBIASED:
            size = grid.size(delta.shape[1])
            scales = unbiased_scales(delta, found.dense(), scales, size, self.scale_dtype)
        return (LowbitArrays(found.codes, scales, found.zeros),)
