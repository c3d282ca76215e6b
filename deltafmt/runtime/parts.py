"""Loading of the parts of a delta's tensors that one of several processes needs.

Whole sections are read, because their checksums cover them whole. Only the parts go to the device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt.delta import DeltaFile, codec_of
from deltafmt.errors import CancelledError, InvalidFileError
from deltafmt.format.constants import BUFFER_ALIGNMENT, DTYPE_BITS, align
from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.runtime.cuts import Cut, TensorPart
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.device_views import TORCH_DTYPES
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.cutting import cut
from deltafmt.terms.part import Part
from deltafmt.terms.tiles import tiles


def part_bytes(entry: TensorEntry, part: TensorPart) -> int:
    """Return about how many bytes a part takes on the device; loading tells how many slots and stored positions."""
    rows, columns, shape = _matrix(entry, part.cut)
    total = 0
    for term in entry.terms:
        slots = min(term.slots, tiles(len(rows)) * len(columns))
        for length in term.layout.plain().buffer_lengths(len(rows), len(columns), slots).values():
            total += align(length, BUFFER_ALIGNMENT)
    if entry.data is not None:
        share = math.prod(shape) / max(math.prod(entry.shape), 1)
        total += align(math.ceil(entry.data.length * share), BUFFER_ALIGNMENT)
    return total


def load_parts(
    path: str, parts: Mapping[str, TensorPart], device: torch.device, cancel: threading.Event
) -> DeviceDelta:
    """Load parts of tensors to a device.

    Args:
        path: the delta file.
        parts: what to load, by the name that each has in the result.
        device: where it goes.
        cancel: ends the loading.

    Raises:
        StorageError, InvalidFileError: the file cannot be read.
        CancelledError: ``cancel`` was set.
    """
    with DeltaFile(path) as delta:
        made = {}
        for name, part in parts.items():
            if cancel.is_set():
                raise CancelledError(f"{path}: loading was cancelled")
            entry = delta.resolve(part.tensor)
            try:
                made[name] = _cut(delta, entry, part.cut)
            except InvalidFileError as error:
                raise InvalidFileError(f'{path}: tensors["{entry.name}"]: {error}') from error
        sizes = [align(array.nbytes, BUFFER_ALIGNMENT) for one in made.values() for array in one.arrays()]
        # Other threads write to these tensors, which they could not if they were made in inference mode.
        with torch.inference_mode(mode=False):
            host = torch.zeros(sum(sizes), dtype=torch.uint8)
            starts = [0, *np.cumsum(sizes).tolist()]
            arrays = (array for one in made.values() for array in one.arrays())
            for start, array in zip(starts, arrays, strict=False):
                host.numpy()[start : start + array.nbytes] = raw_bytes(array)
            memory = host.to(device)
        at = iter(starts)
        tensors = {name: one.on(memory, at) for name, one in made.items()}
        return DeviceDelta(memory.device, delta.content_id, delta.metadata, memory.nbytes, tensors)


@dataclass(frozen=True, slots=True)
class _Made:
    """A part of a tensor in host memory."""

    entry: TensorEntry
    parts: tuple[Part, ...]
    data: NDArray[np.uint8] | None
    data_shape: tuple[int, ...]

    def arrays(self) -> Iterator[NDArray[np.generic]]:
        """Yield all arrays, in the order in which they lie in memory."""
        for part in self.parts:
            yield from (part.packed[name] for name in part.layout.buffers(part.rows, part.columns, part.slots))
        if self.data is not None:
            yield self.data

    def on(self, memory: torch.Tensor, at: Iterator[int]) -> DeviceTensor:
        """Return the part as views of memory."""
        terms = []
        for part in self.parts:
            forms = part.layout.buffers(part.rows, part.columns, part.slots)
            buffers = {}
            for name, form in forms.items():
                start = next(at)
                buffers[name] = memory[start : start + form.nbytes].view(BUFFER_DTYPES[form.dtype]).view(form.shape)
            terms.append(Operand(part.layout, part.rows, part.columns, buffers, part.seed, part.slots))
        data = None
        if self.data is not None:
            start = next(at)
            data = memory[start : start + self.data.nbytes]
            dtype = TORCH_DTYPES.get(self.entry.dtype)
            if dtype is not None:
                data = data.view(dtype).view(self.data_shape)
        return DeviceTensor(self.entry, tuple(terms), data)


def _cut(delta: DeltaFile, entry: TensorEntry, part: Cut | None) -> _Made:
    rows, columns, shape = _matrix(entry, part)
    parts = tuple(cut(codec_of(entry, term), delta.term_views(entry, term), rows, columns) for term in entry.terms)
    data, data_shape = None, shape
    if entry.data is not None:
        data = np.frombuffer(delta.container.buffer(entry.data), np.uint8)
        if part is not None:
            runs = tuple(slice(run.start, run.stop) for run in part.runs)
            data = np.ascontiguousarray(data.reshape(*entry.shape, DTYPE_BITS[entry.dtype] // 8)[runs])
        elif entry.action == "add":
            data_shape = entry.rows - entry.delta_rows, entry.columns
    if part is not None:
        base = None if entry.base is None else replace(entry.base, shape=shape)
        entry = replace(entry, shape=shape, base=base)
    return _Made(entry, parts, data, data_shape)


def _matrix(entry: TensorEntry, part: Cut | None) -> tuple[range, range, tuple[int, ...]]:
    """Return the rows and columns of a part, and its shape."""
    if part is None:
        return range(entry.delta_rows), range(entry.columns), entry.shape
    return part.rows, part.columns, part.shape
