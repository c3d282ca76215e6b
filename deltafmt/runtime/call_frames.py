"""Who calls: the frames of a thread, which of them are generators that pause, and whose ``with`` statement it is."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from types import CodeType, FrameType

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
# A generator that contextlib has made into a context manager is suspended while the body of its ``with`` runs.
_CONTEXT_MANAGERS = frozenset(
    kind.__dict__[method].__code__
    for kind, method in (
        (contextlib._GeneratorContextManager, "__enter__"),  # noqa: SLF001 - it has no public name
        (contextlib._AsyncGeneratorContextManager, "__aenter__"),  # noqa: SLF001
        (contextlib._BaseExitStack, "enter_context"),  # noqa: SLF001
    )
)

_COMPREHENSIONS = frozenset(("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"))

Mark = tuple[int, CodeType]


def frames_of(frame: FrameType | None) -> Iterable[FrameType]:
    """Yield a frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def mark_of(frame: FrameType) -> Mark:
    """Return what tells a frame from others without keeping its variables alive."""
    return id(frame), frame.f_code


def consumer_of(generator: FrameType) -> Mark | None:
    """Return the mark of the function that runs a generator, be it from within a comprehension."""
    frame = generator.f_back
    while frame is not None and frame.f_code.co_name in _COMPREHENSIONS:
        frame = frame.f_back
    return None if frame is None else mark_of(frame)


def is_stream(frame: FrameType) -> bool:
    """Tell whether a frame is a generator that pauses for its consumer, not one that is a context manager."""
    back = frame.f_back
    return bool(frame.f_code.co_flags & _GENERATORS) and not (back is not None and back.f_code in _CONTEXT_MANAGERS)


def owner_of(frame: FrameType) -> FrameType:
    """Return the frame whose ``with`` statement enters a block, behind context managers of contextlib."""
    found = frame
    while found.f_back is not None and (
        (found.f_code.co_flags & _GENERATORS and not is_stream(found)) or found.f_code in _CONTEXT_MANAGERS
    ):
        found = found.f_back
    return found
