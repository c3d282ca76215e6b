"""Blocks that follow the threads and the work that are started inside them.

A new thread starts with an empty context, so the recipe for streaming, ``Thread(target=model.generate)`` inside a
block, would serve the base. From the first attached delta on, ``Thread.start`` and the methods that submit work to the
standard library's thread pools note the blocks that hold for their caller. Without blocks they do what they did before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

from deltafmt.runtime.scope import Block, chain, scopes, work

_lock = threading.Lock()
_installed = False


def install() -> None:
    """Let blocks follow threads from now on; a second call does nothing."""
    global _installed  # noqa: PLW0603 - once a process
    with _lock:
        if _installed:
            return
        _installed = True
    threading.Thread.start = _start_of(threading.Thread.start)  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = _submit_of(ThreadPoolExecutor.submit)  # type: ignore[method-assign]
    for name in ("apply_async", "_map_async", "imap", "imap_unordered"):
        setattr(ThreadPool, name, _submit_of(getattr(ThreadPool, name)))


def blocks_here() -> tuple[Block, ...]:
    """Return the blocks that hold for the caller, of all models."""
    found = []
    for scope in list(scopes):
        call = scope.call
        block = call.block if call.bound else scope.here(strict=False)
        if block is not None:
            found.append(block)
    return tuple(found)


def _start_of(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        if blocks := blocks_here():
            self.run = functools.partial(_run, self, self.run, blocks)  # type: ignore[method-assign]
        original(self)

    return start


def _run(thread: threading.Thread, run: Callable[[], None], blocks: tuple[Block, ...]) -> None:
    """Run a thread in a context that has its blocks; jobs that it runs in contexts of their own do not see them."""
    thread.__dict__.pop("run", None)
    chain.set(tuple((block, True) for block in blocks))
    run()


def _submit_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of a pool whose first argument is a function. Its threads serve the work of all who submit some."""

    @functools.wraps(original)
    def submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return original(self, functools.partial(_work, fn, blocks_here()), *args, **kwargs)

    return submit


def _work(fn: Callable[..., Any], blocks: tuple[Block, ...], /, *args: Any, **kwargs: Any) -> Any:
    before, (work.shared, work.adopted) = (work.shared, work.adopted), (True, blocks)
    try:
        return fn(*args, **kwargs)
    finally:
        work.shared, work.adopted = before
