"""A thread pool whose jobs come back in order, with a bound on how much is in flight."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from deltafmt.errors import UsageError

Item = TypeVar("Item")
Job = TypeVar("Job")

# Called with a tensor's name and bytes as each is done.
Progress = Callable[[str, int], None]

# Bytes of fine-tuned tensors whose results may wait for their turn.
IN_FLIGHT_BYTES = 64 * 1024 * 1024


def thread_count(threads: int | None) -> int:
    """Return the number of worker threads: as asked for, or one for each processor this process may use.

    Raises:
        UsageError: fewer than one thread was asked for.
    """
    if threads is not None:
        if threads < 1:
            raise UsageError(f"{threads} threads are fewer than one")
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    items: Iterable[Item], submit: Callable[[Item], Job], size: Callable[[Item], int]
) -> Iterator[tuple[Item, Job]]:
    """Submit items ahead of their use, at most IN_FLIGHT_BYTES beyond the one in use, and give them in order."""
    waiting: deque[tuple[Item, Job]] = deque()
    held = 0
    for item in items:
        # One item is always ahead of the one in use, so that its first bytes are being read meanwhile.
        while len(waiting) > 1 and held + size(item) > IN_FLIGHT_BYTES:
            first = waiting.popleft()
            yield first
            held -= size(first[0])
        waiting.append((item, submit(item)))
        held += size(item)
    yield from waiting


class PerThread(Generic[Item]):
    """One object for each thread that asks, made when it first does."""

    def __init__(self, make: Callable[[], Item]) -> None:
        self._make = make
        self._local = threading.local()

    def get(self) -> Item:
        """Return this thread's object."""
        found: Item | None = getattr(self._local, "item", None)
        if found is None:
            found = self._local.item = self._make()
        return found


def drain(pool: ThreadPoolExecutor) -> None:
    """Stop a pool: drop what has not begun, wait for what has."""
    pool.shutdown(wait=True, cancel_futures=True)
