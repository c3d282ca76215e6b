"""SVD: the singular vectors of the largest singular values.

The low-rank baseline of Delta-CoMe (Ping et al., arXiv 2406.08903, section 4.3), after Ryu, Seo, Yoo, "Efficient
Storage of Fine-Tuned Models via Low-Rank Approximation of Weight Residuals" (arXiv 2305.18425): delta ~ U_r S_r V_r^T,
here with the roots of the singular values in both factors.

The bytes of a file depend on the linear algebra library: other versions of it, other processors or another number of
its threads (``OMP_NUM_THREADS``) may round differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltafmt.errors import UsageError
from deltafmt.methods.bands import GROUP, band_grid, quantize_bands
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.factorization import factorize, rank_for_energy
from deltafmt.methods.grids import Grid
from deltafmt.methods.options import option
from deltafmt.methods.quantize import default_grid, default_rule
from deltafmt.methods.vectors import band_arrays, check_raw, coding_of, raw_arrays, vector_bytes, vectors_layout
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout

BITS_PER_WEIGHT = 2.0


@dataclass(frozen=True, slots=True)
class SVD(Method):
    """Options of the method.

    How many vectors are kept is said by one of the first three; BITS_PER_WEIGHT holds where none is given. A matrix
    keeps at least one, and at most as many as it has rows and columns.

    Attributes:
        rank: vectors.
        bits_per_weight: as many as take this many bits for each element of the matrix.
        energy: as few as hold this share of the squared singular values, above 0 and at most 1.
        bits: k, width of a code; None keeps vectors as they are.
        value_dtype: of vectors that are kept as they are: ``BF16``, ``F16`` or ``F32``.
        grid: of codes: ``midtread``, ``midrise``, ``asymmetric`` or None: midrise for k of 1 and 2, midtread above; 1
            bit is never asymmetric.
        scale: of codes: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_group: consecutive codes of a vector that share a scale; 0 for one scale a vector.
        scale_dtype: ``BF16`` or ``F32``.

    Raises:
        UsageError: an option, or the combination, is out of range.
    """

    rank: int | None = option(None, "vectors that are kept", "R")
    bits_per_weight: float | None = option(None, "vectors for so many bits an element of the matrix (2)", "B")
    energy: float | None = option(None, "vectors for this share of the squared singular values", "E")
    bits: int | None = option(None, "bits of a code: 1-8 (values as they are)", "K")
    value_dtype: str = option("BF16", "of values as they are: BF16, F16 or F32 (BF16)", "DTYPE")
    grid: str | None = option(None, "midtread, midrise or asymmetric (midrise for 1 and 2 bits)", "KIND")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_group: int = option(GROUP, "codes of a vector that share a scale; 0: all (128)", "G")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")

    name = "svd"
    summary = "the first singular vectors"
    whole = True
    calibration = "optional"

    def __post_init__(self) -> None:
        given = [key for key in ("rank", "bits_per_weight", "energy") if getattr(self, key) is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} both say how many vectors are kept")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank {self.rank} is not positive")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight < np.inf:
            raise UsageError(f"bits_per_weight {self.bits_per_weight} is not a positive number")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy} is outside 0 to 1")
        check_raw(self.value_dtype)
        _ = self.factors

    @property
    def fixed_rank(self) -> bool:
        """Whether the number of vectors follows from a matrix's shape."""
        return self.energy is None

    @property
    def quantizer(self) -> Grid | None:
        """The grid of codes and the rule of its scales; None where vectors are kept as they are."""
        if self.bits is None:
            return None
        kind = self.grid or default_grid(self.bits)
        rule = self.scale or default_rule(self.bits)
        return band_grid(Grid(self.bits, kind, rule, self.scale_group, self.scale_dtype), self.bits)

    @property
    def factors(self) -> Coding | str:
        """How vectors are stored."""
        grid = self.quantizer
        return self.value_dtype if grid is None else coding_of(grid)

    def layouts(self, rows: int, columns: int) -> tuple[LowRankLayout]:
        """Return the layout of its one term; with ``energy``, of the fewest vectors that there may be."""
        if self.energy is not None:
            count = 1
        elif self.rank is not None:
            count = self.rank
        else:
            budget = (self.bits_per_weight or BITS_PER_WEIGHT) * rows * columns / 8
            count = int(budget // vector_bytes(self.factors, rows, columns))
        return (vectors_layout(count, self.factors, rows, columns),)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        if self.rank is not None:
            size = f"rank={self.rank}"
        elif self.energy is not None:
            size = f"energy={self.energy}"
        else:
            size = f"bits_per_weight={self.bits_per_weight or BITS_PER_WEIGHT}"
        grid = self.quantizer
        return f"svd {size} {self.value_dtype if grid is None else f'{coding_of(grid).describe()} {grid.rule}'}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowRankArrays]:  # noqa: ARG002 - nothing is drawn
        """Factorize a matrix; with second moments of its inputs, for the least error of the outputs."""
        delta, grid = rows.dense(), self.quantizer
        rank = min(delta.shape) if self.energy is not None else self.layouts(*delta.shape)[0].rank
        factors = factorize(delta, rank, hessian=rows.hessian)
        if self.energy is not None:
            factors = factors.head(max(rank_for_energy(factors.values, self.energy), 1))
        if grid is None:
            return (raw_arrays(factors, self.value_dtype),)
        (band,) = quantize_bands(factors, [(factors.values.size, grid.bits)], grid)
        return (band_arrays(band),)
