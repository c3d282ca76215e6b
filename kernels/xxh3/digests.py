"""XXH3-128 of sections on a device: the Triton kernels where they run, otherwise the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from deltafmt import accel
from deltafmt.errors import UsageError
from deltafmt.kernels.xxh3 import naive

# A sixteenth of it is taken while the sections of a batch are summed.
BATCH_BYTES = 1 << 30
MAX_BATCH = 1 << 15


def can_run(device: torch.device) -> bool:
    """Tell whether the kernels run on a device; elsewhere a hash library on the host is faster."""
    return device.type == "cuda" and accel.has_triton()


def digests(memory: torch.Tensor, sections: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the XXH3-128 (seed 0) of parts of a tensor, most significant byte first.

    On a GPU the kernels run on the current stream and are waited for, and memory of a sixteenth of the sections, of
    those of at most 1 GiB at a time, is taken meanwhile.

    Args:
        memory: uint8, 1-d, contiguous, its length a multiple of 8.
        sections: offset, a multiple of 8, and length, more than 240, of each in bytes.

    Raises:
        UsageError: the tensor or a section is of another kind.
    """
    if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous() or memory.numel() % 8:
        raise UsageError(f"expected uint8 in one row of a multiple of 8, found {memory.dtype} {tuple(memory.shape)}")
    for offset, length in sections:
        if offset % 8 or length <= naive.SHORT_BYTES or not 0 <= offset <= memory.numel() - length:
            raise UsageError(f"{length} bytes at {offset} of {memory.numel()} are not a section")
    if not can_run(memory.device):
        host = memory.cpu().numpy().data
        return [naive.digest(host[offset : offset + length]) for offset, length in sections]
    from deltafmt.kernels.xxh3 import triton  # noqa: PLC0415 - optional

    found = []
    with torch.cuda.device(memory.device):
        for batch in batches(sections):
            starts, lengths = np.array(batch, np.int64).T
            sums = triton.accumulators(memory.view(torch.int64), starts // 8, lengths)
            found += naive.merged(sums.cpu().numpy().view(np.uint64), lengths.astype(np.uint64))
    return found


def batches(sections: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield runs of sections of at most ``BATCH_BYTES`` together, or of one that is larger."""
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
