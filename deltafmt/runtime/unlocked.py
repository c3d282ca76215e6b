"""An upload whose threads run compiled code and do not need the interpreter's lock, where that can be.

It can for sections that lie in a file as they are to lie on a GPU, and whose checksums the GPU takes; everything else
goes through :mod:`deltafmt.runtime.reading`. The lock, handed from thread to thread some times for every piece, costs
more than reading and copying do.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt import core
from deltafmt.container.reader import Container
from deltafmt.errors import CancelledError
from deltafmt.format.constants import CODEC_STORED
from deltafmt.runtime.pinned import Ring, start_threads
from deltafmt.runtime.upload_pieces import Piece

CANCEL_SECONDS = 0.005

# How a thread's share of an upload ends (kernels/cpu/upload.h).
DONE, STOPPED, NOT_READ, PADDING, DRIVER = range(5)


class Calls(NamedTuple):
    """Addresses of the functions that the compiled loop calls.

    Attributes:
        read: ``pread``.
        bind: ``cuCtxSetCurrent``; like all that follow, gives 0 or an error's number.
        copy: ``cuMemcpyHtoDAsync``.
        record: ``cuEventRecord``.
        wait: ``cuEventSynchronize``.
    """

    read: int
    bind: int
    copy: int
    record: int
    wait: int


def driver_calls() -> Calls | None:
    """Return the functions of the C library and of the CUDA driver, or None where there is no driver."""
    found = None if core.native is None else core.native.driver()
    return None if found is None else Calls(*found)


def current_context() -> int:
    """Return the CUDA context of this thread, as the driver knows it."""
    return 0 if core.native is None else int(core.native.context())


def can_run(device: torch.device) -> bool:
    """Tell whether compiled threads can copy to a device."""
    return device.type == "cuda" and core.native is not None and driver_calls() is not None


def takes(container: Container, sections: Sequence[int], later: Collection[int], *, verify: bool) -> bool:
    """Tell whether all sections are read from an open file as they are, and checked later or not at all."""
    return container.fileno() is not None and all(
        number in later if verify else container.sections[number].codec == CODEC_STORED for number in sections
    )


class UnlockedUpload:
    """One file on its way to a GPU.

    Args:
        container: the file, open as such.
        pieces: what to move, none of it compressed.
        ring: buffers to move it through.
        memory, scratch: uint8 tensors that it goes to.
        stream: that the copies are given to.
        verify: check the padding.
        cancel: when set, the upload stops.
    """

    def __init__(
        self,
        container: Container,
        pieces: Sequence[Piece],
        ring: Ring,
        memory: torch.Tensor,
        scratch: torch.Tensor,
        stream: torch.cuda.Stream,
        *,
        verify: bool,
        cancel: threading.Event | None,
    ) -> None:
        self._container = container
        self._ring = ring
        self._stream = stream.cuda_stream
        stream.query()  # this thread has the device's context from here on
        self._context = current_context()
        self._events = [slot.recorded(stream) for slot in ring.buffers]
        self._cancel = cancel
        self._stop = np.zeros(1, np.int64)
        calls = driver_calls()
        assert calls is not None
        self._calls = np.array(calls, np.int64)
        self._pieces, self._copies, self._paddings = tables(
            pieces, memory.data_ptr(), scratch.data_ptr(), verify=verify
        )

    def run(self, threads: int) -> None:
        """Move everything; return once all of it is given to the stream.

        Args:
            threads: that read.

        Raises:
            InvalidFileError: padding is not zero, or the file has become shorter.
            StorageError: reading failed.
            CancelledError: ``cancel`` was set.
        """
        count = min(threads, len(self._pieces), len(self._ring.buffers))
        futures: list[Future[None]] = []
        try:
            futures = start_threads(lambda number: self._work(number, count), count)
            self._wait(futures)
        finally:
            # Also when interrupted: nobody writes to the buffers any more.
            if not all(future.done() for future in futures):
                self._stop[0] = 1
                wait(futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def forget(self) -> None:
        """Let go of the memory: only addresses of it are held."""

    def _wait(self, futures: list[Future[None]]) -> None:
        timeout = None if self._cancel is None else CANCEL_SECONDS
        while wait(futures, timeout).not_done:
            if self._cancel is not None and self._cancel.is_set():
                raise CancelledError(f"{self._container.name}: loading was cancelled")

    def _work(self, number: int, count: int) -> None:
        """Move every piece whose number is ``number`` modulo ``count``, through every slot of the same kind."""
        ring, native = self._ring, core.native
        assert native is not None
        numbers = range(number, len(ring.buffers) // count * count, count)
        slots = np.array([slot * ring.buffer_bytes for slot in numbers], np.int64)
        events = np.array([self._events[slot] for slot in numbers], np.int64)
        memory = ring.memory.numpy()
        place, is_read = number, False
        try:
            while True:
                outcome, place, detail = native.upload(
                    *(self._pieces, self._copies, self._paddings, place, count, is_read, memory, slots, events),
                    *(self._container.fileno(), self._context, self._stream, self._calls, self._stop),
                )
                if outcome in (DONE, STOPPED):
                    return
                start = int(slots[place // count % len(slots)])
                if outcome == NOT_READ:
                    # Reads the piece again, to know what is wrong; if nothing is, all the better.
                    offset, length = (int(value) for value in self._pieces[place, :2])
                    self._container.read_into(offset, memory[start : start + length].data)
                    is_read = True
                elif outcome == PADDING:
                    at, length, section = (int(value) for value in self._paddings[detail])
                    self._container.check_padding(section, memory[start + at : start + at + length].data)
                else:
                    raise RuntimeError(f"the CUDA driver reports error {detail} while {self._container.name} is loaded")
        except BaseException:
            self._stop[0] = 1
            raise


def tables(
    pieces: Sequence[Piece], memory: int, scratch: int, *, verify: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the pieces, their copies and their padding as the compiled loop takes them (``kernels/cpu/upload.h``).

    Args:
        pieces: what to move.
        memory, scratch: addresses on the device.
        verify: whether to have the padding checked.
    """
    rows: list[tuple[int, ...]] = []
    copies: list[tuple[int, ...]] = []
    paddings: list[tuple[int, ...]] = []
    for piece in pieces:
        first_copy, first_padding = len(copies), len(paddings)
        copies += [
            (copy.source, (scratch if copy.scratch else memory) + copy.target, copy.length) for copy in piece.copies
        ]
        paddings += [
            (share.start + share.length, share.padding, share.section)
            for share in piece.shares
            if verify and share.padding
        ]
        rows.append((piece.offset, piece.length, first_copy, len(copies), first_padding, len(paddings)))
    return _table(rows, 6), _table(copies, 3), _table(paddings, 3)


def _table(rows: Sequence[tuple[int, ...]], width: int) -> NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(-1, width)
