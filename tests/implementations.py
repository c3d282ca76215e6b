"""The implementations of the hot loops, and how a test runs each: numpy, and every processor level that is here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from deltafmt import core

# The processor levels that kernels/cpu/ has loops for, the best last.
LEVELS = ("baseline", "x86-64-v3")


def _levels() -> tuple[str, ...]:
    """Return the levels that this processor has; the one in use stays in use."""
    if core.native is None:
        return ()
    before = core.native.level()
    found = tuple(level for level in LEVELS if core.native.use(level))
    core.native.use(before)
    assert before in found
    return found


# Those that are compiled: none where the extension is not built, or turned off with DELTAFMT_CORE=0.
COMPILED = _levels()
IMPLEMENTATIONS = ("numpy", *COMPILED)

needs_core = pytest.mark.skipif(
    core.native is None, reason="deltafmt._core is not built, or turned off with DELTAFMT_CORE=0"
)


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Run one of :data:`IMPLEMENTATIONS` for a while, in all threads."""
    if name == "numpy":
        with core.reference_only():
            yield
        return
    assert core.native is not None
    before = core.native.level()
    assert core.native.use(name)
    try:
        yield
    finally:
        core.native.use(before)
