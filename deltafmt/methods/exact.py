"""Exact: every bit of a tensor, coded relative to the base's (spec/deltafmt-v1.md, section 17).

Differences of ordered integers are what Hershcovitch et al. ("ZipNN: Lossless Compression for AI Models", arXiv
2411.05239) and others call deltas; that they are sorted by the base's exponent, which the reader has, is deltafmt's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.exact.chunk import LEVELS
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.declare import Option, option
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.layout import TermLayout


@dataclass(frozen=True)
class Exact(Method):
    """Every bit of a tensor, whatever its dtype and shape.

    Attributes:
        level: ``default``, or ``fast`` for larger files in less time.
    """

    level: str = option("default", Option("fast makes larger files in less time", metavar="LEVEL", choices=LEVELS))

    name: ClassVar[str] = "exact"
    summary: ClassVar[str] = "every bit, coded relative to the base: for archives, not for serving"
    details: ClassVar[str] = (
        "Stores the differences between the fine-tune's bits and the base's, sorted by the base's exponents and "
        "compressed. unpack restores the fine-tune's files byte for byte. A model cannot be served from such a file."
    )
    paper: ClassVar[str] = "of this project"
    stores: ClassVar[str] = "no terms: exact tensors"
    example: ClassVar[str] = "exact:level=fast"
    exact: ClassVar[bool] = True

    @property
    def fixed_rank(self) -> bool:
        """False: the bytes depend on the delta."""
        return False

    def layouts(self, rows: int, columns: int) -> tuple[TermLayout, ...]:  # noqa: ARG002
        """Return nothing: an exact tensor has no terms."""
        return ()

    def describe(self) -> str:
        """Return the method's name, and its level if it is not the default."""
        return "exact" if self.level == "default" else f"exact {self.level}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[TermArrays, ...]:  # noqa: ARG002
        """Refuse: an exact tensor has no terms.

        Raises:
            UsageError: always.
        """
        raise UsageError("the method exact gives no terms")

    def approximate(self, rows: DeltaRows, seed: int, heads: object) -> NDArray[np.float32]:  # noqa: ARG002
        """Return the delta itself, which is what a reader restores."""
        return rows.dense()
