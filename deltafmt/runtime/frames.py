"""The seam to torch's compiler: which frames it looks into, and which it must not.

A call of a served model begins with Python that belongs to no graph. That code runs with the compiler switched off; the
model's own forward is run with the compiler that was on, if any.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])


def _skip(code: CodeType) -> None:
    from torch._dynamo.eval_frame import skip_code  # a second of imports, which transformers' models have made already

    skip_code(code)


def outside(function: F) -> F:
    """Keep a function out of compiled code; as ``torch.compiler.disable``, but what it calls may be compiled."""
    _skip(function.__code__)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "a call of a model with deltas begins outside of compiled code"  # type: ignore[attr-defined]
    return function


def suspend() -> object:
    """Switch the compiler off in this thread, and return what :func:`resume` takes; None if it was off."""
    return eval_frame.set_eval_frame(None)


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

    _skip(run.__code__)
    run.plain = function  # type: ignore[attr-defined]
    return run


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that :func:`compiled` was given; another function is what it is."""
    return getattr(function, "plain", function)


def untraced(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that the compiler does not look into, nor into what it calls."""
    compiler = suspend()
    try:
        return function(*args, **kwargs)
    finally:
        resume(compiler)


def install() -> None:
    """Tell the compiler what it must not look into; a second call does nothing."""
    outside(untraced)


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """Run what is compiled in a model as it was written."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return, no-untyped-call]


def forget() -> None:
    """Drop compiled code, which may hold modules as they were before a change."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset_code_caches()
