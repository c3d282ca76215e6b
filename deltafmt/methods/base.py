"""What a method is: a rule that turns a run of rows of a dense delta into the arrays of a layout."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.codecs.nm import NMArrays
from deltafmt.layout.nm import NMLayout
from deltafmt.methods.routines import Routines


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

    def compress(
        self, delta: NDArray[np.float32], seed: int, first: int, routines: Routines
    ) -> NMArrays:
        """Compress rows ``first`` and following; ``delta`` is float32 of shape (rows, columns)."""
