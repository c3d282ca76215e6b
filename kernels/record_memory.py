"""The memory of operand tables: records that are written on the host, and that one copy brings to the device.

A model has hundreds of operand tables, and each of them changes when a delta comes. Were each table's records a tensor
of their own, a delta would cost as many copies as there are tables.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Bytes of a chunk; a model of 32 layers takes about a fifth of one for four deltas.
CHUNK_BYTES = 1 << 20


class Records:
    """The records of one layout and one group of parts in an operand table.

    Attributes:
        tensor: int64, shape (slots, parts, fields), on the device; it stays where it is.
        host: the same on the host, zeros at first. Written to under the lock of the memory.
    """

    __slots__ = ("_chunk", "_start", "_stop", "host", "tensor")

    def __init__(self, chunk: _Chunk, start: int, shape: tuple[int, ...]) -> None:
        self._chunk = chunk
        self._start, self._stop = start, start + math.prod(shape)
        self.tensor = chunk.device[start : self._stop].view(shape)
        self.host: NDArray[np.int64] = chunk.host.numpy()[start : self._stop].reshape(shape)

    def changed(self) -> None:
        """Note that ``host`` was written to."""
        self._chunk.note(self._start, self._stop)

    def part(self, part: int) -> tuple[_Chunk, int, int, int]:
        """Return the chunk of a part's records, where that of slot 0 begins, how far it is to the next, and fields."""
        _, width, fields = self.host.shape
        return self._chunk, self._start + part * fields, width * fields, fields


class SlotRecords:
    """The records that one slot has in many tables, whatever the slot: all are written at once.

    Args:
        memory: of all these tables.
        places: the records and the part in them of each operand.
    """

    def __init__(self, memory: RecordMemory, places: Iterable[tuple[Records, int]]) -> None:
        self._memory = memory
        found: dict[_Chunk, list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]] = {}
        taken = 0
        for records, part in places:
            chunk, first, step, fields = records.part(part)
            numbers = np.arange(fields)
            found.setdefault(chunk, []).append((first + numbers, np.full(fields, step), taken + numbers))
            taken += fields
        self._chunks = [
            (chunk, [np.concatenate(column) for column in zip(*members, strict=True)])
            for chunk, members in found.items()
        ]

    def write(self, slot: int, values: NDArray[np.int64] | None) -> None:
        """Write the records of a slot, and note that for the next flush.

        Args:
            slot: its number.
            values: the records, one behind the other in the order of the places; None writes zeros.
        """
        with self._memory.lock:
            for chunk, (first, step, taken) in self._chunks:
                at = first + slot * step
                chunk.host.numpy()[at] = 0 if values is None else values[taken]
                chunk.note(int(at.min()), int(at.max()) + 1)
            self._memory.note_written()


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Chunk:
    """Memory of several tables, on the host and on the device.

    Attributes:
        host, device: int64, 1-d, of the same length; the same tensor if the device is the CPU.
        taken: the number of elements that tables have.
        first, last: the elements that were written to since the last copy; none if ``first`` is not below ``last``.
    """

    host: torch.Tensor
    device: torch.Tensor
    taken: int = 0
    first: int = 1 << 62
    last: int = 0

    def note(self, start: int, stop: int) -> None:
        """Note that elements ``start`` to ``stop`` of ``host`` were written to."""
        self.first, self.last = min(self.first, start), max(self.last, stop)


class RecordMemory:
    """The memory of the operand tables of one device; any number of tables and threads use it together.

    A chunk lives as long as one of the tables that have a part of it.

    Args:
        device: of the records.

    Attributes:
        lock: held while the host's records are written or copied.
        flushed: the number of writings that are on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.flushed = 0
        self._written = 0
        self._device = device
        self._chunks: weakref.WeakSet[_Chunk] = weakref.WeakSet()
        self._current: _Chunk | None = None
        self._stream: torch.cuda.Stream | None = None

    def take(self, shape: tuple[int, ...]) -> Records:
        """Return memory for records, which are zeros."""
        needed = math.prod(shape)
        with self.lock:
            chunk = self._current
            if chunk is None or chunk.taken + needed > len(chunk.host):
                chunk = self._current = self._new_chunk(max(needed, CHUNK_BYTES // 8))
            found = Records(chunk, chunk.taken, shape)
            chunk.taken += needed
            found.changed()
            return found

    def note_written(self) -> int:
        """Note that records were written, under the lock; return the number of writings, which a flush brings over."""
        self._written += 1
        return self._written

    def flush(self) -> None:
        """Copy what has changed to the device, and wait for that: other threads launch on other streams."""
        if self.flushed == self._written:
            return
        with self.lock:
            changed = [chunk for chunk in self._chunks if chunk.first < chunk.last]
            with self._copying():
                for chunk in changed:
                    part = slice(chunk.first, chunk.last)
                    if chunk.device is not chunk.host:
                        chunk.device[part].copy_(chunk.host[part], non_blocking=True)
            if changed and self._stream is not None:
                self._stream.synchronize()
            for chunk in changed:
                chunk.first, chunk.last = 1 << 62, 0
            self.flushed = self._written

    def _copying(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _new_chunk(self, length: int) -> _Chunk:
        on_gpu = self._device.type == "cuda"
        # Tensors that are made in inference mode could not be written to outside of it.
        with torch.inference_mode(mode=False):
            host = torch.zeros(length, dtype=torch.int64, pin_memory=on_gpu, device="cpu")
            if self._device.type == "cpu":
                chunk = _Chunk(host, host)
            else:
                chunk = _Chunk(host, torch.empty(length, dtype=torch.int64, device=self._device))
        if on_gpu:
            # A stream of its own, so that a copy does not wait for what the model computes. Work that is under way may
            # still use the new memory, which it has given back.
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._chunks.add(chunk)
        return chunk
