"""What a method is: a rule that turns rows of a dense delta into the arrays of one or more terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import NonFiniteError
from deltafmt.methods.method_routines import Routines
from deltafmt.terms.codec import Arrays
from deltafmt.terms.floats import Raw
from deltafmt.terms.registry import Layout


@dataclass(frozen=True, slots=True)
class DeltaRows:
    """A run of rows of ``finetuned - base``, computed when a method asks for it.

    Attributes:
        finetuned, base: raw arrays of shape (rows, columns).
        finetuned_dtype, base_dtype: of those, by their safetensors names.
        first: the run's first row in the tensor.
        routines: the implementation of the hot loops.
        name: of the tensor.
        hessian: second moments of the matrix's inputs, shape (columns, columns), where a calibration has gathered them.
        notes: what a method has to say about the tensor, for whoever packs it.
    """

    finetuned: Raw
    finetuned_dtype: str
    base: Raw
    base_dtype: str
    first: int
    routines: Routines
    name: str = ""
    hessian: NDArray[np.floating] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the run."""
        rows, columns = self.base.shape
        return rows, columns

    def dense(self) -> NDArray[np.float32]:
        """Return the float32 delta.

        Raises:
            NonFiniteError: an element is NaN or infinite.
        """
        delta, finite = self.routines.codec.subtract(self.finetuned, self.finetuned_dtype, self.base, self.base_dtype)
        if not finite:
            row, column = (int(i) for i in np.argwhere(~np.isfinite(delta))[0])
            raise NonFiniteError(f"the delta at row {self.first + row}, column {column} is {delta[row, column]}")
        return delta

    def gather(self, positions: NDArray[np.uint8], group: int, share: int, factor: np.float32) -> NDArray[np.float32]:
        """Return the kept entries times ``factor``, as :func:`deltafmt.methods.sampling.gather` does.

        Raises:
            NonFiniteError: an element, kept or not, is NaN or infinite.
        """
        kept, finite = self.routines.gather_difference(
            self.finetuned, self.finetuned_dtype, self.base, self.base_dtype, positions, group, share, factor
        )
        if not finite:
            self.dense()
        return kept


class Method(Protocol):
    """A compression method with its options.

    A method must give the same arrays for the same delta and seed whatever the runs that the rows are handed in, and
    must not choose its seed by the error that it gives.

    What else there is to know of a method, attributes say that need not be there: ``calibration`` (see
    :func:`calibration_of`), ``fixed_rank`` (:func:`has_fixed_rank`), ``at_random`` (:func:`drops_at_random`).

    Attributes:
        name: as ``--method`` takes it.
        summary: what it does, in a line.
    """

    name: str
    summary: str

    @property
    def whole(self) -> bool:
        """Whether :meth:`compress` needs the whole matrix at once, rather than runs of rows."""

    def layouts(self, rows: int, columns: int) -> tuple[Layout, ...]:
        """Return the layouts of the terms that a matrix of this shape becomes, in the order of their sum.

        Where the delta decides how many vectors a ``lowrank`` term has, the least number; the arrays then say.

        Raises:
            UsageError: the options do not go with this shape.
        """

    def describe(self) -> str:
        """Return its name and options in one line, for the file's metadata; equal only for equal options."""

    def compress(self, rows: DeltaRows, seed: int) -> tuple[Arrays, ...]:
        """Compress with the tensor's seed, 32 bits; return the arrays of each term.

        A run starts on a multiple of every layout's run of rows; a whole matrix is one run.
        """


def calibration_of(method: Method) -> str:
    """Return what second moments are to a method: ``none``, ``optional`` or ``required``."""
    return str(getattr(method, "calibration", "none"))


def has_fixed_rank(method: Method) -> bool:
    """Tell whether the layouts that a method gives for a shape are those of every delta of that shape."""
    return bool(getattr(method, "fixed_rank", True))


def drops_at_random(method: Method) -> bool:
    """Tell whether most of what a method gets wrong is drawn at random, not decided by the weights."""
    return bool(getattr(method, "at_random", False))
