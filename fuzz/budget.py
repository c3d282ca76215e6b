"""What one input may cost a harness: processor time and memory, both asserted."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

# Of one input of at most 32 KiB; a harness runs several readers over it, and counts its branches while it does.
SECONDS = 2.0
MEMORY = 256 * 10**6


@contextlib.contextmanager
def bounded_time(seconds: float = SECONDS) -> Iterator[None]:
    """Fail if the work takes more time of the processor."""
    start = time.process_time()
    yield
    taken = time.process_time() - start
    if taken > seconds:
        raise AssertionError(f"an input took {taken:.1f} s of the processor, over {seconds} s")


def limit_memory(spare: int = MEMORY) -> None:
    """Limit this process's memory to its present size and ``spare`` bytes more; an allocation over it fails."""
    with contextlib.suppress(OSError):  # where there is no /proc, libFuzzer's own limit must do
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
