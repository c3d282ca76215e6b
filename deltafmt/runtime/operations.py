"""The custom operations that code made by ``torch.compile`` holds in the place of served modules' deltas.

``torch.compile`` looks into Python. It would make a graph for each choice of deltas, and keep what was chosen when it
looked. So it is given one opaque operation a group of modules, the same for every choice. The operation finds the
group by a tensor of fixed address, its *key*: the weight of the first module, or a tensor of its own. It finds what is
chosen by the thread that runs it.

``multiply_`` adds products with packed terms, in place. It reads all that depends on the choice from memory of fixed
addresses, so it can be captured in a CUDA graph. ``output`` does the rest (biases, norms, embeddings, whole weights) in
Python, every time; its tag keeps it out of CUDA graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch._dynamo as dynamo

from deltafmt.errors import UsageError


class Multiplies(Protocol):
    """What the key of ``multiply_`` stands for."""

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Add the products of the deltas that are served now, in place."""


class Outputs(Protocol):
    """What the key of ``output`` stands for."""

    def output(self, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return a new tensor: the output with the deltas that are served now."""


_operations: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def new_key(operation: Multiplies | Outputs, device: torch.device) -> torch.Tensor:
    """Return a tensor that stands for an operation for as long as that lives; the caller keeps it."""
    with torch.inference_mode(mode=False):
        key = torch.zeros(1, device=device)
    # CUDA graphs do not copy it, and compiled code does not depend on the address.
    dynamo.mark_static_address(key, guard=False)
    _operations[key.data_ptr()] = operation
    return key


def is_bound(address: int) -> bool:
    """Tell whether a tensor at an address stands for an operation, or for nothing because it has no memory."""
    return not address or address in _operations


def bind_key(address: int, operation: Multiplies) -> None:
    """Let a tensor that stays where it is stand for an operation, until :func:`unbind_key`."""
    _operations[address] = operation


def unbind_key(address: int, operation: Multiplies) -> None:
    """Let a tensor stand for nothing again, unless it stands for another operation now."""
    if _operations.get(address) is operation:
        del _operations[address]


def _operation(key: torch.Tensor) -> Any:
    found = _operations.get(key.data_ptr())
    if found is None:
        raise UsageError(
            "compiled code was made for deltas that are no longer attached, or copies what must stay where it is; "
            "compile the model again"
        )
    return found


def _multiply(outputs: Sequence[torch.Tensor], given: torch.Tensor, key: torch.Tensor) -> None:
    operation: Multiplies = _operation(key)
    operation.multiply(outputs, given)


def _output(given: torch.Tensor, output: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    operation: Outputs = _operation(key)
    return operation.output(given, output)


def _fake_multiply(outputs: Sequence[torch.Tensor], given: torch.Tensor, key: torch.Tensor) -> None:
    """Change nothing about shapes."""


def _fake_output(given: torch.Tensor, output: torch.Tensor, key: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(output, memory_format=torch.contiguous_format)


_library: Any = torch.library.Library("deltafmt", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str, run: Any, fake: Any, **options: Any) -> Any:
    name = _library.define(schema, **options)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deltafmt::{name}", fake, lib=_library)
    return getattr(torch.ops.deltafmt, name).default


multiply_ = _define("multiply_(Tensor(a!)[] outputs, Tensor given, Tensor key) -> ()", _multiply, _fake_multiply)
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
output = _define(
    "output(Tensor given, Tensor output, Tensor key) -> Tensor",
    _output,
    _fake_output,
    tags=(_UNSAFE,) if _UNSAFE is not None else (),
)
