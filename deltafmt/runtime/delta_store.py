"""Loading and copying of deltas for the residency: from files and host copies to the device, and back to the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from deltafmt.delta import DeltaFile, refuse_child, refuse_exact
from deltafmt.errors import StorageError, UsageError
from deltafmt.format.constants import BUFFER_ALIGNMENT, align
from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.operand import Operand
from deltafmt.runtime.checks import check_terms
from deltafmt.runtime.cut_loading import held_bytes, load_held
from deltafmt.runtime.cuts import HeldTensor
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.device_views import DeviceTensors
from deltafmt.runtime.placement import Placement
from deltafmt.runtime.upload import load_placed


@dataclass(frozen=True, slots=True)
class AttachedFile:
    """A delta file as it was when it was attached.

    Attributes:
        path: the file's path.
        content_id: the content id in hexadecimal.
        opened: the file, which is closed again but keeps its decoded index.
        entries: the entries of its tensors by name; an alias has the entry of its target.
        removed: the names of tensors that only the base has.
        needed: the names of the tensors that must be on the device.
        placed: where these go.
        held: the cuts of tensors that must be there instead, by name, if the model is cut over several processes.
    """

    path: str
    content_id: str
    opened: DeltaFile
    entries: dict[str, TensorEntry]
    removed: tuple[str, ...]
    needed: tuple[str, ...] = ()
    placed: Placement | None = None
    held: Mapping[str, HeldTensor] | None = None

    def placing(self, needed: tuple[str, ...], held: Mapping[str, HeldTensor] | None = None) -> AttachedFile:
        """Return the file with its tensors placed, so that the load need not do it.

        Args:
            needed: the names of the tensors that must be on the device; all if there are none.
            held: the cuts of tensors that must be there instead; they are placed as they are loaded.
        """
        if held is not None:
            return replace(self, needed=needed, held=held)
        container = self.opened.container
        chosen = set(needed) or set(container.keys())
        names = [name for name in container.keys() if name in chosen]  # noqa: SIM118 - a container is no mapping
        return replace(self, needed=needed, placed=Placement.ahead(container, names))


def read_attached(path: str) -> AttachedFile:
    """Read the index of a delta file.

    Raises:
        StorageError, InvalidFileError: see :mod:`deltafmt.errors`.
        UsageError: a tensor is exact.
    """
    with DeltaFile(path) as delta:
        entries = {name: delta.resolve(name) for name in delta}
        refuse_child(delta.container)
        refuse_exact(delta.container.name, entries.values())
        return AttachedFile(path, delta.content_id, delta, entries, tuple(delta.container.removed))


def device_bytes(entries: Iterable[TensorEntry]) -> int:
    """Return the bytes that tensors take on the device: buffers are aligned as in a file, a rank index is fixed."""
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
        device: the device of the deltas.
        evicted: a function that is called with the name of a delta that leaves the device.
    """

    def __init__(self, device: torch.device, evicted: Callable[[str], None]) -> None:
        self.files: dict[str, AttachedFile] = {}
        self.evicted = evicted
        self.device = device

    def nbytes(self, name: str) -> int:
        """Return the bytes that a delta takes on the device."""
        file = self.files[name]
        if file.held is not None:
            return sum(held_bytes(file.entries[one.tensor], one) for one in file.held.values())
        return device_bytes(file.entries[tensor] for tensor in file.needed)

    def load(self, name: str, cancel: threading.Event) -> DeviceDelta:
        """Bring a delta from its file to the device.

        Raises:
            StorageError: the file is missing, or it is not the file that was attached.
            InvalidFileError: a tensor breaks a rule of section 15 of the specification.
        """
        file = self.files[name]
        if file.held is not None:
            cuts = load_held(file.path, file.held, self.device, cancel)
            self._check_unchanged(name, cuts.content_id)
            check_terms(file.path, cuts)
            self._settle()
            return cuts
        placed = file.placed
        assert placed is not None
        try:
            delta = load_placed(file.path, self.device, placed, cancel=cancel)
        except UsageError:
            # A tensor may be missing because the file was replaced.
            self._check_unchanged(name, read_attached(file.path).content_id)
            raise
        self._check_unchanged(name, delta.content_id)
        check_terms(file.path, delta)
        self._settle()
        return delta

    def _check_unchanged(self, name: str, content_id: str) -> None:
        file = self.files[name]
        if content_id != file.content_id:
            raise StorageError(
                f'{file.path} changed since it was attached as "{name}": '
                f"content id {content_id[:16]}, not {file.content_id[:16]}"
            )

    def to_host(self, name: str, value: DeviceDelta) -> DeviceDelta:  # noqa: ARG002 - the store's signature
        """Copy a delta to host memory, pinned if the device is a GPU."""
        pin = self.device.type == "cuda"
        copied = copy_delta(value, lambda size: torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin))
        self._settle()
        return copied

    def to_device(self, name: str, host: DeviceDelta) -> DeviceDelta:  # noqa: ARG002 - the store's signature
        """Copy a delta from host memory to the device."""
        copied = copy_delta(host, lambda size: torch.empty(size, dtype=torch.uint8, device=self.device))
        self._settle()
        return copied

    def fence(self) -> torch.cuda.Event | None:
        """Return an event behind all work that the calling thread has queued on its stream."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _settle(self) -> None:
        """Wait for the worker thread's copies, so that any stream may use them."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def copy_delta(delta: DeviceDelta, allocate: Callable[[int], torch.Tensor]) -> DeviceDelta:
    """Copy a delta into new memory, with one copy of the allocation that holds it.

    Args:
        delta: a delta on a device or in host memory.
        allocate: a function from a number of bytes to an empty uint8 tensor.
    """
    tensors = delta.tensors
    if not isinstance(tensors, DeviceTensors):
        return _copy_cuts(delta, allocate)
    memory = allocate(len(tensors.memory))
    memory.copy_(tensors.memory, non_blocking=True)
    return replace(delta, device=memory.device, tensors=tensors.moved(memory))


def _copy_cuts(delta: DeviceDelta, allocate: Callable[[int], torch.Tensor]) -> DeviceDelta:
    """Copy a delta whose tensors were cut: views of memory that no placement describes."""
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

    def move(operand: Operand) -> Operand:
        return replace(operand, buffers={name: moved(tensor) for name, tensor in operand.buffers.items()})

    tensors: dict[str, DeviceTensor] = {}
    for name, tensor in delta.items():
        data = None if tensor.data is None else moved(tensor.data)
        tensors[name] = replace(tensor, terms=tuple(map(move, tensor.terms)), data=data)
    held = list(copies.values())
    device = held[0].device if held else delta.device
    return replace(delta, device=device, nbytes=sum(copy.nbytes for copy in held), tensors=tensors)
