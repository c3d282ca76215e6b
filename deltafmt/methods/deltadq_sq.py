"""DeltaDQ with separate quantization: group-wise dropout, and codes cut into parts that have a list each.

Jiang, Yang, Chen, Li, Li, Li, "DeltaDQ: Ultra-High Delta Compression for Fine-Tuned LLMs via Group-wise Dropout and
Separate Quantization" (arXiv 2410.08666). N of M entries are kept at random and multiplied by M / N; they are quantized
to k bits and cut by value into m parts, sparse matrices of their own, whose codes need k - log2 m bits.

A part is a ``sparse`` term. That layout has symmetric grids, so a part is what one of them can hold: with m = 2^(k-1)
the entries of one magnitude, of which a code tells the sign, on a scale 2j + 1 times the common one. Other numbers of
parts would need offsets. The paper counts the k - log2 m bits alone: 16 M / N / (k - log2 m) times smaller. The
positions tell the parts apart, and take more bytes than the codes (:func:`deltafmt.methods.separate.part_costs`).

The paper searches the group size of least error of attention. Here it is the one of least expected error of the layer's
outputs, which is known in closed form (:mod:`deltafmt.methods.group_size`), where second moments of the inputs are
given; without them all sizes of the same N / M are expected to be as good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.deltadq import read_nm
from deltafmt.methods.group_size import expected_error, search_group
from deltafmt.methods.options import option
from deltafmt.methods.quantize import SCALE_RULES, check_scales, default_rule
from deltafmt.methods.sampling import gather
from deltafmt.methods.unstructured import sparse_layout
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow, widen
from deltafmt.terms.nm.layout import MAX_M
from deltafmt.terms.sparse.codec import SparseArrays
from deltafmt.terms.sparse.layout import SparseLayout

MAX_BITS = 5


@dataclass(frozen=True, slots=True)
class DeltaDQSQ(Method):
    """Options of the method.

    Attributes:
        n, m: N and M: entries kept in each group of M columns.
        bits: k, width of a code before it is cut: 1 to 5.
        parts: m of the paper: 2^(k-1), or 1 for codes that are not cut; None for 2^(k-1).
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_dtype: ``BF16`` or ``F32``; every part has one scale a row.
        search: take the best group size with the same N / M where second moments of the inputs are given.
        rescale: multiply what is kept by M / N.

    Raises:
        UsageError: an option is out of range.
    """

    n: int = option(1, "keep N of every M columns (1:8)", "N:M", key="nm", parse=read_nm)
    m: int = 8
    bits: int = option(4, "bits of a code before it is cut: 1-5 (4)", "K")
    parts: int | None = option(None, "2^(K-1) parts, or 1 for codes that are not cut (2^(K-1))", "P")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")
    search: bool = option(True, "the best group size for N/M, where a calibration gives moments (yes)")
    rescale: bool = option(True, "multiply what is kept by M/N (yes)")

    name = "deltadq-sq"
    at_random = True
    summary = "group-wise dropout with rescale, codes cut into parts (DeltaDQ, separate quantization)"
    whole = True

    def __post_init__(self) -> None:
        if not 2 <= self.m <= MAX_M:
            raise UsageError(f"group size M = {self.m} is outside 2 to {MAX_M}")
        if not 1 <= self.n <= self.m:
            raise UsageError(f"N = {self.n} is outside 1 to M = {self.m}")
        if not 1 <= self.bits <= MAX_BITS:
            raise UsageError(f"bits k = {self.bits} is outside 1 to {MAX_BITS}")
        if self.parts not in (None, 1, 1 << self.bits - 1):
            most = 1 << self.bits - 1
            raise UsageError(f"parts {self.parts} is neither 1 nor {most}, which leaves a sign of {self.bits} bits")
        if self.scale is not None and self.scale not in SCALE_RULES:
            raise UsageError(f"scale rule {self.scale!r} is not one of {', '.join(SCALE_RULES)}")
        _ = self.layouts(1, 1)

    @property
    def calibration(self) -> str:
        """What second moments are to it."""
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
        delta, routines = rows.dense(), rows.routines
        n, m = self.group(delta, rows.hessian)
        count, columns = delta.shape
        positions = routines.uniform(seed, 0, count, -(-columns // m), n, m)
        kept = gather(delta, positions, m, 1, np.float32(m / n if self.rescale else 1))
        codes, scales = routines.quantize(kept, self.bits, "midrise", self.scale_rule, 0, self.scale_dtype)
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
        least = self.m // math.gcd(self.n, self.m)
        sizes = [least << shift for shift in range(8) if 2 <= least << shift <= MAX_M]
        return search_group(lambda n, m: expected_error(delta, hessian, n, m), self.n / self.m, sizes)


def _listed(
    mine: NDArray[np.bool_], column: NDArray[np.integer], codes: NDArray[np.uint8], scales: NDArray[np.float32]
) -> SparseArrays:
    """Return the arrays of the entries that are ``mine``."""
    ends = np.cumsum(mine.sum(axis=1)).astype(np.int64)
    return SparseArrays(ends, column[mine].astype(np.int64), codes[mine], scales)
