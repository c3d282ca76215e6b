"""Worker threads whose results come back in order, with a bound on the memory of those that wait."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deltafmt.errors import UsageError
from deltafmt.linear_algebra import one_thread

Item = TypeVar("Item")
Work = TypeVar("Work")

# Called with a tensor's name and bytes as each tensor is done.
Progress = Callable[[str, int], None]

# Bytes of fine-tuned tensors whose results may wait while an earlier one is in use.
IN_FLIGHT_BYTES = 64 * 1024 * 1024


def thread_count(threads: int | None) -> int:
    """Return the number of worker threads: the given one, or one for each processor that this process may use.

    Raises:
        UsageError: the given number is below 1.
    """
    if threads is not None:
        if threads < 1:
            raise UsageError(f"{threads} threads are fewer than one")
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    items: Iterable[Item], submit: Callable[[Item], Work], size: Callable[[Item], int]
) -> Iterator[tuple[Item, Work]]:
    """Submit items to worker threads ahead of their use, and give them in order with what ``submit`` returned.

    Args:
        items: what is worked on.
        submit: starts the work on an item, and returns a handle to its result.
        size: bytes that an item counts for while its result waits; at most IN_FLIGHT_BYTES wait beside the one in use.
    """
    waiting: deque[tuple[Item, Work]] = deque()
    held = 0
    for item in items:
        # One item is always submitted ahead, so that its first bytes are read while the one before it is in use.
        while len(waiting) > 1 and held + size(item) > IN_FLIGHT_BYTES:
            first = waiting.popleft()
            yield first
            held -= size(first[0])
        waiting.append((item, submit(item)))
        held += size(item)
    yield from waiting


@contextlib.contextmanager
def worker_pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Give so many worker threads. At the end, work that has not begun is cancelled, and the rest waited for.

    As long as there are workers, numpy's linear algebra has one thread for each of them.
    """
    with one_thread():
        pool = ThreadPoolExecutor(threads, thread_name_prefix=f"deltafmt-{name}")
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
