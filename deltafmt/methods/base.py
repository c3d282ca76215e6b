"""The base class of methods, and the rows that a method is given.

A method is a rule that turns rows of a dense delta into the arrays of one or more terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.delta import row_ranges
from deltafmt.errors import NonFiniteError
from deltafmt.methods.declare import Needs, check_effects, check_options
from deltafmt.methods.decoded import decoded
from deltafmt.methods.sampling import gather_difference
from deltafmt.methods.spelling import spelling
from deltafmt.terms.buffers import Packed
from deltafmt.terms.codec import TermArrays
from deltafmt.terms.codecs import AnyCodec
from deltafmt.terms.floats import Raw, subtract
from deltafmt.terms.layout import TermLayout

if TYPE_CHECKING:
    from deltafmt.methods.expected import Expected, Sampled
    from deltafmt.methods.grids import Grid
    from deltafmt.methods.measured import Heads

# See Method.reach: groups have 255 columns at most, and solvers and scales that do not shrink add a little.
REACH = 1024.0


@dataclass(frozen=True, slots=True)
class DeltaRows:
    """A run of rows of ``finetuned - base``, computed when a method asks for it.

    Attributes:
        finetuned, base: raw arrays of shape (rows, columns).
        finetuned_dtype, base_dtype: dtypes of the raw arrays, by their safetensors names.
        first: the run's first row in the tensor.
        name: name of the tensor.
        hessian: second moments of the matrix's inputs, shape (columns, columns), where a calibration has gathered them.
        notes: lines that a method adds about the tensor, such as a raised damping; pack prints them.
    """

    finetuned: Raw
    finetuned_dtype: str
    base: Raw
    base_dtype: str
    first: int
    name: str = ""
    hessian: NDArray[np.floating] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the run."""
        rows, columns = self.base.shape
        return rows, columns

    def run(self, start: int, stop: int) -> DeltaRows:
        """Return the rows ``start`` to ``stop`` of the tensor, which lie in this run."""
        part = slice(start - self.first, stop - self.first)
        return replace(self, finetuned=self.finetuned[part], base=self.base[part], first=start)

    def dense(self) -> NDArray[np.float32]:
        """Return the float32 delta.

        Raises:
            NonFiniteError: an element is NaN or infinite.
        """
        delta, finite = subtract(self.finetuned, self.finetuned_dtype, self.base, self.base_dtype)
        if not finite:
            row, column = (int(i) for i in np.argwhere(~np.isfinite(delta))[0])
            raise NonFiniteError(f"the delta at row {self.first + row}, column {column} is {delta[row, column]}")
        return delta

    def gather(self, positions: NDArray[np.uint8], m: int, share: int, factor: np.float32) -> NDArray[np.float32]:
        """Return the kept entries times ``factor``, as :func:`deltafmt.methods.sampling.gather` does.

        Raises:
            NonFiniteError: an element, kept or not, is NaN or infinite.
        """
        kept, finite = gather_difference(
            self.finetuned, self.finetuned_dtype, self.base, self.base_dtype, positions, m, share, factor
        )
        if not finite:
            self.dense()
        return kept


@dataclass(frozen=True, slots=True)
class PackedTerm:
    """A term that is being packed: the arrays of its matrix, which its codec fills."""

    codec: AnyCodec
    packed: Packed


class Method(ABC):
    """A compression method with its options: a frozen dataclass of this class.

    A method must give the same arrays for the same delta and seed whatever the runs that the rows are handed in, and
    must not choose its seed by the error that it gives. Attributes that a method does not define have the values here.

    Attributes:
        name: the name of the method in its spelling, such as ``deltadq``.
        summary: what the method does, in a line.
        details: what the method does, in one or a few sentences.
        paper: where the method comes from.
        stores: the terms that a matrix becomes.
        example: a spelling of the method that shows its main options.
        at_random: True if most of its error is drawn at random, not decided by the weights.
        exact: True if it keeps every bit, of tensors of any dtype and shape, and gives no terms.
        needs: conditions without which options have no effect, by the options' keys.
    """

    __slots__ = ()

    name: ClassVar[str]
    summary: ClassVar[str]
    details: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stores: ClassVar[str] = ""
    example: ClassVar[str] = ""
    at_random: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs: ClassVar[Needs] = MappingProxyType({})

    def __post_init__(self) -> None:
        """Check the options: each by itself, then together, then whether each has an effect.

        Raises:
            UsageError: an option is out of range or has no effect, or options do not go together.
        """
        check_options(self)
        self.check()
        check_effects(self)

    def check(self) -> None:  # noqa: B027 - most methods have nothing to add
        """Check what the declarations of the options do not say.

        Raises:
            UsageError: an option, or the combination, is out of range.
        """

    @property
    def calibration(self) -> str:
        """How the method uses second moments of a matrix's inputs: ``none``, ``optional`` or ``required``."""
        return "none"

    @property
    def whole(self) -> bool:
        """True if :meth:`compress` needs the whole matrix at once, rather than runs of rows."""
        return False

    @property
    def reach(self) -> float:
        """A generous bound: no restored element of a delta is so many times the largest element of the delta."""
        return REACH

    @property
    def by_rows(self) -> bool:
        """True if what it loses of a matrix can be told from some of the rows, packed as a matrix of their own."""
        return not self.whole

    @property
    def across_rows(self) -> bool:
        """True if what it makes of a row depends on the means of all rows."""
        return False

    @property
    def fixed_rank(self) -> bool:
        """True if :meth:`layouts` gives the layouts of every delta of that shape."""
        return True

    @property
    def head_rank(self) -> int:
        """The number of singular vectors that :meth:`approximate` takes from the heads that methods share."""
        return 0

    @property
    def head_grid(self) -> Grid | None:
        """The grid of these vectors' codes; None without them."""
        return None

    @abstractmethod
    def layouts(self, rows: int, columns: int) -> tuple[TermLayout, ...]:
        """Return the layouts of the terms that a matrix of this shape becomes, in the order of their sum.

        Where the delta decides how many vectors a ``lowrank`` term has, these layouts have the smallest possible
        number; the arrays of :meth:`compress` have the true one.

        Raises:
            UsageError: the options do not fit this shape.
        """

    def spelling(self) -> str:
        """Return the text that :func:`deltafmt.methods.parse` reads as this method, such as ``rtn:bits=3``."""
        return spelling(self)

    @abstractmethod
    def describe(self) -> str:
        """Return the name and the options in one line, for the file's metadata; equal only for equal options."""

    @abstractmethod
    def compress(self, rows: DeltaRows, seed: int) -> tuple[TermArrays, ...]:
        """Compress with the tensor's seed, 32 bits; return the arrays of each term.

        A run starts on a multiple of every layout's run of rows; a whole matrix is one run.
        """

    def pack(self, rows: DeltaRows, seed: int, terms: Sequence[PackedTerm]) -> None:
        """Compress rows of a tensor with its seed, 32 bits, into their part of the terms' packed arrays.

        Raises:
            NonFiniteError: an element of the delta is NaN or infinite.
            UsageError: the method cannot have this delta.
        """
        width = max(term.codec.width for term in terms)
        step = max(term.codec.run_rows for term in terms)
        for start, stop in row_ranges(rows.first, rows.first + rows.shape[0], width, step):
            for term, arrays in zip(terms, self.compress(rows.run(start, stop), seed), strict=True):
                term.codec.encode(arrays, term.packed, start)

    def expected(self, sample: Sampled) -> Expected | None:  # noqa: ARG002
        """Return what the method is expected to make of a delta, without packing it; None if nobody has a formula."""
        return None

    def with_gain(self, gain: float) -> Method | None:  # noqa: ARG002
        """Return the method with another gain of its codes; None if it has none, or the user has chosen it."""
        return None

    def approximate(self, rows: DeltaRows, seed: int, heads: Heads) -> NDArray[np.float32]:  # noqa: ARG002
        """Return the delta that a reader would decode after this method, to measure its loss.

        A method that begins with singular vectors takes them from ``heads``, which computes them once for all methods.

        Args:
            rows: the matrix.
            seed: the tensor's seed, 32 bits.
            heads: quantized singular vectors of this delta.

        Returns:
            The decoded delta, float32, shape (rows, columns).

        Raises:
            UsageError: the method cannot have this matrix.
        """
        total = np.zeros(rows.shape, np.float32)
        for layout, arrays in zip(self.layouts(*rows.shape), self.compress(rows, seed), strict=True):
            total += decoded(layout, arrays, rows.shape, seed)
        return total
