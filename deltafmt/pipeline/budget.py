"""Choosing a method for every tensor, so that a file of a given size loses little (docs/how-to/hit-a-size.md)."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from deltafmt.errors import UsageError
from deltafmt.methods import RTN, BitDelta, DeltaDQ, Method, Residual
from deltafmt.pipeline.alternatives import Alternatives, Hessians
from deltafmt.pipeline.choice import Choice
from deltafmt.pipeline.pack_options import PackOptions
from deltafmt.pipeline.plan import Plan, Rule
from deltafmt.pipeline.target import target_bytes
from deltafmt.pipeline.workers import Progress, thread_count

# The columns of matrices, as many of them as candidates are made for.
WIDTHS = 3
# The least and the most that thin dropout keeps, and the most behind a head; and how words of a row grow.
LEAST_KEPT, MOST_KEPT, MOST_BEHIND = 1 / 64, 1 / 5, 1 / 8
MORE_WORDS = 1.4


def default_candidates(columns: Iterable[int] = (1024,)) -> list[Method]:
    """Return the methods that are tried on every tensor unless candidates are given.

    Args:
        columns: of the matrices. Thin dropout keeps as many entries as fill the words of a row of so many.
    """
    thin = list(dict.fromkeys(group for width in columns for group in filling(width)))
    behind = [(n, m, k) for n, m, k in thin if n <= MOST_BEHIND * m]
    candidates: list[Method] = [
        *(DeltaDQ(n, m, k, share=1) for n, m, k in thin),
        *(DeltaDQ(n, 32, 1, share=1) for n in (8, 11, 16, 21)),
        *(DeltaDQ(n, 32, 2, share=1) for n in (7, 10, 14, 20, 30)),
        *(DeltaDQ(n, 16, k) for n, k in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4), (8, 3), (8, 4))),
        *(Residual(rank, 4, n=n, m=m, bits=k, share=1) for rank in (1, 2, 4, 8) for n, m, k in behind),
        *(Residual(rank, 4, n=n, m=32, bits=1, share=1) for rank in (4, 8, 16) for n in (5, 8, 16)),
        *(Residual(rank, 4, n=n, m=32, bits=2, share=1) for rank, n in ((8, 3), (8, 5), (8, 9))),
        *(Residual(16, 4, n=n, m=32, bits=2, share=1) for n in (3, 5, 9, 16, 25)),
        *(Residual(32, 3, n=n, m=m, bits=k, share=1) for n, m, k in ((5, 64, 1), (5, 32, 1), (5, 32, 2))),
        BitDelta(),
        BitDelta("row"),
        *(RTN(k) for k in (1, 2, 3, 4, 6, 8)),
        *(RTN(k, scale_group=0) for k in (2, 3, 4)),
    ]
    return list(dict.fromkeys(candidates))


def filling(width: int) -> Iterator[tuple[int, int, int]]:
    """Iterate over N, M and k of thin dropout that fills whole words of a row.

    A row's codes take whole words of 32 bits, so what does not fill them is lost: of 576 columns, 5:64 at one bit has
    45 bits and 7:64 has 63, and both take two words.
    """
    for bits in (1, 2):
        words = max(math.ceil(LEAST_KEPT * width * bits / 32), 1)
        while 32 * words <= MOST_KEPT * width * bits:
            room = 32 * words // bits
            n, m = max(((room // -(-width // m), m) for m in (32, 64, 128)), key=lambda group: group[0] / group[1])
            if n:
                yield n, m, bits
            words = max(words + 1, round(MORE_WORDS * words))


def candidates_for(plans: Sequence[Plan]) -> list[Method]:
    """Return the methods that are tried on every tensor of a pair unless candidates are given."""
    elements: Counter[int] = Counter()
    for plan in plans:
        if plan.undecided:
            elements[plan.tensor.columns] += plan.shared_rows * plan.tensor.columns
    return default_candidates(sorted(width for width, _ in elements.most_common(WIDTHS)))


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
        job = options.job(before, after, target)
        alternatives = Alternatives(job, candidates or candidates_for(job.plans))
        alternatives.measure(thread_count(threads), progress, hessians)
        return alternatives.choose(target)
