"""Delta-CoMe: bands of singular vectors, the first at many bits and the later ones at few.

Ping et al., "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models"
(arXiv 2406.08903). Section 3.3: the vectors of the largest singular values are quantized to more bits than the later
ones, the last are left out; eq. 5 quantizes them with GPTQ where second moments of the inputs are given. Section 5.1:
two vectors at 8 bits, 32 at 3 and the rest at 2, as many as a sixteenth of the matrix's bytes holds. A band of 1 bit
holds signs and scales, as BitDelta's.

Not as in the paper: every matrix has the same bits an element (the authors' code gives those of the MLP more vectors,
which a rule with other ``bits_per_weight`` does); the size counts scales and zero points; and ``refit`` can replace the
left vectors of each band by those that make up best for what is left out and lost.

As with :mod:`deltafmt.methods.svd`, the bytes of a file depend on the linear algebra library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltafmt.errors import UsageError
from deltafmt.index.entries import MAX_TERMS
from deltafmt.methods.bands import band_grid, fill, quantize_bands, searched
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import BITS_PER_WEIGHT, GRID, SCALE, SCALE_GROUP, CodeOptions
from deltafmt.methods.declare import Need, Needs, Option, option
from deltafmt.methods.factorization import factorize
from deltafmt.methods.grids import Grid
from deltafmt.methods.vectors import band_arrays, coding_of, vector_bytes
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import MAX_VECTORS, LowRankLayout

BANDS = "2@8+32@3+rest@2"
DEFAULT_BITS_PER_WEIGHT = 1.0
REST = "rest"


def parse_bands(text: str) -> tuple[tuple[int | None, int], ...]:
    """Return (vectors, bits) pairs of ``VECTORS@BITS+VECTORS@BITS+rest@BITS``; None for ``rest``.

    Raises:
        UsageError: not of that form, or a number is out of range.
    """
    found: list[tuple[int | None, int]] = []
    parts = text.split("+")
    for number, part in enumerate(parts):
        count, at, bits = part.partition("@")
        rest = count == REST and number == len(parts) - 1
        if not at or not (bits.isascii() and bits.isdigit()) or not (rest or (count.isascii() and count.isdigit())):
            raise UsageError(f"bands {text!r}: {part!r} is not of the form VECTORS@BITS, or rest@BITS at the end")
        if not rest and not 1 <= int(count[:9]) <= MAX_VECTORS:
            raise UsageError(f"bands {text!r}: {count} vectors are outside 1 to {MAX_VECTORS}")
        found.append((None if rest else int(count), int(bits[:9])))
    if len(found) > MAX_TERMS:
        raise UsageError(f"bands {text!r}: {len(found)} bands are more than {MAX_TERMS}")
    return tuple(found)


@dataclass(frozen=True)
class BandOptions:
    """The bands, and how many vectors they have together.

    Attributes:
        bands: vectors and bits of each band, largest singular values first, such as ``2@8+32@3+rest@2``.
        bits_per_weight: as many vectors as take this many bits for each element of the matrix, and at least one; None:
            1 where the last band is ``rest``, otherwise all vectors of the bands.
    """

    bands: str = option(
        BANDS,
        Option(
            "vectors and bits of each band, the largest singular values first",
            "BANDS",
            "VECTORS@BITS, joined by +; the last can be rest@BITS",
        ),
    )
    bits_per_weight: float | None = option(
        None,
        BITS_PER_WEIGHT,
        otherwise=f"{DEFAULT_BITS_PER_WEIGHT:g} where the last band is rest, else all vectors of the bands",
    )


@dataclass(frozen=True)
class DeltaCoMe(CodeOptions, BandOptions, Method):
    """The method: the options of :class:`BandOptions`, those of codes, and two of its own.

    Attributes:
        grid: ``asymmetric`` (as in the paper), ``midrise`` or ``midtread``; 1 bit is always midrise.
        scale: ``minmax`` (as in the paper) or ``mse``.
        scale_group: consecutive codes of a vector that share a scale; 0 for one scale a vector.
        scale_dtype: ``BF16`` or ``F32``.
        refit: fit the left vectors of a band to what the bands before it, and the right vectors' codes, have left over.
        search: have a genetic search (appendix B) choose how many vectors each band has, at the same bytes; the list
            says the bits, and where it begins.

    Raises:
        UsageError: an option is out of range.
    """

    grid: str = option("asymmetric", GRID)
    scale: str = option("minmax", SCALE)
    scale_group: int = option(128, SCALE_GROUP, help="consecutive codes of a vector that share a scale; 0 for all")
    refit: bool = option(False, Option("fit the left vectors of each band to what the bands before have left over"))
    search: bool = option(False, Option("search how many vectors each band has, for each matrix, at the same bytes"))

    name = "delta-come"
    summary = "singular vectors, the first at more bits than the later ones"
    details = (
        "Singular vectors are cut into bands: the first have many bits, later ones few, and the last are left out. "
        "With a calibration text, vectors are quantized for the least error of the layer's outputs."
    )
    paper = (
        "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models, section 3.3 "
        "(arXiv 2406.08903)"
    )
    stores = "a lowrank term for each band: codes, scales and zero points"
    example = "delta-come:bands=2@8+16@3+rest@2,bits_per_weight=0.5"
    whole = True
    calibration = "optional"
    needs: ClassVar[Needs] = {
        "grid": (
            Need(
                "a band of 2 bits or more: a code of 1 bit is a sign, as midrise has it",
                lambda options: any(bits > 1 for _, bits in parse_bands(options.bands)),
            ),
        ),
        "search": (
            Need("two bands or more, to divide vectors among", lambda options: len(parse_bands(options.bands)) > 1),
        ),
    }

    def check(self) -> None:
        """Check that the bands can be read and coded."""
        for _, bits in self.widths:
            self._coding(bits)
        if self.search and self.budget is None:
            raise UsageError("a search needs bits_per_weight, or rest as the last band")

    @property
    def fixed_rank(self) -> bool:
        """Whether the shape alone decides how many vectors the bands have."""
        return not self.search

    @property
    def widths(self) -> tuple[tuple[int | None, int], ...]:
        """Vectors and bits of each band; None for the rest."""
        return parse_bands(self.bands)

    @property
    def budget(self) -> float | None:
        """The bits an element of the matrix in force; None for no bound."""
        rest = self.widths[-1][0] is None
        return DEFAULT_BITS_PER_WEIGHT if self.bits_per_weight is None and rest else self.bits_per_weight

    @property
    def quantizer(self) -> Grid:
        """The grid of every band, but for its bits."""
        return Grid(8, self.grid, self.scale, self.scale_group, self.scale_dtype)

    def _coding(self, bits: int) -> Coding:
        return coding_of(band_grid(self.quantizer, bits))

    def _filled(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return vectors and bits of the bands of a matrix of this shape."""
        vectors, widths = min(rows, columns, MAX_VECTORS), self.widths
        budget = np.inf if self.budget is None else self.budget * rows * columns / 8
        found = fill(widths, vectors, budget, lambda bits: vector_bytes(self._coding(bits), rows, columns))
        return found or [(1, widths[0][1])]

    def layouts(self, rows: int, columns: int) -> tuple[LowRankLayout, ...]:
        """Return the layouts of the bands; of those that are searched, with one vector."""
        if self.search:
            bands = self._filled(rows, columns)
            return tuple(LowRankLayout(1, self._coding(bits)) for _, bits in bands)
        return tuple(LowRankLayout(count, self._coding(bits)) for count, bits in self._filled(rows, columns))

    def describe(self) -> str:
        """Return the method and its options in one line."""
        size = "" if self.budget is None else f" bits_per_weight={self.budget}"
        grid = self.quantizer
        how = f"{grid.kind} scale/{grid.group} {grid.scale_dtype} {grid.rule}{' refit' if self.refit else ''}"
        how += " searched" if self.search else ""
        return f"delta-come {self.bands}{size} {how}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowRankArrays, ...]:
        """Factorize a matrix and quantize its bands: by eq. 5 where the inputs' moments are given, or to nearest."""
        delta = rows.dense()
        widths = self._filled(*delta.shape)
        vectors = sum(count for count, _ in widths)
        if self.search and self.budget is not None:
            budget = self.budget * delta.size / 8

            def cost(bits: int) -> int:
                return vector_bytes(self._coding(bits), *delta.shape)

            vectors = min(*delta.shape, max(vectors, int(budget / min(cost(bits) for _, bits in widths))))
            factors = factorize(delta, vectors)
            widths = searched(factors, widths, self.quantizer, budget, cost, hessian=rows.hessian, seed=seed)
        else:
            factors = factorize(delta, vectors)
        bands = quantize_bands(
            factors, widths, self.quantizer, hessian=rows.hessian, delta=delta if self.refit else None
        )
        return tuple(band_arrays(band) for band in bands)
