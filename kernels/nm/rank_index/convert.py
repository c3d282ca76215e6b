"""``rank`` indexes made ``fixed`` after they have arrived on a device, by a kernel or in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.kernels import devices
from deltafmt.kernels.kind import Conversion
from deltafmt.kernels.nm.rank_index import decode
from deltafmt.kernels.nm.rank_index.jobs import RankJob
from deltafmt.terms.nm.codec import transcoded
from deltafmt.terms.nm.layout import NMLayout


def convert_ranks(source: torch.Tensor, target: torch.Tensor, conversions: Sequence[Conversion]) -> dict[int, str]:
    """Make ``rank`` indexes ``fixed``.

    Positions are below M whatever the ranks are. The bits behind a row's last rank are not checked.

    Args:
        source: uint8, 1-d, holds the ``rank`` words.
        target: uint8, 1-d, on the same device; takes the ``fixed`` words.
        conversions: which indexes, and where.

    Returns:
        What is wrong with an index, by its number: a rank that is not below C(M, N).

    Raises:
        UsageError: the tensors' dtypes, dimensions or devices do not fit.
    """
    for tensor in (source, target):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise UsageError(f"expected a contiguous 1-d uint8 tensor, found {tensor.dtype} {tuple(tensor.shape)}")
    if source.device != target.device:
        raise UsageError(f"words on {source.device} cannot be written to {target.device}")
    layouts = [cast("NMLayout", one.layout) for one in conversions]
    jobs = [
        RankJob(layout, layout.mask_rows(one.rows), one.columns, one.source // 4, one.target // 4)
        for layout, one in zip(layouts, conversions, strict=True)
    ]
    words = source.view(torch.int32), target.view(torch.int32)
    if devices.usable(target):
        from deltafmt.kernels.nm.rank_index import kernel

        with devices.on_device_of(target):
            wrong = kernel.launch_conversion(*words, jobs)
    elif source.device.type == "cpu":
        wrong = convert_on_host(*words, jobs)
    else:
        wrong = decode.convert_words(*words, jobs)
    return {
        number: f"the index has a rank that is not below {math.comb(layouts[number].m, layouts[number].n)}"
        for number in wrong
    }


def convert_on_host(source: torch.Tensor, target: torch.Tensor, jobs: Sequence[RankJob]) -> list[int]:
    """Do what :func:`decode.convert_words` does, in host memory: by the compiled loops, some tiles at a time."""
    wrong = []
    ranks, fixed = (words.numpy().view(np.uint32) for words in (source, target))
    for number, job in enumerate(jobs):
        words = ranks[job.source : job.source + math.prod(job.source_shape)].reshape(job.source_shape)
        position = job.target
        try:
            for piece in transcoded(job.layout, words, job.mask_rows, job.columns, job.layout.with_index("fixed")):
                fixed[position : position + piece.size] = piece.reshape(-1)
                position += piece.size
        except InvalidFileError:
            wrong.append(number)
    return wrong
