"""What a base would save: the size of a fine-tune's exact delta, estimated from windows of its tensors.

The tensors are planned as ``pack --method exact`` plans them. Those that are equal to the base's take nothing. In the
others, windows at regular distances are coded with the base and without it. Each window's share of its own bytes is a
sample of the whole: the mean gives the estimate, the spread its error (as for a simple random sample, with the finite
population correction; Cochran, "Sampling Techniques", chapters 2 and 8).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.exact.coding import CHUNK_UNITS
from deltafmt.exact.units import unit_count, unit_of
from deltafmt.pipeline.exact_tensors import chunk_spans, pack_chunk
from deltafmt.pipeline.plan import Plan

# Units of a window. Shorter ones overstate the size: with these it is 0.1 to 0.8% above that with whole chunks.
WINDOW: Final = 1 << 16

# What the file has for each tensor beside its bytes, and for itself: an entry, a table, alignment.
ENTRY_BYTES: Final = 300
FILE_BYTES: Final = 16 * 1024

# A window is near the base if the base takes off so much of what it takes without.
NEAR: Final = 0.1

# A base helps a fine-tune if it takes off so much of the fine-tune's bytes.
HELPS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Saving:
    """What a base would save of one fine-tune.

    Attributes:
        whole: bytes of the fine-tune's weight files.
        same: bytes of its tensors that are equal to the base's, and of tied copies.
        new: bytes of its tensors for which the base has none.
        near: bytes of its other tensors that the base makes clearly smaller; an estimate.
        size: bytes of its exact delta file without small files; an estimate.
        error: two standard errors of ``size``; 0 if every byte was coded.
        alone: bytes that the same coding would take without a base; an estimate.
        windows: number of windows that were coded.
    """

    whole: int
    same: int
    new: int
    near: int
    size: int
    error: int
    alone: int
    windows: int

    @property
    def saved(self) -> int:
        """Bytes saved."""
        return self.whole - self.size

    @property
    def helps(self) -> bool:
        """True if the base, and not the coding alone, saves a good part, by more than the error."""
        return self.alone - self.size > max(HELPS * self.whole, self.error)


@dataclass(frozen=True, slots=True)
class _Window:
    """Some units of a tensor."""

    tensor: Tensor
    base: Tensor | None
    first: int
    end: int

    @property
    def nbytes(self) -> int:
        return (self.end - self.first) * unit_of(self.tensor.dtype).width

    def coded(self) -> tuple[int, int]:
        """Return the bytes that the window takes with its base, and without."""
        alone = len(pack_chunk(self.tensor, None, self.first, self.end, "default").data)
        if self.base is None:
            return alone, alone
        return len(pack_chunk(self.tensor, self.base, self.first, self.end, "default").data), alone


def estimate(plans: Sequence[Plan], same: frozenset[str], whole: int, windows: int, pool: ThreadPoolExecutor) -> Saving:
    """Estimate the exact delta of a fine-tune.

    Args:
        plans: how its tensors would be packed.
        same: names of those that are equal to their base.
        whole: bytes of its weight files.
        windows: number of windows; all bytes are coded if that takes no more than four times as long.
        pool: worker threads.
    """
    equal = sum(plan.tensor.nbytes for plan in plans if plan.alias is not None or plan.tensor.name in same)
    left = [plan for plan in plans if plan.alias is None and plan.tensor.name not in same and plan.tensor.nbytes]
    total = sum(plan.tensor.nbytes for plan in left)
    new = sum(plan.tensor.nbytes for plan in left if plan.base is None)
    units = sum(unit_count(plan.tensor.dtype, plan.tensor.shape) for plan in left)
    complete = units <= 4 * windows * WINDOW
    chosen = _all(left) if complete else _spread(left, total, windows)
    coded = list(pool.map(_Window.coded, chosen))
    overhead = FILE_BYTES + ENTRY_BYTES * len(plans)
    if not chosen:
        return Saving(whole, equal, new, 0, overhead, 0, whole + overhead, 0)
    sizes = np.array([window.nbytes for window in chosen], np.float64)
    given, alone = (np.array(column, np.float64) for column in zip(*coded, strict=True))
    is_near = given < (1 - NEAR) * alone
    if complete:
        size, without, error = given.sum(), alone.sum(), 0.0
        near = sizes[is_near].sum()
    else:
        shares, free = given / sizes, max(0.0, 1 - sizes.sum() / total)
        size, without = total * shares.mean(), total * (alone / sizes).mean()
        error = 2 * total * shares.std(ddof=1) / math.sqrt(len(chosen)) * math.sqrt(free)
        near = total * is_near.mean()
    # What is equal would take about as much without a base as the rest does.
    without += equal * without / total
    return Saving(
        whole,
        equal,
        new,
        round(near),
        round(size + overhead),
        round(error),
        round(without + overhead),
        len(chosen),
    )


def _all(plans: Sequence[Plan]) -> list[_Window]:
    """Return every chunk."""
    return [
        _Window(plan.tensor, plan.base, first, end)
        for plan in plans
        for first, end in chunk_spans(plan.tensor.dtype, plan.tensor.shape, CHUNK_UNITS)
    ]


def _spread(plans: Sequence[Plan], total: int, windows: int) -> list[_Window]:
    """Return windows at regular distances in the bytes of all tensors, one behind the other."""
    ends = list(itertools.accumulate(plan.tensor.nbytes for plan in plans))
    found = []
    for number in range(windows):
        position = (2 * number + 1) * total // (2 * windows)
        index = bisect.bisect_right(ends, position)
        tensor = plans[index].tensor
        count = unit_count(tensor.dtype, tensor.shape)
        offset = position - (ends[index] - tensor.nbytes)
        first = max(0, min(offset // unit_of(tensor.dtype).width, count - WINDOW))
        found.append(_Window(tensor, plans[index].base, first, min(first + WINDOW, count)))
    return found
