"""DeltaDQ with separate quantization: group-wise dropout, and codes cut into parts that have a list each.

Jiang, Yang, Chen, Li, Li, Li, "DeltaDQ: Ultra-High Delta Compression for Fine-Tuned LLMs via Group-wise Dropout and
Separate Quantization" (arXiv 2410.08666). N of M entries are kept at random and multiplied by M / N; they are quantized
to k bits and cut by value into m parts, sparse matrices of their own, whose codes need k - log2 m bits.

A part is a ``sparse`` term. That layout has symmetric grids. With m = 2^(k-1), part j therefore holds the
entries of one magnitude: a code tells the sign, and the scale is 2j + 1 times the common one. Other numbers of
parts would need offsets. The paper counts the k - log2 m bits alone: 16 M / N / (k - log2 m) times smaller. The
positions tell the parts apart, and take more bytes than the codes
(``tests/separate_parts.py`` counts them).

The paper searches the group size of least error of attention. Here it is the one of least expected error of the layer's
outputs, which is known in closed form (:mod:`deltafmt.methods.group_size`), where second moments of the inputs are
given; without them all sizes of the same N / M are expected to be as good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import BITS, DROPPED, NM, RESCALE, BitsOption, KeptOptions, ScaleOptions
from deltafmt.methods.declare import Need, Needs, Option, option
from deltafmt.methods.group_size import expected_error, search_group
from deltafmt.methods.quantize import check_scales, default_rule, quantize
from deltafmt.methods.sampling import gather, uniform
from deltafmt.methods.unstructured import sparse_layout
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.nm.layout import MAX_M
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.sparse.slots import SparseArrays

MAX_BITS = 5


def group_sizes(n: int, m: int) -> list[int]:
    """Return the group sizes M with the same N / M that a search can choose from."""
    least = max(m // max(math.gcd(n, m), 1), 1)
    return [least << shift for shift in range(8) if 2 <= least << shift <= MAX_M]


@dataclass(frozen=True)
class PartOptions(BitsOption, KeptOptions):
    """Dropout, and how codes are cut.

    Attributes:
        n, m: N and M: entries kept in each group of M columns.
        bits: k, width of a code before it is cut: 1 to 5.
        parts: m of the paper: 2^(k-1), or 1 for codes that are not cut; None for 2^(k-1).
    """

    n: int = option(1, NM)
    m: int = 8
    bits: int = option(4, BITS, help="width of a code in bits, before it is cut", values="1 to 5")
    parts: int | None = option(
        None,
        Option("parts that codes are cut into; 1 for codes that are not cut", "P", "1 or 2^(K-1)", otherwise="2^(K-1)"),
    )


@dataclass(frozen=True)
class DeltaDQSQ(ScaleOptions, PartOptions, Method):
    """The method: the options of :class:`PartOptions`, scales of codes, and two of its own.

    Attributes:
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_dtype: ``BF16`` or ``F32``; every part has one scale a row.
        search: take the best group size with the same N / M where second moments of the inputs are given.
        rescale: multiply kept entries by M / N.

    Raises:
        UsageError: an option is out of range.
    """

    search: bool = option(True, Option("with a calibration text, choose the best M for each matrix with the same N/M"))
    rescale: bool = option(True, RESCALE)

    name = "deltadq-sq"
    at_random = True
    summary = "deltadq with codes cut into parts of their own"
    details = (
        "N of every M columns are kept at random and multiplied by M/N. Their codes of k bits are cut by value into "
        "parts, sparse matrices of their own with narrower codes. The positions of parts take more bytes than the "
        "narrower codes save, so deltadq makes smaller files."
    )
    paper = (
        "DeltaDQ: Ultra-High Delta Compression for Fine-Tuned LLMs via Group-wise Dropout and Separate Quantization "
        "(arXiv 2410.08666)"
    )
    stores = "a sparse term for each part"
    example = "deltadq-sq:nm=1:4,bits=2"
    whole = True
    needs: ClassVar[Needs] = {
        "rescale": (DROPPED,),
        "search": (
            Need(
                "an M that can be doubled or halved within 255",
                lambda options: len(group_sizes(options.n, options.m)) > 1,
            ),
        ),
    }

    def check(self) -> None:
        """Check what the declarations of the options do not say."""
        if not 2 <= self.m <= MAX_M:
            raise UsageError(f"group size M = {self.m} is outside 2 to {MAX_M}")
        if not 1 <= self.n <= self.m:
            raise UsageError(f"N = {self.n} is outside 1 to M = {self.m}")
        if not 1 <= self.bits <= MAX_BITS:
            raise UsageError(f"bits k = {self.bits} is outside 1 to {MAX_BITS}")
        if self.parts not in (None, 1, 1 << self.bits - 1):
            most = 1 << self.bits - 1
            raise UsageError(f"parts {self.parts} is neither 1 nor {most}, which leaves a sign of {self.bits} bits")
        _ = self.layouts(1, 1)

    @property
    def calibration(self) -> str:
        """How second moments are used: for the search alone."""
        return "optional" if self.search else "none"

    @property
    def number(self) -> int:
        """The number of parts."""
        return 1 << self.bits - 1 if self.parts is None else self.parts

    @property
    def scale_rule(self) -> str:
        """The scale rule in force."""
        return self.scale or default_rule(self.bits)

    @property
    def paper_ratio(self) -> float:
        """How many times smaller than BF16 the paper counts a matrix: the bits of the parts' codes alone."""
        return 16 * self.m / self.n / (self.bits - math.log2(self.number))

    def layouts(self, rows: int, columns: int) -> tuple[SparseLayout, ...]:  # noqa: ARG002 - the same for every shape
        """Return the layouts of the parts, the smallest magnitudes first."""
        bits = 1 if self.number > 1 else self.bits
        sparse = sparse_layout(self.n / self.m / self.number, bits, "BF16", self.scale_dtype)
        return (replace(sparse, values=Coding(bits, "midrise", self.scale_dtype)),) * self.number

    def describe(self) -> str:
        """Return the method and its options in one line, with the ratio by the paper's count."""
        options = f"{self.n}:{self.m} k={self.bits} midrise in {self.number} parts {self.scale_rule} {self.scale_dtype}"
        flags = f"{' search' if self.search else ''}{'' if self.rescale else ' unrescaled'}"
        return f"deltadq-sq {options}{flags} (the paper counts {self.paper_ratio:g} times smaller)"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[SparseArrays, ...]:
        """Drop, rescale, quantize and cut a matrix with the tensor's seed, 32 bits."""
        delta = rows.dense()
        n, m = self.group(delta, rows.hessian)
        count, columns = delta.shape
        positions = uniform(seed, 0, count, -(-columns // m), n, m)
        kept = gather(delta, positions, m, 1, np.float32(m / n if self.rescale else 1))
        codes, scales = quantize(kept, self.bits, "midrise", self.scale_rule, 0, self.scale_dtype)
        column = (positions + np.arange(positions.shape[1])[:, None] * m).reshape(count, -1)
        inside = column < columns
        if self.number == 1:
            return (_listed(inside, column, codes, scales),)
        # Field u is (2u + 1 - 2^k) scale / 2: its highest bit is the sign, the magnitude counts from the middle.
        half = np.uint8(1 << self.bits - 1)
        positive = codes >= half
        magnitude = np.where(positive, codes - half, half - np.uint8(1) - codes)
        found = []
        for part in range(self.number):
            factor = np.float32(2 * part + 1)
            with np.errstate(over="ignore"):
                own = widen(narrow(scales * factor, self.scale_dtype), self.scale_dtype)
            check_scales(own)
            found.append(_listed(inside & (magnitude == part), column, positive.astype(np.uint8), own))
        return tuple(found)

    def group(self, delta: NDArray[np.float32], hessian: NDArray[np.floating] | None) -> tuple[int, int]:
        """Return the N and M of a matrix."""
        if hessian is None or not self.search:
            return self.n, self.m
        sizes = group_sizes(self.n, self.m)
        return search_group(lambda n, m: expected_error(delta, hessian, n, m), self.n / self.m, sizes)


def _listed(
    mine: NDArray[np.bool_], column: NDArray[np.integer], codes: NDArray[np.uint8], scales: NDArray[np.float32]
) -> SparseArrays:
    """Return the arrays of the entries that are ``mine``."""
    ends = np.cumsum(mine.sum(axis=1)).astype(np.int64)
    return SparseArrays(ends, column[mine].astype(np.int64), codes[mine], scales)
