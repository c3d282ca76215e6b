"""What a method is: a rule that turns a run of rows of a dense delta into the arrays of a layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.codecs.floats import Raw
from deltafmt.codecs.nm import NMArrays
from deltafmt.errors import NonFiniteError
from deltafmt.layout.nm import NMLayout
from deltafmt.methods.routines import Routines


@dataclass(frozen=True, slots=True)
class DeltaRows:
    """A run of rows of ``finetuned - base``, computed when a method asks for it.

    Attributes:
        finetuned, base: raw arrays of shape (rows, columns).
        finetuned_dtype, base_dtype: of those, by their safetensors names.
        first: the run's first row in the tensor.
        routines: the implementation of the hot loops.
    """

    finetuned: Raw
    finetuned_dtype: str
    base: Raw
    base_dtype: str
    first: int
    routines: Routines

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
    """

    name: str

    @property
    def layout(self) -> NMLayout:
        """The layout of the arrays that it makes."""

    def describe(self) -> str:
        """Return its name and options in one line, for the file's metadata."""

    def compress(self, rows: DeltaRows, seed: int) -> NMArrays:
        """Compress a run of rows with the tensor's seed, 32 bits."""
