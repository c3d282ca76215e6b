"""A tensor made of parts of a checkpoint's tensors, such as all experts of a layer one behind the other.

It is read in pieces, like a tensor on disk, so it never stands in memory whole (spec/deltafmt-v1.md, section 7.4).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deltafmt.checkpoint.safetensors_file import PagedTensor, Tensor
from deltafmt.format import constants as c
from deltafmt.index.entries import BasePart


@dataclass(frozen=True, slots=True)
class Run:
    """Some elements of a tensor, in C order."""

    tensor: Tensor
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class StitchedTensor(PagedTensor):
    """A tensor whose elements are runs of elements of other tensors, one run after the other.

    Attributes:
        runs: the runs; all of the stitched tensor's dtype.
        ends: the byte behind each run.
    """

    runs: tuple[Run, ...] = ()
    ends: tuple[int, ...] = ()

    def parts(self) -> tuple[BasePart, ...]:
        """Return the tensors of the checkpoint whose elements follow each other in this one."""
        return tuple(BasePart(run.tensor.name, run.start, run.count) for run in self.runs)

    def will_need(self) -> None:
        """Ask the system to read the tensor ahead. An error is ignored."""
        size = self._size()
        for run in self.runs:
            if type(run.tensor) is Tensor:
                run.tensor.file.will_need(run.tensor.offset + run.start * size, run.count * size)

    def forget(self) -> None:
        """Give back the memory of what was computed for the tensors that this one is made of."""
        for run in self.runs:
            run.tensor.forget()

    @contextlib.contextmanager
    def pages(self, start: int, length: int) -> Iterator[memoryview]:
        """Give a view of some bytes: of the file if they lie in one run, otherwise of a copy of them alone."""
        size, stop = self._size(), start + length
        number = min(bisect.bisect_right(self.ends, start), len(self.runs) - 1)
        if stop <= self.ends[number]:
            run = self.runs[number]
            begin = self.ends[number] - run.count * size
            with run.tensor.pages(run.start * size + start - begin, length) as view:
                yield view
            return
        copy = bytearray()
        while len(copy) < length:
            run = self.runs[number]
            position = start + len(copy)
            begin = self.ends[number] - run.count * size
            wanted = min(stop, self.ends[number]) - position
            with run.tensor.pages(run.start * size + position - begin, wanted) as view:
                copy += view
            number += 1
        yield memoryview(copy).toreadonly()

    def _size(self) -> int:
        return c.DTYPE_BITS[self.dtype] // 8


def stitch(name: str, shape: tuple[int, ...], runs: Sequence[Run]) -> Tensor:
    """Return the tensor that runs give; a tensor that is taken whole and in its own shape is returned as it is.

    Args:
        name: the name that the result has in messages.
        shape: its shape; the runs together have as many elements.
        runs: at least one run, all of one dtype with whole bytes.
    """
    first = runs[0].tensor
    if len(runs) == 1 and first.shape == shape and runs[0].count == c.element_count(shape):
        return first
    size = c.DTYPE_BITS[first.dtype] // 8
    ends = tuple(itertools.accumulate(run.count * size for run in runs))
    return StitchedTensor(name, first.dtype, shape, first.file, first.offset, ends[-1], runs=tuple(runs), ends=ends)


def stitch_parts(
    name: str, dtype: str, shape: tuple[int, ...], parts: Sequence[BasePart], tensors: Mapping[str, Tensor]
) -> Tensor | None:
    """Return the tensor that parts of a checkpoint's tensors give, or None if the checkpoint does not have them so.

    Args:
        name: the name that the result has in messages.
        dtype, shape: those of the result.
        parts: what it is made of.
        tensors: the checkpoint's tensors by name.
    """
    runs = []
    for part in parts:
        tensor = tensors.get(part.name)
        if tensor is None or tensor.dtype != dtype or part.start + part.elements > c.element_count(tensor.shape):
            return None
        runs.append(Run(tensor, part.start, part.elements))
    return stitch(name, shape, runs)
