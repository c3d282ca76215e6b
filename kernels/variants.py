"""The variants of kernels that launches need: a kernel with what Triton compiles it for.

Triton compiles a kernel anew for every choice of its constants, of its pointers' dtypes, and of what it knows of its
numbers: that one is 1, or a multiple of 16. To know which variants a product needs, the product is made while variants
are collected: its launches then only note what they would have launched, so its tensors can lie on torch's ``meta``
device, where they take no memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

# Arguments that Triton takes as numbers are told apart by no more than these.
ALIGNED, OTHER, WIDE = 16, 3, (1 << 40) + 3

_state = threading.local()


class Variant(NamedTuple):
    """One variant of a kernel; equal for launches that share compiled code.

    Attributes:
        module, name: where the kernel is.
        arguments: what it is compiled for, as JSON: by parameter, in the order in which the launch gives them, which
            is part of the key under which Triton finds the compiled code.
    """

    module: str
    name: str
    arguments: str

    @classmethod
    def of(cls, kernel: Any, arguments: Mapping[str, Any]) -> Variant:
        """Return the variant that a launch with these arguments needs."""
        known = _parameters(kernel)
        plain = {name: _plain(known.get(name), value) for name, value in arguments.items()}
        return cls(kernel.fn.__module__, kernel.fn.__name__, json.dumps(plain))

    def kernel(self) -> Any:
        """Return the kernel."""
        return getattr(importlib.import_module(self.module), self.name)

    def values(self) -> dict[str, Any]:
        """Return arguments for Triton that give this variant; a tensor is an empty one of its dtype."""
        return {name: _value(value) for name, value in json.loads(self.arguments).items()}


@functools.cache
def _parameters(kernel: Any) -> dict[str, Any]:
    """Return the parameters of a kernel by name; one that is interpreted is read as if it were compiled."""
    if not hasattr(kernel, "params"):
        from triton.runtime.jit import JITFunction

        kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs.get("do_not_specialize"))
    return {parameter.name: parameter for parameter in kernel.params}


def _plain(parameter: Any, value: Any) -> Any:
    """Return what an argument is compiled for, in a form that JSON has."""
    if isinstance(value, torch.Tensor):
        # Torch aligns its memory, and so does the format: every pointer is a multiple of 16.
        return {"tensor": str(value.dtype).removeprefix("torch.")}
    if hasattr(value, "primitive_bitwidth"):
        return {"dtype": value.name}
    is_number = parameter is not None and not parameter.is_constexpr and type(value) is int
    if not is_number:
        return value
    if not -(1 << 31) <= value < 1 << 31:
        return WIDE
    if parameter.do_not_specialize:
        return OTHER
    return 1 if value == 1 else ALIGNED if value % ALIGNED == 0 else OTHER


def _value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.empty(0, dtype=getattr(torch, value["tensor"]), device="meta")
    import triton.language as tl

    return tl.dtype(value["dtype"])


@contextlib.contextmanager
def collecting() -> Iterator[dict[Variant, None]]:
    """Note the variants of all launches that this thread would make within the block, and launch none of them."""
    found: dict[Variant, None] = {}
    before = getattr(_state, "found", None)
    _state.found = found
    try:
        yield found
    finally:
        _state.found = before


def is_collecting() -> bool:
    """Return True within :func:`collecting`."""
    return getattr(_state, "found", None) is not None


def note_variant(kernel: Any, arguments: Mapping[str, Any]) -> bool:
    """Note a launch if variants are collected; return True if so, and the launch is then not made."""
    found: dict[Variant, None] | None = getattr(_state, "found", None)
    if found is None:
        return False
    found[Variant.of(kernel, arguments)] = None
    return True
