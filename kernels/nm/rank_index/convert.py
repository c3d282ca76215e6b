"""``rank`` to ``fixed``: the Triton kernel where it runs, otherwise the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafmt import accel
from deltafmt.errors import UsageError
from deltafmt.kernels.nm.rank_index import naive
from deltafmt.kernels.nm.rank_index.jobs import RankJob


def make_fixed(source: torch.Tensor, target: torch.Tensor, jobs: Sequence[RankJob]) -> list[int]:
    """Make ``rank`` indexes ``fixed``.

    Positions are below M whatever the ranks are; the bits behind a row's last rank are not looked at.

    Args:
        source: int32, 1-d, holds the ``rank`` words.
        target: int32, 1-d, on the same device; takes the ``fixed`` words.
        jobs: which indexes, and where.

    Returns:
        The numbers of the jobs with a rank that is not below C(M, N).

    Raises:
        UsageError: the tensors' dtypes, dimensions or devices do not fit.
    """
    for tensor in (source, target):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise UsageError(f"expected a contiguous 1-d int32 tensor, found {tensor.dtype} {tuple(tensor.shape)}")
    if source.device != target.device:
        raise UsageError(f"words on {source.device} cannot be written to {target.device}")
    if not target.is_cuda or not accel.has_triton():
        return naive.make_fixed(source, target, jobs)
    from deltafmt.kernels.nm.rank_index import kernel as triton

    with torch.cuda.device(target.device):
        return triton.make_fixed(source, target, jobs)
