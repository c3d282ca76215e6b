"""SVD: the singular vectors of the largest singular values.

The low-rank baseline of Delta-CoMe (Ping et al., arXiv 2406.08903, section 4.3), after Ryu, Seo, Yoo, "Efficient
Storage of Fine-Tuned Models via Low-Rank Approximation of Weight Residuals" (arXiv 2305.18425): delta ~ U_r S_r V_r^T,
here with the roots of the singular values in both factors.

The bytes of a file depend on the linear algebra library: other versions of it, other processors or another number of
its threads (``OMP_NUM_THREADS``) may round differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltafmt.errors import UsageError
from deltafmt.methods.bands import band_grid, quantize_bands
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import (
    BITS,
    BITS_PER_WEIGHT,
    CODED,
    RANK,
    RAW,
    SCALE_GROUP,
    VALUE_DTYPE,
    CodeOptions,
)
from deltafmt.methods.declare import Need, Needs, Option, option
from deltafmt.methods.factorization import factorize, rank_for_energy
from deltafmt.methods.grids import Grid
from deltafmt.methods.quantize import default_grid, default_rule
from deltafmt.methods.vectors import band_arrays, coding_of, raw_arrays, vector_bytes, vectors_layout
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout

DEFAULT_BITS_PER_WEIGHT = 2.0
COUNTS = ("rank", "bits_per_weight", "energy")


def _alone(key: str) -> Need:
    """Return the need of an option that says how many vectors are kept."""
    others = [other for other in COUNTS if other != key]
    return Need(
        f"neither {others[0]} nor {others[1]}: one of the three says how many vectors are kept",
        lambda options: all(getattr(options, other) is None for other in others),
    )


@dataclass(frozen=True)
class VectorOptions:
    """How many singular vectors are kept, and how.

    One of the first three says how many; DEFAULT_BITS_PER_WEIGHT holds where none is given. A matrix keeps at least
    one, and at most as many as it has rows and columns.

    Attributes:
        rank: number of vectors.
        bits_per_weight: keep as many vectors as take this many bits for each element of the matrix.
        energy: keep as few vectors as hold this share of the squared singular values, above 0 and at most 1.
        bits: k, width of a code; None keeps vectors as they are.
        value_dtype: dtype of vectors that are kept as they are: ``BF16``, ``F16`` or ``F32``.
    """

    rank: int | None = option(None, RANK, otherwise="none: bits_per_weight says how many")
    bits_per_weight: float | None = option(
        None, BITS_PER_WEIGHT, otherwise=f"{DEFAULT_BITS_PER_WEIGHT:g} without rank and energy"
    )
    energy: float | None = option(
        None,
        Option(
            "keep as few singular vectors as hold this share of the squared singular values",
            "E",
            "a number above 0, up to 1",
            otherwise="none: bits_per_weight says how many",
            right=lambda energy: 0 < energy <= 1,
            wrong="is outside 0 to 1",
        ),
    )
    bits: int | None = option(None, BITS, otherwise="none: values as they are")
    value_dtype: str = option("BF16", VALUE_DTYPE)


@dataclass(frozen=True)
class SVD(CodeOptions, VectorOptions, Method):
    """The method: the options of :class:`VectorOptions`, and those of codes.

    Attributes:
        grid: ``midtread``, ``midrise``, ``asymmetric`` or None: midrise for k of 1 and 2, midtread above; 1 bit is
            always midrise.
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on.
        scale_group: consecutive codes of a vector that share a scale; 0 for one scale a vector.
        scale_dtype: ``BF16`` or ``F32``.

    Raises:
        UsageError: an option, or the combination, is out of range.
    """

    scale_group: int = option(128, SCALE_GROUP, help="consecutive codes of a vector that share a scale; 0 for all")

    name = "svd"
    summary = "the first singular vectors"
    details = (
        "The singular vectors of the largest singular values are kept, with the roots of the values in both factors. "
        "At the same bytes, vectors as codes (bits=4) lose far less than fewer vectors as they are."
    )
    paper = "Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight Residuals (arXiv 2305.18425)"
    stores = "a lowrank term: two factors, as they are or as codes"
    example = "svd:bits_per_weight=1,bits=4"
    whole = True
    calibration = "optional"
    needs: ClassVar[Needs] = {
        **{key: (_alone(key),) for key in COUNTS},
        "value_dtype": (RAW,),
        "grid": (CODED,),
        "scale": (CODED,),
        "scale_group": (CODED,),
        "scale_dtype": (CODED,),
    }

    def check(self) -> None:
        """Check that the options go together and make a coding."""
        given = [key for key in COUNTS if getattr(self, key) is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} both say how many vectors are kept")
        if self.bits == 1 and self.grid == "asymmetric":
            raise UsageError("grid asymmetric needs 2 bits or more: a code of 1 bit is a sign, as midrise has it")
        _ = self.factors

    @property
    def fixed_rank(self) -> bool:
        """True if the number of vectors follows from a matrix's shape."""
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
            budget = (self.bits_per_weight or DEFAULT_BITS_PER_WEIGHT) * rows * columns / 8
            count = int(budget // vector_bytes(self.factors, rows, columns))
        return (vectors_layout(count, self.factors, rows, columns),)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        if self.rank is not None:
            size = f"rank={self.rank}"
        elif self.energy is not None:
            size = f"energy={self.energy}"
        else:
            size = f"bits_per_weight={self.bits_per_weight or DEFAULT_BITS_PER_WEIGHT}"
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
