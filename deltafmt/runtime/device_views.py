"""Tensors as views of the one device allocation that a delta's bytes were copied into (spec, section 11.3)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch

from deltafmt.container.reader import Container
from deltafmt.format.constants import element_count
from deltafmt.index.entries import TensorEntry, Term
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand, buffer_forms
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.upload_plan import UploadPlan
from deltafmt.terms.layout import TermLayout

# A dtype that torch lacks (or lacked when it was built) is left as bytes.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items() if hasattr(torch, torch_name)
}


class DeviceTensors(Mapping[str, DeviceTensor]):
    """The tensors of a delta, made from its index when they are first asked for.

    Args:
        container: its index; the file may be closed.
        names: of the tensors.
        memory: uint8, 1-d, its length a multiple of 256; holds what ``plan`` placed.
        plan: where the buffers lie.
    """

    def __init__(self, container: Container, names: Sequence[str], memory: torch.Tensor, plan: UploadPlan) -> None:
        self._container = container
        self._names = dict.fromkeys(names)
        self._plan = plan
        self._made: dict[str, DeviceTensor] = {}
        self._bases = {torch.uint8: memory}
        self._plain: dict[TermLayout, TermLayout] = {}

    def __getitem__(self, name: str) -> DeviceTensor:
        found = self._made.get(name)
        if found is None:
            if name not in self._names:
                raise KeyError(name)
            entry = self._container.entry(name)
            found = self._make(entry) if entry.target is None else self._alias(entry.target)
            self._made[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _alias(self, target: str) -> DeviceTensor:
        return self[target] if target in self._names else self._make(self._container.entry(target))

    def _make(self, entry: TensorEntry) -> DeviceTensor:
        terms = tuple(self._operand(entry, term) for term in entry.terms)
        return DeviceTensor(entry, terms, self._data(entry))

    def _operand(self, entry: TensorEntry, term: Term) -> Operand:
        rows, columns = entry.delta_rows, entry.columns
        layout = self._plain.setdefault(term.layout, term.layout.plain())
        buffers = {}
        for name, form in buffer_forms(layout, rows, columns, term.slots).items():
            offset = self._plan.plain_offset(entry, term, name)
            buffers[name] = self._view(BUFFER_DTYPES[form.dtype], form.shape, offset)
        return Operand(layout, rows, columns, buffers, term.seed, term.slots)

    def _data(self, entry: TensorEntry) -> torch.Tensor | None:
        """Return the bytes of ``replace``, or of new rows, in the tensor's dtype if torch has it."""
        if entry.data is None:
            return None
        offset = self._plan.offset(entry.data)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            return self._view(torch.uint8, (entry.data.length,), offset)
        shape = entry.shape if entry.action == "replace" else (entry.rows - entry.delta_rows, entry.columns)
        return self._view(dtype, shape, offset)

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        base = self._bases.get(dtype)
        if base is None:
            base = self._bases[dtype] = self._bases[torch.uint8].view(dtype)
        if not element_count(shape):
            return base[:0].view(shape)
        return base.as_strided(shape, _strides(shape), offset // dtype.itemsize)


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(element_count(shape[i + 1 :]) for i in range(len(shape)))
