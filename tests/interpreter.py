"""Triton's interpreter in tests: a guard that knows every address that a kernel may touch, and less waiting."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

SCRATCH = ("z_ptr",)  # what a low-rank product's first kernel leaves for the second


def patch_once() -> None:
    """Let the interpreter replace ``triton.language`` once for a module, not again at each call of a device function.

    Replacing it inspects hundreds of members; a second time does nothing, but takes half of a kernel's time.
    """
    patch = functools.cache(lambda _, fn: interpreter._patch_lang(fn))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch(self.fn.__module__, self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


class GuardedMemory:
    """What the interpreter loads and stores with, but nothing outside the tensors that are allowed."""

    def __init__(
        self, readable: Sequence[torch.Tensor], writable: Sequence[torch.Tensor], *, twice: bool = False
    ) -> None:
        self._memory = interpreter._interpreter
        self._readable = [*readable, *writable]
        self._writable = writable
        self._spans = {"store": _spans(writable)}
        self._twice = twice
        self._stored: list[NDArray[np.uint64]] = []

    def launch(self, arguments: Iterable[Any], scratch: Sequence[torch.Tensor] = ()) -> None:
        """Let one launch read its own arguments too, and write to memory that one kernel leaves for the next."""
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        self._spans["load"] = _spans([*self._readable, *tensors])
        self._spans["store"] = _spans([*self._writable, *scratch])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, addresses: NDArray[np.uint64], mask: NDArray[np.bool_], other: Any, dtype: Any) -> Any:
        """Load where the mask says so."""
        self._check("load", addresses, mask, np.dtype(dtype).itemsize)
        return self._memory.load(addresses, mask, other, dtype)

    def store(self, addresses: NDArray[np.uint64], values: NDArray[np.generic], mask: NDArray[np.bool_]) -> Any:
        """Store where the mask says so."""
        used = self._check("store", addresses, mask, values.dtype.itemsize)
        # On a GPU the order would be chance.
        assert self._twice or np.unique(used).size == used.size, "one store writes an element twice"
        self._stored.append(used)
        return self._memory.store(addresses, values, mask)

    def _check(
        self, what: str, addresses: NDArray[np.uint64], mask: NDArray[np.bool_], size: int
    ) -> NDArray[np.uint64]:
        used = np.broadcast_to(addresses, mask.shape)[mask.astype(bool)].astype(np.uint64)
        starts, ends = self._spans[what]
        at = np.searchsorted(starts, used, side="right") - 1
        wrong = (at < 0) | (used + np.uint64(size) > ends[np.maximum(at, 0)])
        assert not wrong.any(), f"a {what} of {int(wrong.sum())} elements outside all tensors"
        return used

    def stored_to(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tell which elements were written."""
        rows, columns = (torch.arange(n) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        addresses = tensor.data_ptr() + (rows[:, None] + columns) * tensor.element_size()
        written = np.concatenate([np.zeros(0, np.uint64), *self._stored])
        return torch.from_numpy(np.isin(addresses.numpy().astype(np.uint64), written))


def _spans(tensors: Sequence[torch.Tensor]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the first address and the one after the last of each tensor's elements, in order."""
    spans = set()
    for tensor in tensors:
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.add((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    starts, ends = np.array(sorted(spans), np.uint64).reshape(-1, 2).T
    return starts, np.maximum.accumulate(ends) if len(ends) else ends


@contextmanager
def guarded(
    readable: Sequence[torch.Tensor], writable: Sequence[torch.Tensor], *, twice: bool = False
) -> Iterator[GuardedMemory]:
    """Run kernels that may load from all these tensors and store to the writable ones, and nowhere else.

    Unless ``twice`` is set, no store may hold an element twice.
    """
    memory = GuardedMemory(readable, writable, twice=twice)
    run = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory.launch([*args, *kwargs.values()], [kwargs[name] for name in SCRATCH if name in kwargs])
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", memory)
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        yield memory


def pick_directly(x: Any, i: Any) -> Any:
    """Do what ``gather.pick`` does, without its arithmetic: it is most of what the interpreter does for that kernel."""
    data = np.ascontiguousarray(x.handle.data[int(getattr(i, "value", i))])
    return tl.tensor(interpreter.TensorHandle(data, x.dtype.scalar), tl.block_type(x.dtype, list(x.shape[1:])))
