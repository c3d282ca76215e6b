"""The threads of the linear algebra library behind numpy, where a pool of workers calls it.

Threads of OpenBLAS wait for one another in busy loops. Beside workers for every processor, low-rank methods then take
up to twenty times as long (docs/decisions.md, 27). numpy's wheels bring OpenBLAS along, in a folder beside numpy. A
numpy that was built with another library is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# Where wheels keep their libraries (Linux and Windows, macOS), and what OpenBLAS's functions are called in them.
FOLDERS = ("../numpy.libs", ".dylibs")
NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads64_")

_lock = threading.Lock()
_users = 0
_before = 0


@functools.cache
def _library() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Return OpenBLAS's functions that give and set its number of threads, or None."""
    home = Path(np.__file__).parent
    for path in sorted(file for folder in FOLDERS for file in (home / folder).glob("*openblas*")):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(path))
            for name in NAMES:
                with contextlib.suppress(AttributeError):
                    return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None


def threads() -> int | None:
    """Return the number of threads of numpy's OpenBLAS, or None if numpy brings none."""
    library = _library()
    return None if library is None else library[0]()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Give numpy's OpenBLAS one thread for a while, in the whole process.

    The first of several that overlap sets it, and the last puts back what the first has found.
    """
    global _users, _before  # noqa: PLW0603 - the library's setting is the process's as well
    library = _library()
    if library is None:
        yield
        return
    get, put = library
    with _lock:
        _users += 1
        if _users == 1:
            _before = get()
            put(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                put(_before)
