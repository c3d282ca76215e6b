"""Choosing a method for every tensor, so that a file of a given size loses little (docs/how-to/hit-a-size.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from deltafmt.errors import UsageError
from deltafmt.methods import RTN, BitDelta, DeltaDQ, Method, Residual
from deltafmt.pipeline.alternatives import Alternatives, Hessians
from deltafmt.pipeline.choice import Choice
from deltafmt.pipeline.pack_options import PackOptions
from deltafmt.pipeline.plan import Rule
from deltafmt.pipeline.target import target_bytes
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
    thin = [(3, 128, 1), (3, 128, 2), (5, 64, 1), (5, 64, 2), (5, 32, 1)]
    return [
        *(DeltaDQ(n, m, k) for n, m, k in dropped),
        *(DeltaDQ(n, m, 1, share=1) for n, m in ((3, 128), (5, 128), (5, 64), (5, 32), (8, 32), (11, 32), (21, 32))),
        *(DeltaDQ(n, m, 2, share=1) for n, m in ((3, 128), (5, 128), (5, 64))),
        *(DeltaDQ(n, 32, 2, share=1) for n in (3, 5, 7, 10, 14, 20, 30)),
        *(Residual(rank=rank, n=n, m=m, bits=k) for rank in (4, 16) for n, m, k in tails),
        *(Residual(rank, 4, n=n, m=m, bits=k, share=1) for rank in (1, 2, 4, 8) for n, m, k in thin),
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
    quantized: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    allow_architecture: bool = False,
    base_name: str | None = None,
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
        target_ratio, target_size, candidates, rules, include, exclude, missing, variant, attach, no_attach, quantized,
            rename, strip_prefix, allow_architecture, base_name, profile, seed, threads: as ``pack`` takes them.
        progress: called with a tensor's name and bytes as each is measured.
        hessians: second moments of the matrices' inputs by name, to measure the losses with.

    Returns:
        The choice for every tensor, with predicted size and loss.

    Raises:
        UsageError: no target is given, or ``pack`` would refuse the arguments.
        NonFiniteError: a delta has NaN or infinity.
        InvalidFileError, WrongBaseError, StorageError: as ``pack`` raises them.
    """
    options = PackOptions.read(
        method=None,
        rules=rules,
        include=include,
        exclude=exclude,
        missing=missing,
        variant=variant,
        attach=attach,
        no_attach=no_attach,
        quantized=quantized,
        rename=rename,
        strip_prefix=strip_prefix,
        allow_architecture=allow_architecture,
        base_name=base_name,
        profile=profile,
        seed=seed,
        exact=False,
    )
    with options.open(base, finetuned) as (before, after):
        target = target_bytes(target_ratio, target_size, after.file_bytes)
        if target is None:
            raise UsageError("a plan needs a target ratio or a target size")
        alternatives = Alternatives(options.job(before, after, target), candidates or default_candidates())
        alternatives.measure(thread_count(threads), progress, hessians)
        return alternatives.choose(target)
