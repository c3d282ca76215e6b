"""The block that a call of a model belongs to: where ``with model.delta(...)`` holds, and where it must be refused.

A block holds for the code inside it, and for nobody else:

- A context variable carries it to functions, coroutines and the tasks that are started inside the block.
- A block inside a generator holds while the generator runs. Its consumer runs between two steps and is outside,
  although the context variable shows it the block. The frames of the call stack tell the two apart.
- A thread that is started inside the block, and work that is submitted to an executor there, belong to the block
  (:mod:`deltafmt.runtime.following`).
- A call outside of all blocks serves the base if nobody else has a block open. Otherwise it may be meant for the block
  of another thread, task or generator, and it is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any, Protocol, Self

import torch

from deltafmt.errors import UsageError
from deltafmt.runtime.call_frames import Mark, consumer_of, frames_of, is_stream, mark_of, owner_of
from deltafmt.runtime.outside_reads import InCall, Opened, Watched
from deltafmt.runtime.selection import Selection


class Hold(Protocol):
    """Deltas that stay on the device until they are released.

    Attributes:
        keys: what is held, row by row; equal for two holds of the same deltas.
        text: the names as a message gives them.
        serves: True if a row has a delta; False if all rows are the base's.
    """

    keys: object
    text: str
    serves: bool

    def selection(self) -> Selection:
        """Return a new selection of these deltas."""

    def again(self) -> Hold:
        """Return a second hold of the same deltas, which are released when both are; it never waits."""

    def release(self) -> None:
        """Release the deltas."""


class Block:
    """A ``with model.delta(...)`` block, or a single call with ``delta=``.

    Args:
        scope: the blocks of the model.
        hold: a function that brings the deltas to the device.
    """

    _entered = True  # of an object that was made without __init__, as torch.compile does

    def __init__(self, scope: Scope, hold: Callable[[], Hold]) -> None:
        self.scope = scope
        self.generator: FrameType | None = None
        self.driver: Mark | None = None
        self._make_hold = hold
        self._hold: Hold | None = None
        self._thread = 0
        self._entered = False
        self._selections: dict[int, Selection] = {}
        self._opened: Opened | None = None

    @property
    def switches_gradients(self) -> bool:
        """True if gradients are off inside the block."""
        return self._opened is not None

    @property
    def hold(self) -> Hold:
        """The deltas of an open block.

        Raises:
            UsageError: the block has ended.
        """
        if self._hold is None:
            raise UsageError(
                "the block of deltas that this thread or task was started in has ended; keep the block open until the "
                "thread has ended, or name the delta in the call: model(..., delta=...)"
            )
        return self._hold

    def open(self) -> None:
        """Bring the deltas to the device, for the calls that are bound to this block."""
        if self._entered:
            raise UsageError("a block of deltas is entered once; ask model.delta for another")
        self._entered = True
        hold = self._make_hold()
        self._thread = threading.get_ident()
        with self.scope.lock:
            self._hold = hold

    def close(self) -> None:
        """Release the deltas, when the calls that are under way in other threads have ended."""
        with self.scope.lock:
            hold, self._hold = self.hold, None
            self._selections.clear()
        hold.release()

    def __enter__(self) -> None:
        """Open the block for the code that follows."""
        self.open()
        frame = sys._getframe(1)  # noqa: SLF001 - the way to know whose block this is
        entering = owner_of(frame)
        self.generator = next((one for one in frames_of(entering) if is_stream(one)), None)
        if self.generator is not None:
            self.driver = consumer_of(self.generator)
        elif not entering.f_code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE):
            # A coroutine or a generator may pause here, and whoever runs then would find gradients switched off.
            self._opened = Opened(self.scope.watched)
        chain.set((*chain.get(), (self, False)))
        self.scope.opened(self)

    def __exit__(self, *details: object) -> None:
        """Close the block.

        Raises:
            UsageError: it is not open.
        """
        if self._hold is None:
            raise UsageError("a block of deltas is left once, after it was entered; ask model.delta for another")
        self.scope.closed(self)
        chain.set(tuple(link for link in chain.get() if link[0] is not self))
        self.generator = None
        if self._opened is not None:
            self._opened.close()
        self.close()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Serve the deltas in every call of a function; ``@model.delta("math")``."""
        self._entered = True

        def inner(*args: Any, **kwargs: Any) -> Any:
            with Block(self.scope, self._make_hold):
                return function(*args, **kwargs)

        return inner

    def __del__(self) -> None:
        """Warn of a block that was never entered: its deltas were not served."""
        if not self._entered:
            warnings.warn(
                "model.delta(...) was not entered, and serves nothing; write: with model.delta(...):",
                RuntimeWarning,
                stacklevel=2,
            )

    def begin(self) -> tuple[Selection, Hold | None]:
        """Return the selection of a call in this thread, and a hold of its own if the block may end before the call.

        Raises:
            UsageError: the block has ended.
        """
        me = threading.get_ident()
        selection = self._selections.get(me)
        if selection is None:
            made = self.hold.selection()
            with self.scope.lock:
                self._selections[me] = selection = made
        with self.scope.lock:
            hold = self.hold
            return selection, None if me == self._thread and self.generator is None else hold.again()

    def selection(self) -> Selection:
        """Return the selection of this thread."""
        return self._selections.get(threading.get_ident()) or self.begin_alone()

    def begin_alone(self) -> Selection:
        """Return the selection for a module that is called by itself, without its model."""
        selection, extra = self.begin()
        if extra is not None:
            extra.release()
        return selection

    def forget_selections(self) -> None:
        """Let the next call make a new selection; for slots whose contents were made anew."""
        self._selections.clear()


Link = tuple[Block, bool]

# The open blocks of this context, the innermost last, and whether the context was made for the block (a thread).
chain: ContextVar[tuple[Link, ...]] = ContextVar("deltafmt_blocks", default=())

scopes: weakref.WeakSet[Scope] = weakref.WeakSet()


class Thread(threading.local):
    """What one thread is doing.

    Attributes:
        shared: True while the thread runs work that was submitted to it: then its own beginning says nothing.
        adopted: the blocks in which that work was submitted.
    """

    shared = False
    adopted: tuple[Block, ...] = ()


work = Thread()


class Call(threading.local):
    """The call of a model that a thread is in.

    Attributes:
        bound: True within a call.
        selection: the call's selection; None for the base.
        block: the call's block; None for the base.
    """

    bound = False
    selection: Selection | None = None
    block: Block | None = None


class Scope:
    """The blocks of one model.

    Attributes:
        lock: guards what blocks hold.
        call: the call of the model that this thread is in.
        epoch: the number of times that the contents of slots were made anew.
        watched: what tells which weights the deltas change.
    """

    watched: Watched

    def __init__(self) -> None:
        self.epoch = 0
        self._calling: dict[int, int] = {}
        self.lock = threading.RLock()
        self._turn = threading.Condition(self.lock)
        self._quiet: int | None = None
        self.call = Call()
        self._open: dict[Block, None] = {}
        self._streams: dict[FrameType, list[Block]] = {}
        scopes.add(self)

    def active(self) -> Selection | None:
        """Return the selection that a module serves, called in this thread now; None for the base.

        Raises:
            UsageError: it cannot be told, or the block has ended.
        """
        call = self.call
        if call.bound:
            return call.selection
        if not self._open and not chain.get() and not work.adopted:
            return None
        block = self.here()
        return None if block is None else block.selection()

    def here(self, *, strict: bool = True) -> Block | None:
        """Return the block that holds for the caller; None outside of all blocks.

        Args:
            strict: refuse a caller outside of all blocks while a block that it may be meant for is open elsewhere.
        """
        links, adopted = chain.get(), work.adopted
        if not (self._open or links or adopted):
            return None
        frames = list(frames_of(sys._getframe(1))) if self._streams else []  # noqa: SLF001
        for frame in frames:
            if found := self._streams.get(frame):
                found[-1].driver = consumer_of(frame)
                return found[-1]
        for block, follows in reversed(links):
            if block.scope is self and (not work.shared if follows else block.generator is None or block in adopted):
                return block
        for block in reversed(adopted):
            if block.scope is self:
                return block
        if strict:
            self._refuse_others(frames)
        return None

    def touches(self, slots: set[int]) -> bool:
        """Tell whether the caller's block serves a delta of one of these slots."""
        block = self.here(strict=False)
        return block is not None and not slots.isdisjoint(block.selection().touched)

    def begin_call(self) -> None:
        """Count a call of the model that this thread begins, once no other thread is within :meth:`quiet`."""
        me = threading.get_ident()
        with self.lock:
            if self._quiet is not None and me not in self._calling:
                self._turn.wait_for(lambda: self._quiet in (None, me))
            self._calling[me] = self._calling.get(me, 0) + 1

    def end_call(self) -> None:
        """Count a call less."""
        me = threading.get_ident()
        with self.lock:
            self._calling[me] -= 1
            if not self._calling[me]:
                del self._calling[me]
                if self._quiet is not None:
                    self._turn.notify_all()

    @contextlib.contextmanager
    def quiet(self, seconds: float) -> Iterator[bool]:
        """Hold back the calls that other threads begin, and wait for those that are under way.

        Args:
            seconds: wait no longer.

        Yields:
            Whether no other thread is in a call of the model now.
        """
        me = threading.get_ident()
        end = time.monotonic() + seconds
        with self.lock:
            mine = self._quiet == me
            free = mine or self._turn.wait_for(lambda: self._quiet is None, seconds)
            if free and not mine:
                self._quiet = me
            alone = free and self._turn.wait_for(self.alone, max(end - time.monotonic(), 0))
        try:
            yield alone
        finally:
            if free and not mine:
                with self.lock:
                    self._quiet = None
                    self._turn.notify_all()

    def alone(self) -> bool:
        """Tell whether no other thread is in a call of the model."""
        with self.lock:
            return not self._calling.keys() - {threading.get_ident()}

    def opened(self, block: Block) -> None:
        """Note a block that was entered."""
        with self.lock:
            self._open[block] = None
            if block.generator is not None:
                self._streams.setdefault(block.generator, []).append(block)

    def closed(self, block: Block) -> None:
        """Forget a block that is left."""
        with self.lock:
            self._open.pop(block, None)
            if block.generator is not None:
                found = self._streams[block.generator]
                found.remove(block)
                if not found:
                    del self._streams[block.generator]

    def open_blocks(self) -> list[Block]:
        """Return the blocks that are open now."""
        with self.lock:
            return list(self._open)

    def forget_selections(self) -> None:
        """Let all calls make new selections, because the contents of slots were made anew."""
        self.epoch += 1
        for block in self.open_blocks():
            block.forget_selections()

    def _refuse_others(self, frames: list[FrameType]) -> None:
        marks = {mark_of(frame) for frame in frames}
        for block in self.open_blocks():
            hold = block._hold  # noqa: SLF001 - it may end at any time
            if hold is None or not hold.serves or (block.generator is not None and block.driver in marks):
                continue
            who = "another thread or task" if block.generator is None else "a paused generator"
            raise UsageError(
                f"the model is called outside of any block while {who} serves {hold.text}; name the delta in the call: "
                "model(..., delta=...), or delta=None for the base"
            )


class Bound:
    """A context manager: one call of a model, bound to a block, to a selection or to the base.

    Args:
        scope: the blocks of the model.
        block: the block that the call belongs to, if there is one.
        selection: what the call serves without a block; None for the base.
        gradients: leave gradients as they are without a block; otherwise they are off.
    """

    __slots__ = ("_before", "_block", "_call", "_extra", "_gradients", "_in_call", "_keeps", "_scope", "selection")

    def __init__(
        self, scope: Scope, block: Block | None, selection: Selection | None = None, *, gradients: bool = True
    ) -> None:
        self._scope = scope
        self._call = scope.call
        self._block = block
        self._keeps = gradients
        self._extra: Hold | None = None
        self._gradients: contextlib.AbstractContextManager[None] | None = None
        self._before = (False, None, None)
        self._in_call = InCall()
        self.selection = selection

    def __enter__(self) -> Self:
        """Bind the call."""
        call, block, keeps = self._call, self._block, self._keeps
        if block is not None:
            self.selection, self._extra = block.begin()
            keeps = block.switches_gradients and self._extra is None
        if not keeps:
            self._gradients = torch.no_grad()
            self._gradients.__enter__()
        self._in_call.__enter__()
        self._before = call.bound, call.selection, call.block  # type: ignore[assignment]
        call.bound, call.selection, call.block = True, self.selection, block
        if self.selection is not None:
            self.selection.call = call
        self._scope.begin_call()
        return self

    def __exit__(self, *_: object) -> None:
        """Return to what the thread was in before."""
        call = self._call
        self._scope.end_call()
        call.bound, call.selection, call.block = self._before
        self._in_call.__exit__()
        if self._gradients is not None:
            self._gradients.__exit__(None, None, None)
        if self._extra is not None:
            self._extra.release()
