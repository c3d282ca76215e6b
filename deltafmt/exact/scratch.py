"""Memory that a thread uses again for each chunk: the system clears whatever is asked for anew."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from deltafmt.exact.differences import Planes, new_planes

# Larger memory is not kept. Chunks that are packed here have 2**20 units.
_KEPT = 16 << 20

_local = threading.local()


def scratch(name: str, size: int) -> NDArray[np.uint8]:
    """Return memory of at least so many bytes, whose contents are anything: the same at each call of a thread.

    Args:
        name: what it is for; nothing else uses it.
        size: bytes.
    """
    held: NDArray[np.uint8] | None = getattr(_local, name, None)
    if held is None or held.size < size:
        held = np.empty(size, np.uint8)
        if size <= _KEPT:
            setattr(_local, name, held)
    return held


def scratch_planes(width: int, count: int) -> Planes:
    """Return planes as :func:`deltafmt.exact.differences.new_planes` does, in memory that is used again."""
    held: Planes | None = getattr(_local, "planes", None)
    if held is None or held.shape != (width, count):
        held = new_planes(width, count)
        if width * count <= _KEPT:
            _local.planes = held
    return held
