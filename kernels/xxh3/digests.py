"""XXH3-128 of sections on a device: the Triton kernels where they run, otherwise the hash library on the host."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
import xxhash

from deltafmt.errors import UsageError
from deltafmt.kernels import devices
from deltafmt.kernels.xxh3 import algorithm

# The most bytes, and the most sections, of a batch. The sums of the largest batch take a sixteenth as many bytes.
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


class Hashing:
    """The XXH3-128 (seed 0) of parts of a tensor on a GPU, batch after batch, each as soon as its bytes have arrived.

    All memory that the kernels need is taken, and filled in, when this is made. Batches share the memory of their sums:
    they are launched on one stream.

    Args:
        memory: uint8, 1-d, contiguous, its length a multiple of 8.
        batches: for each batch offset, a multiple of 8, and length of each section in bytes, more than 240.
    """

    def __init__(self, memory: torch.Tensor, batches: Sequence[Sequence[tuple[int, int]]]) -> None:
        from deltafmt.kernels.xxh3 import kernel

        self._words = memory.view(torch.int64)
        self._lengths = [np.array([length for _, length in batch], np.int64) for batch in batches]
        self._rows = [kernel.sums_rows(lengths) for lengths in self._lengths]
        starts = [np.array([offset // 8 for offset, _ in batch], np.int64) for batch in batches]
        tables = [kernel.section_table(*each) for each in zip(starts, self._lengths, strict=True)]
        ends = np.cumsum([0, *map(len, tables)]).tolist()
        self._places = [slice(*both) for both in pairwise(ends)]
        self._table = torch.from_numpy(np.concatenate([np.empty((0, 4), np.int64), *tables])).to(memory.device)
        most = max((int(rows.sum()) for rows in self._rows), default=0)
        self._sums = torch.empty(most, algorithm.LANES, dtype=torch.int64, device=memory.device)
        self._out = torch.empty(ends[-1], algorithm.LANES, dtype=torch.int64, device=memory.device)

    def launch(self, number: int) -> None:
        """Launch the kernels of a batch on the current stream."""
        from deltafmt.kernels.xxh3 import kernel

        place, most = self._places[number], int(self._rows[number].max())
        with devices.on_device_of(self._words):
            kernel.launch(self._words, self._table[place], self._sums, self._out[place], most)

    def found(self) -> list[bytes]:
        """Wait for the current stream; return the digests of all batches, most significant byte first."""
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        return algorithm.merged(self._out.cpu().numpy().view(np.uint64), lengths.astype(np.uint64))


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
    by_kernel = [section for section in sections if with_kernels and not is_short(section[1])]
    found: dict[tuple[int, int], bytes] = {}
    if by_kernel:
        in_batches = list(batches(by_kernel, BATCH_BYTES))
        hashing = Hashing(memory, in_batches)
        for number in range(len(in_batches)):
            hashing.launch(number)
        found = dict(zip(by_kernel, hashing.found(), strict=True))
    return [found[section] if section in found else on_host(memory, *section) for section in sections]


def is_short(length: int) -> bool:
    """Tell whether a section is so short that another algorithm hashes it, on the host, where it takes no time."""
    return length <= algorithm.SHORT_BYTES


def on_host(memory: torch.Tensor, offset: int, length: int) -> bytes:
    """Return the digest of a section that is brought to the host."""
    host = memory[offset : offset + length].cpu().numpy()
    return xxhash.xxh3_128_digest(host.data)


def batches(sections: Sequence[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Yield runs of at most ``MAX_BATCH`` sections and ``most`` bytes; a larger section is a run of its own."""
    batch: list[tuple[int, int]] = []
    nbytes = 0
    for offset, length in sections:
        if batch and (nbytes + length > most or len(batch) == MAX_BATCH):
            yield batch
            batch, nbytes = [], 0
        batch.append((offset, length))
        nbytes += length
    if batch:
        yield batch
