"""One allocation that holds the buffers of many operands, which become tensors when somebody asks for them.

Kernels read the addresses of an operand's buffers from its record, and an address is a sum. So the hundreds of tensors
of a delta need not be made before it can be served.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch

from deltafmt.format.constants import element_count
from deltafmt.terms.tiles import BufferForm

# Packed words are int32 in torch, which has few operations on unsigned integers.
BUFFER_DTYPES = {
    "U8": torch.uint8,
    "U32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


class DeviceMemory:
    """One allocation, and its views as other dtypes.

    Args:
        memory: uint8, 1-d, its length a multiple of the size of every dtype.

    Attributes:
        address: where it begins.
        device: where it lies.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.bytes = memory
        self.address = memory.data_ptr()
        self.device = memory.device
        self._bases = {torch.uint8: memory}

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """Return a contiguous tensor that begins at an offset in bytes, a multiple of the dtype's size."""
        # Whoever asks first may be in inference mode, whose tensors cannot be used everywhere.
        with torch.inference_mode(mode=False):
            base = self._base(dtype)
            if not element_count(shape):
                return base[:0].view(shape)
            # The memory may be a part of a larger allocation.
            return base.as_strided(shape, _strides(shape), base.storage_offset() + offset // dtype.itemsize)

    def rows(self, dtype: torch.dtype, count: int, length: int, offset: int, step: int) -> torch.Tensor:
        """Return rows of elements, of which the first begins at ``offset``, and each next one ``step`` bytes behind."""
        with torch.inference_mode(mode=False):
            base = self._base(dtype)
            strides = step // dtype.itemsize, 1
            return base.as_strided((count, length), strides, base.storage_offset() + offset // dtype.itemsize)

    def _base(self, dtype: torch.dtype) -> torch.Tensor:
        base = self._bases.get(dtype)
        if base is None:
            base = self._bases[dtype] = self.bytes.view(dtype)
        return base


class PlacedBuffers(Mapping[str, torch.Tensor]):
    """The buffers of one operand in an allocation.

    Args:
        memory: the allocation.
        forms: the buffers' forms by name.
        offsets: where each begins, in bytes; each lies within the allocation as a whole.

    Attributes:
        forms: the buffers' forms by name.
    """

    __slots__ = ("_made", "_memory", "_offsets", "forms")

    def __init__(self, memory: DeviceMemory, forms: Mapping[str, BufferForm], offsets: Mapping[str, int]) -> None:
        self.forms = forms
        self._memory = memory
        self._offsets = offsets
        self._made: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._made.get(name)
        if found is None:
            form = self.forms[name]
            found = self._memory.view(BUFFER_DTYPES[form.dtype], form.shape, self._offsets[name])
            self._made[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return self._memory.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(form.nbytes for form in self.forms.values())

    def addresses(self) -> dict[str, int]:
        """Return where each buffer begins, by name; no tensor is made for that."""
        start = self._memory.address
        return {name: start + offset for name, offset in self._offsets.items()}


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(element_count(shape[i + 1 :]) for i in range(len(shape)))
