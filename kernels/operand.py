"""One term's packed buffers on a device, whatever its kind."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.device_memory import BUFFER_DTYPES, PlacedBuffers
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import BufferForm

__all__ = ["BUFFER_DTYPES", "Operand", "buffer_forms", "check_form"]


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One term as it lies on a device.

    Attributes:
        layout: the term's layout as kernels read it (``layout.plain()``).
        rows, columns: the shape of the delta.
        buffers: by name, with the shapes and dtypes that the layout's ``buffers`` gives; those of an allocation
            (:class:`.device_memory.PlacedBuffers`) become tensors when they are asked for.
        seed: the tensor seed of a seeded layout; otherwise 0.
        slots: the number of slots of a layout that has slots; otherwise 0.

    Raises:
        UsageError: a layout that kernels do not read, or buffers whose names, shapes, dtypes or devices do not fit.
    """

    layout: TermLayout
    rows: int
    columns: int
    buffers: Mapping[str, torch.Tensor]
    seed: int = 0
    slots: int = 0

    def __post_init__(self) -> None:
        forms = buffer_forms(self.layout, self.rows, self.columns, self.slots)
        if isinstance(self.buffers, PlacedBuffers) and self.buffers.forms is forms:
            return  # every tensor will be made in its form
        if tuple(self.buffers) != tuple(forms):
            raise UsageError(f"a {self.layout.kind} term has the buffers {', '.join(forms)}")
        for name, form in forms.items():
            check_form(name, self.buffers[name], form)
        if len({tensor.device for tensor in self.buffers.values()}) != 1:
            raise UsageError("the buffers of an operand lie on one device")

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        if isinstance(self.buffers, PlacedBuffers):
            return self.buffers.device
        return next(iter(self.buffers.values())).device

    def addresses(self) -> dict[str, int]:
        """Return where each buffer begins, by name."""
        if isinstance(self.buffers, PlacedBuffers):
            return self.buffers.addresses()
        return {name: tensor.data_ptr() for name, tensor in self.buffers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffers."""
        if isinstance(self.buffers, PlacedBuffers):
            return self.buffers.nbytes
        return sum(tensor.nbytes for tensor in self.buffers.values())


@functools.lru_cache(maxsize=4096)
def buffer_forms(layout: TermLayout, rows: int, columns: int, slots: int = 0) -> Mapping[str, BufferForm]:
    """Return the arrays of a term as kernels read them, by name.

    The results are kept, because the hundreds of tensors of a model have only a few layouts and shapes.

    Raises:
        UsageError: kernels do not read this layout.
    """
    if layout.plain() != layout:
        raise UsageError(f"{layout.describe()} is made {layout.plain().describe()} before it is multiplied with")
    return layout.buffers(rows, columns, slots)


def check_form(name: str, tensor: torch.Tensor, form: BufferForm) -> None:
    """Refuse a buffer of another form, because a kernel could read beyond it.

    Raises:
        UsageError: names the buffer.
    """
    dtype = BUFFER_DTYPES[form.dtype]
    if tensor.shape != form.shape or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UsageError(f"{name}: expected contiguous {dtype} {form.shape}, found {found}")
