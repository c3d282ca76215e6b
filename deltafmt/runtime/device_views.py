"""Tensors as views of the one device allocation that a delta's bytes were copied into (spec, section 11.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.device_memory import DeviceMemory, PlacedBuffers
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.table import record_of
from deltafmt.runtime.checks import numbers_of
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.placement import Placement


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

    def make_all(self) -> None:
        """Make now what will be asked for of every tensor, for example while its bytes are on their way.

        These are the records of operand tables on a GPU, and the buffers that :mod:`deltafmt.runtime.checks` looks at.
        """
        on_gpu = self._memory.device.type == "cuda"
        for name in self._placement.names:
            for operand in self[name].terms:
                if on_gpu:
                    record_of(operand)
                for _ in numbers_of(operand):
                    pass

    def __getitem__(self, name: str) -> DeviceTensor:
        found = self._made.get(name)
        if found is None:
            if name not in self._placement.names:
                raise KeyError(name)
            entry = self._placement.container.entry(name)
            found = self._make(entry) if entry.target is None else self._alias(entry.target)
            self._made[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._placement.names)

    def __len__(self) -> int:
        return len(self._placement.names)

    def __contains__(self, name: object) -> bool:
        return name in self._placement.names

    def _alias(self, target: str) -> DeviceTensor:
        if target in self._placement.names:
            return self[target]
        return self._make(self._placement.container.entry(target))

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
