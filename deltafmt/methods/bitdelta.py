"""BitDelta: the sign of every element of a delta, and how large they are on average.

Liu, Xiao, Li, Lee, Stoica, Han, Cai, "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv 2402.10193). Section
3.1: the delta becomes alpha * Sign(delta), where alpha, the mean of its magnitudes, is the scale of least squared error
(eq. 3); Sign gives +1 for 0, as in the authors' code. Where a calibration gives the second moments of a matrix's
inputs, the scales are distilled instead (:mod:`deltafmt.methods.distill`), in closed form, where the paper trains them.

Beyond the paper: the mean may be that of every row, of every column (per-axis sign scales, arXiv 2512.19720) or of
groups of a row; and the scale may be sum delta^2 / sum |delta| in the place of the mean, with which the signs are as
long as the delta along it (:mod:`deltafmt.methods.unbiased`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import SCALE, SCALE_DTYPE, SCALE_GROUP
from deltafmt.methods.declare import Need, Needs, Option, option
from deltafmt.methods.distill import distilled_columns, distilled_level, distilled_rows
from deltafmt.methods.grids import Grid, Quantized
from deltafmt.methods.quantize import check_scales, quantize
from deltafmt.methods.unbiased import LARGEST_FACTOR, UNBIASED, unbiased_scales
from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowbit.layout import LowbitLayout

MEANS = ("matrix", "row", "column", "group")
MEAN = "mean"


@dataclass(frozen=True)
class BitDelta(Method):
    """The method and its options.

    Attributes:
        mean: what has a scale of its own: the ``matrix`` (as in the paper; stored as equal scales of its rows), every
            ``row``, every ``column``, or every ``group`` of columns of a row.
        scale_group: columns of a group.
        scale_dtype: ``BF16`` or ``F32``.
        scale: ``mean`` (as in the paper) or ``unbiased``; a matrix with moments of its inputs has distilled scales,
            whichever is chosen.

    Raises:
        UsageError: an option is out of range.
    """

    mean: str = option("matrix", Option("what has a scale of its own", "WHAT", choices=MEANS))
    scale_group: int = option(128, SCALE_GROUP, help="columns of a group", values="1 or more")
    scale_dtype: str = option("BF16", SCALE_DTYPE)
    scale: str = option(
        MEAN,
        SCALE,
        help="mean takes the mean magnitude, unbiased the scale that does not shrink the delta; matrices that a "
        "calibration text reaches have distilled scales instead",
        choices=(MEAN, UNBIASED),
    )

    name = "bitdelta"
    summary = "the sign of every element, times a mean magnitude"
    details = (
        "Every element becomes its sign, times the mean magnitude of the matrix, or of its row, column or group of "
        "columns. With a calibration text the scales are distilled: they have the least error of the layer's outputs."
    )
    paper = "BitDelta: Your Fine-Tune May Only Be Worth One Bit, section 3.1 (arXiv 2402.10193)"
    stores = "a lowbit term: signs and scales"
    example = "bitdelta:mean=row"
    whole = True
    calibration = "optional"
    needs: ClassVar[Needs] = {
        "scale_group": (Need("mean=group: only groups have a size", lambda options: options.mean == "group"),)
    }

    def check(self) -> None:
        """Check that the options make a layout."""
        if self.mean == "group" and self.scale_group == 0:
            raise UsageError("a group has at least one column")
        _ = self.layout

    @property
    def layout(self) -> LowbitLayout:
        """The layout of the term."""
        axis = "column" if self.mean == "column" else "row"
        return LowbitLayout(1, "midrise", self.scale_dtype, self.scale_group if self.mean == "group" else 0, axis)

    def layouts(self, rows: int, columns: int) -> tuple[LowbitLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (self.layout,)

    @property
    def by_rows(self) -> bool:
        """True: mean magnitudes of some rows are those of all rows, about."""
        return True

    @property
    def across_rows(self) -> bool:
        """True for a mean of the matrix or of columns."""
        return self.mean in ("matrix", "column")

    def describe(self) -> str:
        """Return the method and its options in one line."""
        rule = "" if self.scale == MEAN else f" {self.scale}"
        return f"bitdelta {self.mean} {self.layout.describe()}{rule}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowbitArrays]:  # noqa: ARG002 - nothing is drawn
        """Take the signs, and the means that the options ask for."""
        delta, layout, hessian = rows.dense(), self.layout, rows.hessian
        if self.mean in ("row", "group"):
            # On two levels, the scale of least squared error is the mean magnitude.
            codes, scales = quantize(delta, 1, "midrise", "mse", layout.scale_group, self.scale_dtype)
            found = Quantized(Grid(1, "midrise", "mse", layout.scale_group, self.scale_dtype), codes, scales)
            size = found.grid.size(delta.shape[1])
            if hessian is not None:
                scales = distilled_rows(delta, hessian, scales, size, self.scale_dtype)
            elif self.scale == UNBIASED:
                scales = unbiased_scales(delta, found.dense(), scales, size, self.scale_dtype)
            return (LowbitArrays(codes, scales),)
        axis = 0 if self.mean == "column" else 1
        sums = np.abs(delta).sum(axis=axis, dtype=np.float64)
        squares = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", delta, delta, dtype=np.float64)
        if self.mean == "column":
            levels = self._level(sums, squares, delta.shape[0])
            if hessian is not None:
                levels = distilled_columns(delta, hessian, levels)
            scales = self._rounded(levels[None])
        else:
            level = float(self._level(np.array(math.fsum(sums)), np.array(math.fsum(squares)), delta.size))
            if hessian is not None:
                level = distilled_level(delta, hessian, level)
            scales = self._rounded(np.full((delta.shape[0], 1), level))
        return (LowbitArrays((delta >= 0).astype(np.uint8), scales),)

    def _level(self, sums: NDArray[np.float64], squares: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        """Return how far the two levels lie from zero, given sums of magnitudes and of squares."""
        mean: NDArray[np.float64] = sums / count
        if self.scale == MEAN:
            return mean
        unbiased = squares / np.where(sums > 0, sums, 1)
        return np.where((sums > 0) & (unbiased <= LARGEST_FACTOR * mean), unbiased, mean)

    def _rounded(self, means: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return scales of two levels that lie at the means: the levels are half a scale from zero."""
        with np.errstate(over="ignore"):
            scales = (2 * means).astype(np.float32)
            scales = widen(narrow(scales, self.scale_dtype), self.scale_dtype)
        check_scales(scales)
        return scales
