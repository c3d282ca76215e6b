"""The optional compilers: numba for the hot loops on the CPU, Triton for the kernels on a GPU.

Without numba, or with ``DELTAFMT_NUMBA=0`` in the environment, the numpy reference runs instead and gives the same
bytes.
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
    """Tell whether numba's compiled loops can be used; nothing is imported to find out."""
    return os.environ.get("DELTAFMT_NUMBA", "1") != "0" and importlib.util.find_spec("numba") is not None


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton is installed for kernels on a GPU; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


def worthwhile(nbytes: int) -> bool:
    """Tell whether compiled loops pay: for fewer than 24 MiB of tensors, the reference is done before they load."""
    return nbytes >= WORTHWHILE_BYTES and available()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop on first use; it runs without the GIL, and its machine code is cached on disk if possible."""
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to cache in: neither beside the source nor in the user's cache
        return numba.njit(nogil=True)(function)
