"""A cut of a term's matrix as a term of its own: some rows, and some columns of them (specification, appendix A).

Processes that share a model each hold some rows or some columns of its matrices. A cut has the values of the whole,
bit for bit, in the form that kernels read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.terms.buffers import Packed
from deltafmt.terms.layout import TermLayout

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class CutTerm:
    """A term that holds a cut of another term's matrix.

    Attributes:
        layout: its layout, as kernels read it.
        rows, columns: the shape of its matrix.
        packed: its packed arrays by name, with the shapes that the layout's ``buffers`` gives.
        seed: its tensor seed if the layout is seeded; otherwise 0.
        slots: its number of slots if the layout has slots; otherwise 0.
    """

    layout: TermLayout
    rows: int
    columns: int
    packed: Packed
    seed: int = 0
    slots: int = 0


def finer(group: int, length: int, *starts: int) -> int:
    """Return the size of groups of which one begins at each of ``starts``; it divides ``group``, or is 0 for all.

    Args:
        group: elements of a group of the whole row; 0 for all.
        length: elements of the whole row.
        starts: where runs begin.
    """
    return math.gcd(group, *starts) if 0 < group < length else 0


def spread(values: NDArray[Scalar], group: int, target: int, start: int, count: int) -> NDArray[Scalar]:
    """Return what every group of a run of elements has, given what every group of the whole row has.

    Args:
        values: shape (rows, groups of the whole row).
        group: elements of a group of the whole row; 0 for all.
        target: elements of a group of the run, which divides ``group``; 0 for all.
        start, count: the run.

    Returns:
        An array of shape (rows, groups of the run).
    """
    if not target:
        return values
    firsts = start + np.arange(-(-count // target)) * target
    return np.ascontiguousarray(values[:, firsts // group])


def is_whole(rows: range, columns: range, shape: tuple[int, int]) -> bool:
    """Tell whether a cut is the whole matrix."""
    return (rows, columns) == (range(shape[0]), range(shape[1]))


def has_whole_tiles(rows: range, total: int, tile: int) -> bool:
    """Tell whether a run of rows begins with a tile of so many rows, and ends with one or with the matrix."""
    return rows.start % tile == 0 and (rows.stop % tile == 0 or rows.stop == total)
