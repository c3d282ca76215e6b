"""A term's packed buffers on a device, of any kind but ``nm``, which has an operand of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.tiles import BufferForm

# Packed words are int32 to torch, whose unsigned integers can do little.
BUFFER_DTYPES = {
    "U8": torch.uint8,
    "U32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True, eq=False)
class PackedOperand:
    """One term as it lies on a device.

    Attributes:
        layout: of the term.
        rows, columns: of the delta.
        buffers: by name, with the shapes and dtypes that the layout's ``buffers`` says.
        seed: the tensor seed of a seeded layout; otherwise 0.
        slots: of a layout that has slots; otherwise 0.

    Raises:
        UsageError: buffers whose names, shapes or dtypes do not fit, or that lie on several devices.
    """

    layout: TermLayout
    rows: int
    columns: int
    buffers: Mapping[str, torch.Tensor]
    seed: int = 0
    slots: int = 0

    def __post_init__(self) -> None:
        forms = self.layout.buffers(self.rows, self.columns, self.slots)
        if list(self.buffers) != list(forms):
            raise UsageError(f"a {self.layout.kind} term has the buffers {', '.join(forms)}")
        for name, form in forms.items():
            check_form(name, self.buffers[name], form)
        if len({tensor.device for tensor in self.tensors()}) != 1:
            raise UsageError("the buffers of an operand lie on one device")

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the packed buffers."""
        yield from self.buffers.values()

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return next(self.tensors()).device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(tensor.nbytes for tensor in self.tensors())


def check_form(name: str, tensor: torch.Tensor, form: BufferForm) -> None:
    """Refuse a buffer of another form, which a kernel could leave.

    Raises:
        UsageError: names the buffer.
    """
    dtype = BUFFER_DTYPES[form.dtype]
    if tuple(tensor.shape) != form.shape or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UsageError(f"{name}: expected contiguous {dtype} {form.shape}, found {found}")
