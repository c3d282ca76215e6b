"""What a sample of a chunk tells of it: which form is small, and which planes are random.

Compiled: ``kernels/cpu/loops/samples.c``, and the counting of ``huffman.c``.
"""

from __future__ import annotations

from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.core import Native, loop
from deltafmt.exact.differences import planes_of, sorted_planes
from deltafmt.exact.units import Unit, Units

# Units that are looked at, in so many runs.
SAMPLE: Final = 8192
_RUNS: Final = 64

# Products of counts in a sample and their logarithms to base 2, of which 16 bits lie behind the point: sums of integers
# are the same in any order.
_COUNTS: Final = np.arange(SAMPLE + 1)
_LOGS: Final = np.rint(_COUNTS * np.log2(np.maximum(_COUNTS, 1)) * 65536).astype(np.uint64)

Sampled = TypeVar("Sampled", bound=np.generic)


def sampled(whole: NDArray[Sampled]) -> NDArray[Sampled]:
    """Return some runs of an array that lie equally far apart; all of a short array."""
    if whole.size <= SAMPLE:
        return np.ascontiguousarray(whole)
    step = whole.size // _RUNS
    return whole[: _RUNS * step].reshape(_RUNS, step)[:, : SAMPLE // _RUNS].reshape(-1)


def _unrelated(native: Native, values: Units, prediction: Units, unit: Unit) -> bool:
    found: bool = native.exact_unrelated(values, prediction, unit.is_float, _LOGS)
    return found


@loop(_unrelated)
def is_unrelated(values: Units, prediction: Units, unit: Unit) -> bool:
    """Tell whether the planes of a sample of units have less entropy than those of their differences."""
    planes, _ = sorted_planes(values, prediction, unit, Unit(unit.width))
    alone, differences = (sum(map(_order, found)) for found in (planes_of(values, unit), planes))
    return alone > differences


def _order(plane: NDArray[np.uint8]) -> int:
    """Return the bits by which the entropy of all bytes of a sample's plane is less than if none came twice."""
    return int(_LOGS[byte_counts(plane)].sum())


def _byte_counts(native: Native, data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    counts = np.empty(256, np.uint32)
    native.count_bytes(data, counts)
    return counts


@loop(_byte_counts)
def byte_counts(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return how often each of the 256 values occurs among some bytes."""
    return np.bincount(data, minlength=256).astype(np.uint32)


def bits(plane: NDArray[np.uint8]) -> float:
    """Return the entropy of some bytes, in bits a byte."""
    return entropy(byte_counts(plane))


def entropy(counts: NDArray[np.unsignedinteger]) -> float:
    """Return the entropy of what occurs so often, in bits."""
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
