"""Which optional compilers are used: numba for the CPU's hot loops, Triton for a GPU's kernels.

Without numba, or with ``DELTAFMT_NUMBA=0`` in the environment, the numpy reference runs instead; the bytes are the
same.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

WORTHWHILE_BYTES = 24 * 1024 * 1024


@functools.cache
def available() -> bool:
    """Tell whether compiled loops can be used; imports nothing."""
    return os.environ.get("DELTAFMT_NUMBA", "1") != "0" and importlib.util.find_spec("numba") is not None


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton's kernels can be used on a GPU; imports nothing."""
    return importlib.util.find_spec("triton") is not None


def worthwhile(nbytes: int) -> bool:
    """Tell whether that many bytes of tensors take the reference longer than loading the compiled loops takes."""
    return nbytes >= WORTHWHILE_BYTES and available()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop on first use, without the GIL, and cache the machine code on disk where that is possible."""
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to cache in: neither beside the source nor in the user's cache
        return numba.njit(nogil=True)(function)
