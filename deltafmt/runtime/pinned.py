"""Pinned host memory and threads of the upload, which are kept from one load to the next.

Threads read pieces of a file into pinned buffers, and the device copies from these. A ring is the set of pinned buffers
that one load uses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from deltafmt.errors import UsageError
from deltafmt.format.constants import ZSTD_CHUNK

MIN_BUFFERS = 4
MAX_THREADS = 64


class PinnedBuffer:
    """One buffer of a ring.

    Attributes:
        tensor: a uint8 tensor, pinned if the device is a GPU.
        view: the same bytes as a memoryview.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.view = memoryview(tensor.numpy())  # type: ignore[arg-type]
        self._copied: torch.cuda.Event | None = None
        self._handle = 0

    def record(self, stream: torch.cuda.Stream) -> None:
        """Note that copies from this buffer are queued on a stream."""
        if self._copied is None:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(stream)

    def recorded(self, stream: torch.cuda.Stream) -> int:
        """Return the handle of the event behind the copies from this buffer; a new event is recorded at once."""
        if self._copied is None:
            self.record(stream)
        if not self._handle and self._copied is not None:
            self._handle = int(self._copied.cuda_event)
        return self._handle

    def wait(self) -> None:
        """Wait until no copy reads this buffer any more."""
        # A query keeps the interpreter's lock; a wait gives it away and must get it back.
        if self._copied is not None and not self._copied.query():  # type: ignore[no-untyped-call]
            self._copied.synchronize()


class Ring:
    """The pinned buffers of one load.

    Args:
        device: the device that the copies go to; only copies to a GPU need pinned memory.
        nbytes: the bytes of all buffers together, at least 1 MiB.
        buffer_bytes: the bytes of each buffer; smaller if there would be fewer than four buffers.
    """

    def __init__(self, device: torch.device, nbytes: int, buffer_bytes: int) -> None:
        self.device = device
        self.nbytes = nbytes
        self.buffer_bytes = fitting(nbytes, buffer_bytes)
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        starts = range(0, nbytes - self.buffer_bytes + 1, self.buffer_bytes)
        self.buffers = [PinnedBuffer(self.memory[start : start + self.buffer_bytes]) for start in starts]


def fitting(nbytes: int, buffer_bytes: int) -> int:
    """Return the bytes of each buffer, so that there are at least four and each holds whole zstd chunks."""
    return min(buffer_bytes, nbytes // MIN_BUFFERS // ZSTD_CHUNK * ZSTD_CHUNK)


class _Cache:
    """The idle rings by device, and the threads. A forked child starts with an empty cache: it has no threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rings: dict[torch.device, Ring] = {}
        self.threads: ThreadPoolExecutor | None = None


_cache = _Cache()


def _forget() -> None:
    global _cache  # noqa: PLW0603 - what the parent's cache holds cannot be used here
    _cache = _Cache()


os.register_at_fork(after_in_child=_forget)


def take_ring(device: torch.device, nbytes: int, buffer_bytes: int, needed: int | None = None) -> Ring:
    """Return the idle ring of a device, or a new one; every running load has a ring of its own.

    Args:
        device: the device that the copies go to.
        nbytes: the most bytes that a ring may have.
        buffer_bytes: the bytes of each buffer.
        needed: the bytes that are to be moved, if that is known: a new ring has no more buffers than these fill, since
            pinning takes as long as copying does.

    Raises:
        UsageError: ``nbytes`` is too small for four buffers.
    """
    if nbytes < MIN_BUFFERS * ZSTD_CHUNK:
        raise UsageError(f"pinned_bytes {nbytes} is below {MIN_BUFFERS * ZSTD_CHUNK}")
    size = fitting(nbytes, buffer_bytes)
    wanted = nbytes if needed is None else min(nbytes, max(-(-needed // size), MIN_BUFFERS) * size)
    with _cache.lock:
        ring = _cache.rings.pop(device, None)
    if ring is not None and ring.buffer_bytes == size and wanted <= ring.nbytes <= nbytes:
        return ring
    return Ring(device, wanted, buffer_bytes)


def give_ring(ring: Ring) -> None:
    """Keep a ring for the next load. Only one ring a device is kept; another one is dropped."""
    with _cache.lock:
        _cache.rings[ring.device] = ring


def start_threads(work: Callable[[int], None], count: int) -> list[Future[None]]:
    """Run ``work(0)``, ``work(1)`` and so on in ``count`` threads, which are kept for the next load."""
    with _cache.lock:
        if _cache.threads is None:
            _cache.threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="deltafmt-upload")
        return [_cache.threads.submit(work, number) for number in range(count)]


def free_buffers() -> int:
    """Free the buffers and threads that are kept between loads; return the bytes of the freed buffers.

    Pinned memory goes back to torch's cache of pinned memory. The call waits for loads that are under way.
    """
    with _cache.lock:
        rings, threads = list(_cache.rings.values()), _cache.threads
        _cache.rings, _cache.threads = {}, None
    if threads is not None:
        threads.shutdown(wait=True)
    for ring in rings:
        for buffer in ring.buffers:
            buffer.wait()
    return sum(ring.nbytes for ring in rings)
