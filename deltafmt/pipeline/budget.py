"""Choosing a method for every tensor, so that a file of a given size loses little (docs/how-to/hit-a-size.md)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from deltafmt.errors import UsageError
from deltafmt.methods import RTN, BitDelta, DeltaDQ, Method, Residual
from deltafmt.pipeline.alternatives import Alternatives, Hessians
from deltafmt.pipeline.choice import Choice
from deltafmt.pipeline.job import PackJob, check_options
from deltafmt.pipeline.plan import Rule
from deltafmt.pipeline.prepare import open_pair, prepare
from deltafmt.pipeline.workers import Progress, thread_count


def default_candidates() -> list[Method]:
    """Return the methods that are tried on every tensor unless candidates are given."""
    dropped = [
        *((1, 64, k) for k in (1, 2)),
        *((1, 32, k) for k in (1, 2, 4)),
        *((1, 16, k) for k in (1, 2, 4)),
        *((n, 16, k) for n in (2, 4, 8) for k in (1, 2, 3, 4)),
    ]
    tails = [(1, 64, 1), (1, 32, 1), (1, 16, 1), (1, 16, 2), (1, 8, 1), (1, 8, 2), (1, 4, 1), (1, 4, 2), (1, 2, 2)]
    return [
        *(DeltaDQ(n, m, k) for n, m, k in dropped),
        *(DeltaDQ(5, m, 2, share=1) for m in (128, 64)),
        *(DeltaDQ(n, 32, 2, share=1) for n in (3, 5, 7, 10, 14, 20, 30)),
        *(Residual(rank=rank, n=n, m=m, bits=k) for rank in (2, 4, 8, 16) for n, m, k in tails),
        *(Residual(rank, 4, n=5, m=64, bits=k, share=1) for rank in (2, 4, 8) for k in (1, 2)),
        *(
            Residual(rank, 4, n=n, m=32, bits=2, share=1)
            for rank, n in ((8, 3), (8, 5), (16, 5), (16, 9), (16, 16), (16, 25))
        ),
        *(Residual(rank, 3, n=5, m=64, bits=1, share=1) for rank in (16, 24, 32, 48)),
        BitDelta(),
        BitDelta("row"),
        *(RTN(k) for k in (1, 2, 3, 4, 6, 8)),
        *(RTN(k, scale_group=0) for k in (2, 3, 4)),
    ]


def target_bytes(ratio: float | None, size: int | None, finetuned_bytes: int) -> int | None:
    """Return the bytes that a file may have, or None without a target.

    Args:
        ratio: how many times smaller than the fine-tune the file must be, if given.
        size: bytes that the file may have, if given.
        finetuned_bytes: bytes of the fine-tune's weight files.

    Raises:
        UsageError: both are given, the ratio is not above 1, or the size is not above 0.
    """
    if ratio is not None and size is not None:
        raise UsageError(f"a target ratio of {ratio:g} and a target size of {size:,} bytes: one of them decides")
    if ratio is not None:
        if not 1 < ratio < math.inf:
            raise UsageError(f"target ratio {ratio:g} is not a number above 1")
        return int(finetuned_bytes / ratio)
    if size is not None and size < 1:
        raise UsageError(f"target size {size} is not a number of bytes above 0")
    return size


def target_metadata(target: int) -> str:
    """Return what the metadata of a file made for a target says of its method."""
    return f"target {target} bytes"


def plan_for_target(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    *,
    target_ratio: float | None = None,
    target_size: int | None = None,
    candidates: Sequence[Method] = (),
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    missing: str | None = None,
    variant: str | None = None,
    attach: Sequence[str] = (),
    no_attach: Sequence[str] = (),
    profile: str = "hot",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    hessians: Hessians | None = None,
) -> Choice:
    """Return what :func:`deltafmt.pack` would choose for a target; write nothing.

    For example, ``plan_for_target(base, finetuned, target_ratio=16).size`` is the size of the file that
    ``pack(base, finetuned, out, target_ratio=16)`` writes.

    Args:
        base, finetuned: a checkpoint folder or a ``.safetensors`` file.
        target_ratio, target_size, candidates, rules, include, exclude, missing, variant, attach, no_attach, profile,
            seed, threads: as ``pack`` takes them.
        progress: called with a tensor's name and bytes as each is measured.
        hessians: second moments of the matrices' inputs by name, to measure the losses with.

    Returns:
        The choice for every tensor, with predicted size and loss.

    Raises:
        UsageError: no target is given, or ``pack`` would refuse the arguments.
        NonFiniteError: a delta has NaN or infinity.
        InvalidFileError, WrongBaseError, StorageError: as ``pack`` raises them.
    """
    check_options(profile, seed)
    with open_pair(base, finetuned, variant, attach, no_attach) as (before, after):
        target = target_bytes(target_ratio, target_size, after.file_bytes)
        if target is None:
            raise UsageError("a plan needs a target ratio or a target size")
        ready = prepare(before, after, None, rules, include, exclude, missing)
        job = PackJob(before, after, ready.plans, profile, seed, target_metadata(target), ready.completeness)
        alternatives = Alternatives(job, candidates or default_candidates())
        alternatives.measure(thread_count(threads), progress, hessians)
        return alternatives.choose(target)
