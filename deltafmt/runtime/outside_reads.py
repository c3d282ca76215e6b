"""Weights that are read inside a block but outside of a call, as by ``hidden @ model.lm_head.weight.T`` in a loss.

A parameter holds the base's values. Within a call of the model, reads of it are given the fine-tune's
(:mod:`deltafmt.runtime.uncalled_reads`). Code of the caller's own, in the body of a block, would compute with the base
and not notice it, so it is refused. While a block is open, a torch mode sees the functions that its thread calls; a
call of the model puts the mode away, and costs as much as without it.

Copies and views are let through, and remembered: ``state_dict``, ``save_pretrained`` and comparisons are the base's.
Compiled code, which does not show its modules, is let through as well.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from deltafmt.errors import UsageError
from deltafmt.runtime.call_frames import frames_of
from deltafmt.runtime.shape_queries import FORM_ONLY, FORMED, function_name, lends_form

# What copies the values of a tensor, its first argument, or views them; a copy is watched as the parameter is.
_COPIES: Final = FORMED | {
    *("detach", "data", "clone", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "contiguous"),
    *("pin_memory", "T", "mT", "H", "mH", "t", "view", "reshape", "flatten", "ravel", "unflatten", "transpose"),
    *("permute", "squeeze", "unsqueeze", "expand", "swapaxes", "swapdims", "movedim", "moveaxis"),
}
# What writes the values of its second argument to its first.
_WRITES_COPY: Final = frozenset(("copy_", "set_", "__set__"))
# What leaves nothing of the values that a tensor had.
_OVERWRITES: Final = _WRITES_COPY | {"zero_", "fill_", "normal_", "uniform_"}
# What compares values, or writes them down.
_HARMLESS: Final = FORM_ONLY | {
    *("eq", "ne", "__eq__", "__ne__", "isfinite", "isinf", "isnan"),
    *("equal", "allclose", "isclose", "numpy", "tolist", "storage", "is_pinned", "share_memory_", "register_hook"),
    *("__repr__", "__format__", "__str__", "__deepcopy__", "__reduce_ex__", "__setstate__", "__array__"),
    *("_typed_storage", "is_same_size", "is_set_to", "retain_grad", "retains_grad", "output_nr", "backward"),
    *("register_post_accumulate_grad_hook", "is_conj", "is_neg", "is_inference", "is_sparse_csr", "is_mkldnn"),
    *("is_nested", "itemsize", "nbytes", "dim_order", "__dlpack__", "__dlpack_device__", "_backward_hooks"),
    *("__cuda_array_interface__", "has_names", "is_signed", "get_device", "volatile", "is_xpu", "is_mps"),
}
_NO_TENSORS: Final = frozenset(
    (bool, int, float, str, slice, type(None), type(...), torch.Size, torch.dtype, torch.device)
)
_BACKWARD: Final = torch.Tensor.backward
_CALL: Final = nn.Module._call_impl.__code__  # noqa: SLF001 - the frame in which a module is called
_SAVE: Final = nn.Module._save_to_state_dict.__code__  # noqa: SLF001
_GRAPH: Final = "<eval_with_key>"  # what torch.fx says of the code that it generates


class Watched(Protocol):
    """What is asked of the model of an open block."""

    def changed_weight(self, parameter: torch.Tensor) -> str | None:
        """Return the name of a weight that the deltas of the caller's block change; None for any other tensor."""

    def computes_with(self, module: nn.Module, parameter: torch.Tensor) -> bool:
        """Tell whether a module adds the deltas to what it computes with a parameter."""


class _Mode(TorchFunctionMode):
    """The mode of one thread.

    Attributes:
        opened: the blocks that are open in this thread, in the order in which they began.
        calls: the calls of models that the thread is in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[Opened] = []
        self.calls = 0
        self._copies: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A block that ended in another thread leaves the mode here.
        if torch.compiler.is_compiling() or self.calls or not self.opened:
            return func(*args, **kwargs)
        if func is _BACKWARD and not args[0].requires_grad:
            raise UsageError(
                "deltas have no gradients, and inside a block nothing has; train outside of blocks, or train the "
                "unpacked fine-tune"
            )
        if self._none_watched(args) and (not kwargs or self._none_watched(kwargs.values())):
            return func(*args, **kwargs)
        name = function_name(func)
        if name in _HARMLESS or (name == "__set__" and func.__self__.__name__ != "data"):
            return func(*args, **kwargs)
        # What is written to is not read, or the next call notices it.
        writes = name in _WRITES_COPY or (name.endswith("_") and not name.endswith("__"))
        given: tuple[tuple[int | str, Any], ...] = (*enumerate(args), *kwargs.items())
        for number, (place, value) in enumerate(given):
            if (number == 0 and writes) or lends_form(name, place):
                continue
            for one in value if isinstance(value, (list, tuple)) else (value,):
                parameter = self._parameter(one)
                if parameter is None:
                    continue
                if name in _COPIES:
                    return self._copied(parameter, func(*args, **kwargs))
                if name in _WRITES_COPY:
                    func(*args, **kwargs)
                    return self._written(parameter, args[0])
                self._refuse(parameter)
        if name in _OVERWRITES and args:
            self._copies.pop(id(args[0]), None)
        return func(*args, **kwargs)

    def _none_watched(self, values: Iterable[Any]) -> bool:
        """Tell quickly that none of some arguments is a parameter, a copy of one, or a tensor of another class."""
        copies = self._copies
        for value in values:
            kind = type(value)
            if kind is torch.Tensor:
                if id(value) in copies:
                    return False
            elif kind is list or kind is tuple:
                if not self._none_watched(value):
                    return False
            elif kind not in _NO_TENSORS:
                return False
        return True

    def _parameter(self, value: Any) -> torch.Tensor | None:
        """Return the parameter that a value is, or is a copy of."""
        if not isinstance(value, torch.Tensor):
            return None
        copy = self._copies.get(id(value))
        if copy is not None and copy[0]() is value:
            return copy[1]
        return value if isinstance(value, nn.Parameter) else None

    def _written(self, parameter: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Watch a tensor that a parameter was copied into, and what it is a view of, but no changed weight."""
        for one in (into, into._base):  # noqa: SLF001 - torch has no other name for it
            if one is not None and all(watched.changed_weight(one) is None for watched in self._watched()):
                self._copied(parameter, one)
        return into

    def _copied(self, parameter: torch.Tensor, copy: Any) -> Any:
        saved = sys._getframe(2).f_code is _SAVE  # noqa: SLF001
        if isinstance(copy, torch.Tensor) and copy is not parameter and not saved:
            key, copies = id(copy), self._copies
            copies[key] = weakref.ref(copy, lambda _: copies.pop(key, None)), parameter
        return copy

    def _refuse(self, parameter: torch.Tensor) -> None:
        """Refuse a function that computes with a weight that the deltas of the caller's block change."""
        found = [(one, weight) for one in self._watched() if (weight := one.changed_weight(parameter)) is not None]
        if not found:
            return
        frames = list(frames_of(sys._getframe(2)))  # noqa: SLF001
        names = map(_module_of, frames)
        caller = next((name for name in names if not name.startswith("torch.")), "")
        if caller.startswith("deltafmt."):
            return  # it compares the base, or adds the deltas itself
        if any(frame.f_code.co_filename.startswith(_GRAPH) for frame in frames):
            return  # compiled code does not show which modules it was made of
        running = [frame.f_locals["self"] for frame in frames if frame.f_code is _CALL]
        for watched, weight in found:
            if not any(watched.computes_with(module, parameter) for module in running):
                raise UsageError(
                    f'"{weight}" is read without calling its module, and holds the base\'s values; call the module, or '
                    "read the base's weight outside of blocks"
                )

    def _watched(self) -> list[Watched]:
        """Return the models of the open blocks, each once."""
        if len(self.opened) == 1:
            return [self.opened[0].watched]
        return list({id(one.watched): one.watched for one in self.opened}.values())

    def begin(self, opened: Opened) -> None:
        """See what is read, from the thread's first block on."""
        self.opened.append(opened)
        if len(self.opened) == 1 and not self.calls:
            _take_off(self)  # a block may have ended in another thread
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, opened: Opened) -> int:
        """See nothing any more after the thread's last block; return the place that a block had among all."""
        place = self.opened.index(opened)
        del self.opened[place]
        if not self.opened:
            self._copies.clear()
        return place

    def put_away(self) -> bool:
        """Begin a call of a model; return whether the mode was the innermost, and is put away while the call runs."""
        self.calls += 1
        found = self.calls == 1 and _get_current_function_mode() is self  # type: ignore[no-untyped-call]
        if found:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return found

    def put_back(self, away: bool) -> None:
        """End a call of a model."""
        self.calls -= 1
        if away and self.opened:
            self.__enter__()  # type: ignore[no-untyped-call]


class _Thread(threading.local):
    mode: _Mode | None = None


_thread = _Thread()


class Opened:
    """A block that is open in this thread: gradients are off, and reads of changed weights are refused.

    Blocks may end in another order than the reverse of their beginnings. So a block that ends before one that began
    later leaves to that one the gradients that it found.

    Args:
        watched: the block's model.
    """

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self._gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        self._mode = _thread.mode = _thread.mode or _Mode()
        self._mode.begin(self)

    def close(self) -> None:
        """Give back what the thread had before."""
        mode = self._mode
        place = mode.end(self)
        if place < len(mode.opened):
            mode.opened[place]._gradients = self._gradients  # noqa: SLF001 - of this class
        elif mode is _thread.mode:
            torch.set_grad_enabled(self._gradients)
            if not mode.opened:
                _take_off(mode)


class InCall:
    """A context manager: a call of a model, which sees reads of weights in a way of its own."""

    __slots__ = ("_away", "_mode")

    def __enter__(self) -> None:
        """Put the thread's mode away."""
        mode = _thread.mode
        self._mode = mode if mode is not None and mode.opened else None
        if self._mode is not None:
            self._away = self._mode.put_away()

    def __exit__(self, *_: object) -> None:
        """Put it back."""
        if self._mode is not None:
            self._mode.put_back(self._away)


def _take_off(mode: TorchFunctionMode) -> None:
    """Take a mode from the stack of torch's modes, also from under others."""
    above: list[TorchFunctionMode] = []
    if mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        while (top := _pop_mode()) is not mode:  # type: ignore[no-untyped-call]
            above.append(top)
    for other in reversed(above):
        _push_mode(other)  # type: ignore[no-untyped-call]


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
