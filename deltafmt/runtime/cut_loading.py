"""Loading of the cuts of a delta's tensors that one of several processes needs.

Whole sections are read, because their checksums cover them whole. Only the cuts go to the device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt.delta import DeltaFile, codec_of
from deltafmt.errors import CancelledError, InvalidFileError
from deltafmt.format.constants import BUFFER_ALIGNMENT, DTYPE_BITS, align
from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.runtime.cuts import Cut, HeldTensor
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.cut_term import CutTerm
from deltafmt.terms.cutting import cut
from deltafmt.terms.tiles import tiles


def held_bytes(entry: TensorEntry, held: HeldTensor) -> int:
    """Return about how many bytes a cut takes on the device; loading tells how many slots and stored positions."""
    rows, columns, shape = _matrix(entry, held.cut)
    total = 0
    for term in entry.terms:
        slots = min(term.slots, tiles(len(rows)) * len(columns))
        for length in term.layout.plain().buffer_lengths(len(rows), len(columns), slots).values():
            total += align(length, BUFFER_ALIGNMENT)
    if entry.data is not None:
        share = math.prod(shape) / max(math.prod(entry.shape), 1)
        total += align(math.ceil(entry.data.length * share), BUFFER_ALIGNMENT)
    return total


def load_held(
    path: str,
    held: Mapping[str, HeldTensor],
    device: torch.device,
    cancel: threading.Event,
    *,
    source: BinaryIO | None = None,
) -> DeviceDelta:
    """Load cuts of tensors to a device.

    Args:
        path: the delta file.
        held: what to load, by the name that each has in the result.
        device: where it goes.
        cancel: ends the loading.
        source: the file's bytes, if they are not to be read from the path.

    Raises:
        StorageError, InvalidFileError: the file cannot be read.
        CancelledError: ``cancel`` was set.
    """
    with DeltaFile(path if source is None else source) as delta:
        made = {}
        for name, one in held.items():
            if cancel.is_set():
                raise CancelledError(f"{path}: loading was cancelled")
            entry = delta.resolve(one.tensor)
            try:
                made[name] = _cut(delta, entry, one.cut)
            except InvalidFileError as error:
                raise InvalidFileError(f'{path}: tensors["{entry.name}"]: {error}') from error
        sizes = [align(array.nbytes, BUFFER_ALIGNMENT) for one in made.values() for array in one.arrays()]
        # Other threads write to these tensors, which they could not if they were made in inference mode.
        with torch.inference_mode(mode=False):
            host = torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu")
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
    """A cut of a tensor in host memory."""

    entry: TensorEntry
    terms: tuple[CutTerm, ...]
    data: NDArray[np.uint8] | None
    data_shape: tuple[int, ...]

    def arrays(self) -> Iterator[NDArray[np.generic]]:
        """Yield all arrays, in the order in which they lie in memory."""
        for term in self.terms:
            yield from (term.packed[name] for name in term.layout.buffers(term.rows, term.columns, term.slots))
        if self.data is not None:
            yield self.data

    def on(self, memory: torch.Tensor, at: Iterator[int]) -> DeviceTensor:
        """Return the cut as views of memory."""
        terms = []
        for term in self.terms:
            forms = term.layout.buffers(term.rows, term.columns, term.slots)
            buffers = {}
            for name, form in forms.items():
                start = next(at)
                buffers[name] = memory[start : start + form.nbytes].view(BUFFER_DTYPES[form.dtype]).view(form.shape)
            terms.append(Operand(term.layout, term.rows, term.columns, buffers, term.seed, term.slots))
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
    terms = tuple(cut(codec_of(entry, term), delta.term_views(entry, term), rows, columns) for term in entry.terms)
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
    return _Made(entry, terms, data, data_shape)


def _matrix(entry: TensorEntry, part: Cut | None) -> tuple[range, range, tuple[int, ...]]:
    """Return the rows and columns of a cut, and its shape."""
    if part is None:
        return range(entry.delta_rows), range(entry.columns), entry.shape
    return part.rows, part.columns, part.shape
