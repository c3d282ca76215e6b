"""A compression method of your own, in one file: every element of a row becomes the row's mean.

    python docs/examples/row_mean.py BASE FINETUNED OUT

It is too coarse to be useful, and short enough to be read. docs/how-to/add-a-method.md explains each part.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

import deltafmt
from deltafmt.methods import Method
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.common import VALUE_DTYPE
from deltafmt.methods.declare import option
from deltafmt.terms.floats import narrow
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout


@dataclass(frozen=True)
class RowMean(Method):
    """Options of the method.

    Attributes:
        value_dtype: ``BF16``, ``F16`` or ``F32``.
    """

    value_dtype: str = option("BF16", VALUE_DTYPE)

    name = "row-mean"
    summary = "the mean of every row"
    details = "Every element of a row becomes the mean of the row."
    paper = "none: an example"
    stores = "a lowrank term of one vector"
    example = "row-mean:value_dtype=F32"

    @property
    def whole(self) -> bool:
        """True: lowrank terms are encoded a whole matrix at a time."""
        return True

    def layouts(self, rows: int, columns: int) -> tuple[LowRankLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (LowRankLayout(1, self.value_dtype),)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        return f"row-mean {self.value_dtype}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowRankArrays]:  # noqa: ARG002 - nothing is drawn
        """Return the means as u, and ones as v: u times v is the matrix."""
        delta = rows.dense()
        means = delta.mean(axis=1, dtype=np.float64).astype(np.float32)
        ones = np.ones(delta.shape[1], np.float32)
        return (LowRankArrays(narrow(means[None], self.value_dtype), narrow(ones[None], self.value_dtype)),)


def main(base: str, finetuned: str, out: str) -> None:
    """Pack a pair with the method."""
    result = deltafmt.pack(base, finetuned, out, method=RowMean())
    print(f"{result.path}: {result.size:,} bytes, {result.ratio:.2f} times smaller")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
