"""Tensors as views of the one device allocation that a delta's bytes were copied into (spec, section 11.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.device_memory import BUFFER_DTYPES, DeviceMemory, PlacedBuffers
from deltafmt.kernels.operand import Operand
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.layout_checks import Run
from deltafmt.runtime.placement import LayoutPlan, Placement


class DeviceTensors(Mapping[str, DeviceTensor]):
    """The tensors of a delta, made when they are first asked for.

    Args:
        placement: the file's index, and where the buffers lie; the file may be closed.
        memory: uint8, 1-d, its length a multiple of 256; holds what was placed.
    """

    def __init__(self, placement: Placement, memory: torch.Tensor) -> None:
        self._placement = placement
        self._memory = DeviceMemory(memory)
        self._made: dict[str, DeviceTensor] = {}

    @property
    def memory(self) -> torch.Tensor:
        """The allocation that holds every buffer."""
        return self._memory.bytes

    def moved(self, memory: torch.Tensor) -> DeviceTensors:
        """Return the same tensors in a copy of the allocation."""
        return DeviceTensors(self._placement, memory)

    @property
    def address(self) -> int:
        """Where the allocation begins."""
        return self._memory.address

    @property
    def layout(self) -> LayoutPlan:
        """Where everything lies in it."""
        return self._placement.layout

    @property
    def seeds(self) -> NDArray[np.int64] | None:
        """The seeds of all terms, in the layout's order; None unless the tensors were placed ahead."""
        return self._placement.seeds

    def __getitem__(self, name: str) -> DeviceTensor:
        found = self._made.get(name)
        if found is None:
            if name not in self._placement.names:
                raise KeyError(name)
            entry = self._placement.container.entry(name)
            found = self._make(entry) if entry.target is None else self.of_entry(entry.target)
            found = self._made.setdefault(name, found)  # another thread may have made it
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._placement.names)

    def __len__(self) -> int:
        return len(self._placement.names)

    def __contains__(self, name: object) -> bool:
        return name in self._placement.names

    def of_entry(self, name: str) -> DeviceTensor:
        """Return a tensor that has bytes of its own, though perhaps only an alias of it was named."""
        return self[name] if name in self._placement.names else self._make(self._placement.container.entry(name))

    def of_run(self, run: Run) -> torch.Tensor:
        """Return the numbers of a run, one buffer a row."""
        return self._memory.rows(BUFFER_DTYPES[run.dtype], len(run.names), run.length, run.first, run.step)

    def _make(self, entry: TensorEntry) -> DeviceTensor:
        place = self._placement.layout.place(entry)
        terms = tuple(
            Operand(
                at.layout,
                at.rows,
                at.columns,
                PlacedBuffers(self._memory, at.forms, at.offsets),
                term.seed,
                at.slots,
            )
            for at, term in zip(place.terms, entry.terms, strict=True)
        )
        data = place.data
        return DeviceTensor(entry, terms, None if data is None else self._memory.view(*data))
