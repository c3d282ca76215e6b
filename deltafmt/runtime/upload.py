"""Streaming upload: a delta file is read, checked and copied into one device allocation at the same time.

Threads read pieces of the file into pinned buffers and queue the copies on a stream. The uploaded bytes are the bytes
that the kernels read. A GPU takes the checksums (spec, section 5.3) of the sections that lie on it as a whole; the
threads take the others. A ``rank`` index, which only a ``cold`` file has, becomes ``fixed`` on the device (section
11.4).
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import threading
from collections.abc import Sequence
from concurrent.futures import wait
from typing import BinaryIO, cast

import torch

from deltafmt.container.reader import Container
from deltafmt.delta import DeltaFile, refuse_child, refuse_exact
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format.constants import BUFFER_ALIGNMENT, FEATURE_EXACT, align
from deltafmt.kernels.kind import Conversion
from deltafmt.kernels.registry import KERNELS
from deltafmt.kernels.xxh3.digests import are_loaded, digests, load_soon, wait_loaded
from deltafmt.kernels.xxh3.digests import can_run as has_checksums
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.device_views import DeviceTensors
from deltafmt.runtime.pinned import MAX_THREADS, give_ring, start_threads, take_ring
from deltafmt.runtime.placement import Placement
from deltafmt.runtime.reading import Upload
from deltafmt.runtime.unlocked import UnlockedUpload, takes
from deltafmt.runtime.unlocked import can_run as can_unlock
from deltafmt.runtime.upload_plan import UploadPlan

PINNED_BYTES = 64 * 1024 * 1024
# Threads without the interpreter's lock, measured on 16 cores: 14 threads reach 0.87 of a pinned copy, 12 reach 0.81, 8
# reach 0.50, and 16 no more than 14. Each thread has two buffers and reads into one while the other is copied. Larger
# ones leave the CPU's cache (4 MiB: 0.53); smaller ones make too many copies, of which each costs 2 us (1 MiB: 0.81).
BUFFER_BYTES = 2 * 1024 * 1024
DEFAULT_THREADS = 14
# Threads with the interpreter's lock pass it on several times for each piece. Pieces of 8 MiB take two thirds of the
# time of pieces of 2 MiB.
LOCKED_BUFFER_BYTES = 8 * 1024 * 1024

_streams: dict[torch.device, torch.cuda.Stream] = {}


def load(
    path: str | os.PathLike[str] | BinaryIO,
    device: torch.device | str = "cuda",
    *,
    tensors: str | Sequence[str] | None = None,
    verify: bool = True,
    threads: int | None = None,
    pinned_bytes: int = PINNED_BYTES,
    cancel: threading.Event | None = None,
    stream: torch.cuda.Stream | None = None,
    known: DeltaFile | None = None,
) -> DeviceDelta:
    """Bring a delta to a device.

    When this returns, every checksum has been compared, and the current stream can use the tensors; other streams wait
    for it as for any tensor. Entries of the index are decoded when a tensor is first asked for.

    Args:
        path: a path, or a binary file object with ``seek`` and ``read``.
        device: a CUDA device, or ``cpu``.
        tensors: a name, a pattern such as ``model.layers.0.*``, or a list of them; None for all. Sections are always
            read and checked as a whole, but only the buffers of the named tensors take memory on the device.
        verify: compare the checksum of every section that is read, and check the padding behind it.
        threads: the number of threads that read; by default the number of processors, up to 14. Only one thread at a
            time reads a file object.
        pinned_bytes: the bytes of host memory that the file passes through, at least 1 MiB. The memory is kept for the
            next load, see :func:`deltafmt.runtime.pinned.free_buffers`; each of several simultaneous loads has its own.
        cancel: an event; set it from any thread to stop the load.
        stream: the stream to copy on; by default a stream that only uploads use.
        known: an earlier opening of the same file, which may be closed. The entries that it has decoded are used again
            if the index is still the same.

    Raises:
        InvalidFileError: a section is damaged, or the file became shorter or breaks the format.
        StorageError: the file cannot be read.
        UsageError: the device or a tensor does not exist, or an argument is out of range.
        CancelledError: ``cancel`` was set.
        torch.OutOfMemoryError: the device has no room.
    """
    target = _device(device)
    count = _thread_count(threads)
    with Container(path, mmap=False, earlier=None if known is None else known.container) as container:
        placed = _place(container, tensors)
        return _fill(container, placed, target, count, pinned_bytes, stream, verify=verify, cancel=cancel)


def load_placed(
    path: str, device: torch.device, placed: Placement, *, cancel: threading.Event | None = None
) -> DeviceDelta:
    """Bring a delta to a device whose index was read, and whose tensors were placed, before.

    If the file's index is another now, it is placed anew. Otherwise as :func:`load`.
    """
    with Container(path, mmap=False, earlier=placed.container) as container:
        if container.seal != placed.container.seal:
            placed = _place(container, list(placed.names))
        target = _device(device)
        return _fill(container, placed, target, _thread_count(None), PINNED_BYTES, None, verify=True, cancel=cancel)


def prepare(device: torch.device) -> None:
    """Do now what the first load of a process would have to: pin buffers, start threads, load the checksum kernels."""
    if device.type != "cuda":
        return
    ring = take_ring(device, PINNED_BYTES, BUFFER_BYTES if can_unlock(device) else LOCKED_BUFFER_BYTES)
    stream = _upload_stream(device)
    for buffer in ring.buffers:
        buffer.recorded(stream)
    give_ring(ring)
    count = _thread_count(None)
    together = threading.Barrier(count)  # no thread ends before all have begun
    wait(start_threads(lambda _: _meet(together), count))
    if has_checksums(device):
        load_soon(device)
        wait_loaded(device)


def _meet(barrier: threading.Barrier) -> None:
    """Wait for the other threads."""
    barrier.wait()


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is unknown to torch") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise UsageError(f"device {str(found)!r} is neither cuda nor cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device {str(found)!r} cannot be used: torch finds no CUDA device")
    index = cast("int | None", found.index)
    if index is None:
        index = torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise UsageError(f"device {str(found)!r} is not one of the {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def _thread_count(threads: int | None) -> int:
    if threads is None:
        held = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(held, DEFAULT_THREADS)
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} threads are not a number from 1 to {MAX_THREADS}")
    return threads


def _select(container: Container, tensors: str | Sequence[str]) -> list[str]:
    """Return the names that match, in the file's order."""
    names = container.keys()
    chosen: set[str] = set()
    for pattern in [tensors] if isinstance(tensors, str) else tensors:
        found = [pattern] if pattern in container else fnmatch.filter(names, pattern)
        if not found:
            raise UsageError(f"{container.name}: no tensor matches {pattern!r}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _place(container: Container, tensors: str | Sequence[str] | None) -> Placement:
    refuse_child(container)
    if container.features & FEATURE_EXACT:
        names = container.keys() if tensors is None else _select(container, tensors)
        refuse_exact(container.name, map(container.entry, names))
    return Placement.whole(container) if tensors is None else Placement.some(container, _select(container, tensors))


def _fill(
    container: Container,
    placed: Placement,
    device: torch.device,
    threads: int,
    pinned_bytes: int,
    stream: torch.cuda.Stream | None,
    *,
    verify: bool,
    cancel: threading.Event | None,
) -> DeviceDelta:
    """Return the tensors of a device allocation that is filled with the file's bytes."""
    plan = placed.layout.upload
    container.limits.check_output(plan.nbytes, container.size, 0, f"{container.name}: the device takes")
    lane = None if device.type == "cpu" else stream or _upload_stream(device)
    # Until the kernels of a process are loaded, the threads take the checksums.
    later = _checked_there(container, plan) if verify and has_checksums(device) and are_loaded(device) else {}
    unlocked = lane is not None and can_unlock(device) and takes(container, plan.sections, later, verify=verify)
    moved = sum(container.sections[number].raw_length for number in plan.sections)
    ring = take_ring(device, pinned_bytes, BUFFER_BYTES if unlocked else LOCKED_BUFFER_BYTES, moved)
    try:
        # The threads, which are not in inference mode, could not write to tensors that are made in it. Memory that is
        # allocated on the upload's stream need not wait for the caller's work on other streams.
        with torch.inference_mode(mode=False), contextlib.nullcontext() if lane is None else torch.cuda.stream(lane):
            memory, scratch = (
                torch.empty(align(nbytes, BUFFER_ALIGNMENT), dtype=torch.uint8, device=device)
                for nbytes in (plan.nbytes, plan.scratch_bytes)
            )
            found = DeviceTensors(placed, memory)
            pieces = placed.layout.pieces(container, ring.buffer_bytes)
            upload: Upload | UnlockedUpload
            if unlocked and lane is not None:
                upload = UnlockedUpload(container, pieces, ring, memory, scratch, lane, verify=verify, cancel=cancel)
            else:
                upload = Upload(
                    container, pieces, ring, memory, scratch, lane, verify=verify, later=later, cancel=cancel
                )
            try:
                upload.run(threads)
                _check(container, memory, later)
                _convert(container, plan, memory, scratch)
            except BaseException:
                if lane is not None:
                    lane.synchronize()
                # Somebody may keep the error, and with it the frames of its traceback: they must not hold the memory.
                upload.forget()
                del memory, scratch, found
                raise
    finally:
        give_ring(ring)
    if verify and has_checksums(device):
        load_soon(device)
    if lane is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(lane)
        memory.record_stream(current)
    return DeviceDelta(device, container.content_id.hex(), container.metadata, memory.nbytes, found)


def _checked_there(container: Container, plan: UploadPlan) -> dict[int, int]:
    """Return the sections that lie on the device as a whole, so that it can take their checksums.

    Returns:
        The sections' offsets in the device allocation, by section number.
    """
    found = {}
    for number in plan.sections:
        section = container.sections[number]
        offset = plan.whole(number, section)
        if offset is not None:
            found[number] = offset
    return found


def _check(container: Container, memory: torch.Tensor, offsets: dict[int, int]) -> None:
    found = digests(memory, [(offset, container.sections[number].length) for number, offset in offsets.items()])
    for number, digest in zip(offsets, found, strict=True):
        container.check_checksum(number, digest)


def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def _convert(container: Container, plan: UploadPlan, memory: torch.Tensor, scratch: torch.Tensor) -> None:
    """Bring the buffers of layouts that kernels do not read into their plain form."""
    by_kind: dict[str, list[Conversion]] = {}
    for conversion in plan.conversions.values():
        by_kind.setdefault(conversion.layout.kind, []).append(conversion)
    for kind, jobs in by_kind.items():
        for number, problem in KERNELS[kind].convert(scratch, memory, jobs).items():
            raise InvalidFileError(f'{container.name}: tensors["{jobs[number].tensor}"]: {problem}')
