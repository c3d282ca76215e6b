"""Deltas as the residency moves them: from files and host copies to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from deltafmt.delta import DeltaFile
from deltafmt.errors import StorageError, UsageError
from deltafmt.format.constants import BUFFER_ALIGNMENT, align
from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.operand import Operand
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.upload import load


@dataclass(frozen=True, slots=True)
class Source:
    """A delta file as it was when it was attached.

    Attributes:
        path: the file.
        content_id: in hexadecimal.
        opened: the file, closed; its index has been decoded.
        entries: of its tensors by name; for an alias, that of its target.
        removed: names of tensors that only the base has.
        needed: names of the tensors to bring to the device.
    """

    path: str
    content_id: str
    opened: DeltaFile
    entries: dict[str, TensorEntry]
    removed: tuple[str, ...]
    needed: tuple[str, ...] = ()


def read_source(path: str) -> Source:
    """Read the index of a delta file.

    Raises:
        StorageError, InvalidFileError: see :mod:`deltafmt.errors`.
    """
    with DeltaFile(path) as delta:
        entries = {name: delta.resolve(name) for name in delta}
        return Source(path, delta.content_id, delta, entries, tuple(delta.container.removed))


def device_bytes(entries: Iterable[TensorEntry]) -> int:
    """Return the bytes that tensors take on the device: buffers aligned as in a file, a rank index made fixed."""
    total = 0
    for entry in {entry.name: entry for entry in entries}.values():
        for term in entry.terms:
            for length in term.layout.plain().buffer_lengths(entry.delta_rows, entry.columns, term.slots).values():
                total += align(length, BUFFER_ALIGNMENT)
        if entry.data is not None:
            total += align(entry.data.length, BUFFER_ALIGNMENT)
    return total


class DeltaStore:
    """Load deltas to a device, and copy them to and from host memory.

    Args:
        device: where the deltas go.
        evicted: called with the name of a delta that leaves the device, to forget its tensors.
    """

    def __init__(self, device: torch.device, evicted: Callable[[str], None]) -> None:
        self.sources: dict[str, Source] = {}
        self.evicted = evicted
        self._device = device

    def nbytes(self, name: str) -> int:
        """Return the bytes that a delta takes on the device."""
        source = self.sources[name]
        return device_bytes(source.entries[tensor] for tensor in source.needed)

    def load(self, name: str, cancel: threading.Event) -> DeviceDelta:
        """Bring a delta from its file to the device.

        Raises:
            StorageError: the file is missing, or another than the one that was attached.
        """
        source = self.sources[name]
        try:
            delta = load(source.path, self._device, tensors=source.needed or None, cancel=cancel, known=source.opened)
        except UsageError:
            # A tensor may be missing because the file is another one.
            self._check_unchanged(name, read_source(source.path).content_id)
            raise
        self._check_unchanged(name, delta.content_id)
        self._settle()
        return delta

    def _check_unchanged(self, name: str, content_id: str) -> None:
        source = self.sources[name]
        if content_id != source.content_id:
            raise StorageError(
                f'{source.path} changed since it was attached as "{name}": '
                f"content id {content_id[:16]}, not {source.content_id[:16]}"
            )

    def to_host(self, name: str, value: DeviceDelta) -> DeviceDelta:  # noqa: ARG002 - the store's signature
        """Copy a delta to host memory, pinned if the device is a GPU."""
        pin = self._device.type == "cuda"
        copied = copy_delta(value, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=pin))
        self._settle()
        return copied

    def to_device(self, name: str, host: DeviceDelta) -> DeviceDelta:  # noqa: ARG002 - the store's signature
        """Copy a delta from host memory to the device."""
        copied = copy_delta(host, lambda size: torch.empty(size, dtype=torch.uint8, device=self._device))
        self._settle()
        return copied

    def fence(self) -> torch.cuda.Event | None:
        """Return an event behind what the calling thread's stream has been given."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _settle(self) -> None:
        """Wait for the worker thread's copies, so that any stream may use them."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def copy_delta(delta: DeviceDelta, allocate: Callable[[int], torch.Tensor]) -> DeviceDelta:
    """Copy a delta into new memory, one copy for each allocation that it lies in.

    Args:
        delta: on a device or in host memory.
        allocate: gives a uint8 tensor of a number of bytes.
    """
    copies: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in copies:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copies[key] = allocate(len(whole))
            copies[key].copy_(whole, non_blocking=True)
        start = tensor.storage_offset() * tensor.element_size()
        part = copies[key][start : start + tensor.nbytes]
        return part.view(tensor.dtype).view(tensor.shape)

    tensors = {name: _map_tensor(tensor, moved) for name, tensor in delta.items()}
    held = list(copies.values())
    device = held[0].device if held else delta.device
    return replace(delta, device=device, nbytes=sum(copy.nbytes for copy in held), tensors=tensors)


def _map_tensor(tensor: DeviceTensor, moved: Callable[[torch.Tensor], torch.Tensor]) -> DeviceTensor:
    terms = tuple(_map_operand(term, moved) for term in tensor.terms)
    return replace(tensor, terms=terms, data=None if tensor.data is None else moved(tensor.data))


def _map_operand(term: Operand, moved: Callable[[torch.Tensor], torch.Tensor]) -> Operand:
    return replace(term, buffers={name: moved(tensor) for name, tensor in term.buffers.items()})
