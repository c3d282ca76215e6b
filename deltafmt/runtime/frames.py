"""The seam to torch's compiler: which frames it looks into, and which it must not.

A call of a served model begins with Python that belongs to no graph. That code runs with the compiler switched off; the
model's own forward is run with the compiler that was on, if any.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch._dynamo as dynamo
from torch._C._dynamo import eval_frame
from torch._dynamo import decorators
from torch._dynamo.comptime import comptime
from torch._dynamo.eval_frame import skip_code

from deltafmt.errors import UsageError

is_tracing: Callable[[], bool] = torch._C._is_tracing  # noqa: SLF001 - torch.jit has its own behind two more calls
F = TypeVar("F", bound=Callable[..., Any])


def outside(function: F) -> F:
    """Keep a function out of compiled code; what it calls may be compiled."""
    return cast("F", decorators.skip(function))


def suspend() -> object:
    """Switch the compiler off in this thread, and return what :func:`resume` takes; None if it was off."""
    if torch.compiler.is_compiling():
        dynamo.graph_break(msg="a call of a model with deltas begins outside of compiled code; compile its layers")
    return eval_frame.set_eval_frame(None)


skip_code(suspend.__code__)  # where it is called with the compiler on


def resume(compiler: object) -> None:
    """Switch the compiler on in this thread."""
    eval_frame.set_eval_frame(compiler)  # type: ignore[arg-type]


def compiled(function: Callable[..., Any], compiler: object) -> Callable[..., Any]:
    """Return a function that runs with a compiler on."""

    def run(*args: Any, **kwargs: Any) -> Any:
        eval_frame.set_eval_frame(compiler)  # type: ignore[arg-type]
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(None)

    run.plain = function  # type: ignore[attr-defined]
    return run


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that :func:`compiled` was given; another function is what it is."""
    return getattr(function, "plain", function)


skip_code(compiled(plain, None).__code__)  # of all functions that it returns


@outside
def untraced(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that the compiler does not look into, nor into what it calls."""
    compiler = suspend()
    try:
        return function(*args, **kwargs)
    finally:
        resume(compiler)


def refuse_recording(serves: bool) -> None:
    """Refuse a call whose steps are recorded for later calls, which would choose no deltas.

    Args:
        serves: deltas are served in this call.

    Raises:
        UsageError: ``torch.export``, ``torch.jit.trace`` or a transform of ``torch.func`` records the call.
    """
    # Torch 2.6 has no is_exporting. What is traced without its compiler, which does not look in here, is exported.
    if getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)():
        way = "torch.export"
    elif serves and is_tracing():
        way = "torch.jit.trace"
    elif serves and torch._C._functorch.maybe_current_level() is not None:  # noqa: SLF001
        way = "torch.func"
    else:
        return
    raise _recorded(way)


def refuse_trace() -> None:
    """Refuse a call of a part of a model that serves deltas, if the call is recorded for later ones.

    Raises:
        UsageError: ``torch.jit.trace`` records the call.
    """
    if is_tracing():
        raise _recorded("torch.jit.trace")


def _recorded(way: str) -> UsageError:
    return UsageError(f"a model with deltas cannot be recorded by {way}; unpack the delta, and record the fine-tune")


class _Uncompiled:
    """The stance of torch's compiler while calls run uncompiled.

    A stance holds for the whole process: the first of calls that overlap takes it, and the last gives the one before
    back. Each putting back what it found would leave the compiler off when they end in the order in which they began.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._stance: Any = None

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        with self._lock:
            if not self._calls:
                self._stance = torch.compiler.set_stance("force_eager")
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._stance.__exit__(None, None, None)


_uncompiled = _Uncompiled()


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """Run what is compiled in a model as it was written; so do other threads for as long."""
    return _uncompiled.call()


class CompiledParts:
    """Tells whether a module of a model was compiled: by its ``compile``, or put back as ``torch.compile`` returns it.

    It is asked in every call until compiled code was seen, so it keeps what it looks at: 423 modules take 0.04 ms.

    Args:
        model: the model, whose modules are those that it has now.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._held = [module.__dict__ for module in model.modules()]
        self._children = [held["_modules"] for held in self._held if held["_modules"]]

    def found(self) -> bool:
        """Tell whether there is one."""
        for held in self._held:
            if "_compiled_call_impl" in held:
                return True
        for children in self._children:
            for child in children.values():
                if type(child) is dynamo.OptimizedModule:
                    return True
        return False


def forget() -> None:
    """Drop compiled code, which may hold modules as they were before a change."""
    dynamo.reset_code_caches()


_numbers = itertools.count()
_GRAPH = "deltafmt_graph"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def graph_now() -> str:
    """Return what stands for the graph that the compiler is making; code that it makes holds it as a constant."""
    context = torch._guards.TracingContext.get()  # noqa: SLF001 - torch has no other name for it
    if not hasattr(context, _GRAPH):
        setattr(context, _GRAPH, str(next(_numbers)))
    return str(getattr(context, _GRAPH))


def _note(context: Any) -> None:
    key, given = context.get_local("key").as_fake(), context.get_local("given").as_fake()
    key.seen = given._version  # noqa: SLF001 - torch has no other name for it


def _check(context: Any) -> None:
    key, given = context.get_local("key").as_fake(), context.get_local("given").as_fake()
    if key.seen != given._version:  # noqa: SLF001
        raise UsageError(
            "the input of modules that compute together is written to between their calls; attach the deltas with "
            "fuse=False to compile such a model"
        )


def note_input(key: torch.Tensor, given: torch.Tensor) -> None:  # noqa: ARG001 - the compiler reads them
    """Note, in code that the compiler looks at, an input for which outputs are computed ahead."""
    comptime(_note)


def check_input(key: torch.Tensor, given: torch.Tensor) -> None:  # noqa: ARG001
    """Refuse to compile code that has written to such an input since; compiled code has no count of changes.

    Raises:
        UsageError: the input was written to.
    """
    comptime(_check)
