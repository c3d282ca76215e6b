"""XXH3-128 of sections on a device: the Triton kernels where they run, otherwise the hash library on the host."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash

from deltafmt.errors import UsageError
from deltafmt.kernels import devices
from deltafmt.kernels.xxh3 import algorithm

# The most bytes, and the most sections, of a batch. The sums of a batch take a sixteenth as many bytes.
BATCH_BYTES = 1 << 30
MAX_BATCH = 1 << 15


def can_run(device: torch.device) -> bool:
    """Return True if the kernels run on a device."""
    return device.type == "cuda" and devices.has_triton()


def are_loaded(device: torch.device) -> bool:
    """Return True if the kernels can run on a device at once; otherwise :func:`load_soon` brings them there."""
    return device in _loaded and _loaded[device].is_set()


def load_soon(device: torch.device) -> None:
    """Let a thread compile and load the kernels, unless one has done so.

    That takes seconds on a machine that has never compiled them. Whoever cannot wait hashes on the host meanwhile.
    """
    with _lock:
        if device not in _loaded:
            _loaded[device] = threading.Event()
            thread = threading.Thread(target=_load, args=(device,), name="deltafmt-xxh3", daemon=True)
            _threads[device] = thread
            thread.start()


def wait_loaded(device: torch.device) -> None:
    """Wait until :func:`load_soon` has ended, whether it could load the kernels or not."""
    with _lock:
        thread = _threads.get(device)
    if thread is not None:
        thread.join()


_lock = threading.Lock()
_threads: dict[torch.device, threading.Thread] = {}
_loaded: dict[torch.device, threading.Event] = {}


def _load(device: torch.device) -> None:
    """Run the kernels once, on a stream of its own; if that fails, the host goes on hashing."""
    with torch.inference_mode(mode=False), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        memory = torch.zeros(2 * algorithm.BLOCK_BYTES, dtype=torch.uint8, device=device)
        digests(memory, [(0, len(memory))])
    _loaded[device].set()


def digests(memory: torch.Tensor, sections: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the XXH3-128 (seed 0) of parts of a tensor, most significant byte first.

    On a GPU the kernels run on the current stream, and the host waits for them. Meanwhile they take up to 64 MiB of
    memory, or a sixteenth of a section that is larger than 1 GiB.

    Args:
        memory: uint8, 1-d, contiguous, its length a multiple of 8.
        sections: offset, a multiple of 8, and length of each in bytes.

    Raises:
        UsageError: the tensor or a section is of another kind.
    """
    if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous() or memory.numel() % 8:
        raise UsageError(f"expected uint8 in one row of a multiple of 8, found {memory.dtype} {tuple(memory.shape)}")
    for offset, length in sections:
        if offset % 8 or not 0 <= offset <= offset + length <= memory.numel():
            raise UsageError(f"{length} bytes at {offset} of {memory.numel()} are not a section")
    with_kernels = can_run(memory.device)
    # Short inputs have algorithms of their own, and take the host no time.
    by_kernel = [section for section in sections if with_kernels and section[1] > algorithm.SHORT_BYTES]
    found = dict(zip(by_kernel, _by_kernel(memory, by_kernel), strict=True)) if by_kernel else {}
    for offset, length in sections:
        if (offset, length) not in found:
            host = memory[offset : offset + length].cpu().numpy()
            found[offset, length] = xxhash.xxh3_128_digest(host.data)
    return [found[section] for section in sections]


def _by_kernel(memory: torch.Tensor, sections: Sequence[tuple[int, int]]) -> list[bytes]:
    from deltafmt.kernels.xxh3 import kernel

    found = []
    with torch.cuda.device(memory.device):
        for batch in batches(sections):
            starts, lengths = np.array(batch, np.int64).T
            sums = kernel.accumulators(memory.view(torch.int64), starts // 8, lengths)
            found += algorithm.merged(sums.cpu().numpy().view(np.uint64), lengths.astype(np.uint64))
    return found


def batches(sections: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield runs of at most ``MAX_BATCH`` sections and ``BATCH_BYTES``; a larger section is a run of its own."""
    batch: list[tuple[int, int]] = []
    nbytes = 0
    for offset, length in sections:
        if batch and (nbytes + length > BATCH_BYTES or len(batch) == MAX_BATCH):
            yield batch
            batch, nbytes = [], 0
        batch.append((offset, length))
        nbytes += length
    if batch:
        yield batch
