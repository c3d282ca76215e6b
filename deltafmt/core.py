"""The choice between a compiled loop (``deltafmt._core``, C) and its numpy reference.

Both give the same bytes. A loop is declared beside its reference, which is its definition::

    def _double(native: Native, values: Floats) -> Floats:
        out = np.empty_like(values)
        native.double(values, out)
        return out

    @loop(_double)
    def double(values: Floats) -> Floats:
        \"\"\"Return the values, twice.\"\"\"
        return values + values

``double(x)`` then runs the compiled loop, or the reference where there is none: where the package was installed without
a compiler, or with ``DELTAFMT_CORE=0`` in the environment. ``double.reference(x)`` always runs the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

MISSING = (
    "the compiled loops are not installed, and numpy is several times slower; install deltafmt again where there is a "
    "C compiler, or set DELTAFMT_CORE=0 to use numpy without this line"
)

P = ParamSpec("P")
R = TypeVar("R")

# The module of compiled loops: its functions have no annotations.
Native = Any


def _turned_off() -> bool:
    return os.environ.get("DELTAFMT_CORE", "1") == "0"


def _load() -> Native | None:
    if _turned_off():
        return None
    try:
        return importlib.import_module("deltafmt._core")
    except ImportError:
        return None


native: Native | None = _load()


class Loop(Generic[P, R]):
    """A function that has a compiled loop; see :mod:`deltafmt.core`.

    Attributes:
        reference: the numpy reference, which the loop equals bit for bit.
    """

    def __init__(self, reference: Callable[P, R], compiled: Callable[Concatenate[Native, P], R]) -> None:
        self.reference = reference
        self._compiled = compiled
        functools.update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the compiled loop if there is one, otherwise the reference."""
        if native is None:
            return self.reference(*args, **kwargs)
        return self._compiled(native, *args, **kwargs)


def loop(compiled: Callable[Concatenate[Native, P], R]) -> Callable[[Callable[P, R]], Loop[P, R]]:
    """Give a reference its compiled loop, which takes the module of loops first and then the same arguments."""
    return lambda reference: Loop(reference, compiled)


def describe() -> str:
    """Return which loops run: ``compiled (x86-64-v3)``, ``compiled (baseline)`` or ``numpy``."""
    return "numpy" if native is None else f"compiled ({native.level()})"


def missing_line() -> str | None:
    """Return, the first time that it is called in a process, a line about missing loops; None where there are loops."""
    return next(_lines, None)


_lines = iter([MISSING] if native is None and not _turned_off() else [])


def warn_if_missing() -> None:
    """Warn that there are no compiled loops, unless that was said before."""
    line = missing_line()
    if line:
        warnings.warn(line, RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run references for a while, in all threads: what tests and the fuzzer compare with."""
    global native  # noqa: PLW0603 - the one switch
    before, native = native, None
    try:
        yield
    finally:
        native = before
