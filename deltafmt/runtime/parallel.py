"""Models that are cut over several processes: the cut of a parameter that this process has, and where deltas go.

Transformers (``tp_plan``, ``DistributedConfig``) leaves each process some rows or some columns of a weight, as a
DTensor, and gives the module another forward. That one prepares the input, runs the module's own forward on this
process's cut, and then gathers the outputs or adds them up. A delta belongs between the two: its own cut is added to
the cut's output, before the sum.

A stand-in does so. It is a plain ``nn.Linear`` that shares the memory of the cut, and it runs where the module's own
forward would. Everything else sees in it a linear module like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import CellType
from typing import Any, Final

import torch
from torch import nn

from deltafmt.errors import UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.runtime.binding import BoundModule, Role
from deltafmt.runtime.cuts import WAY_OUT, Cut, cut_of, settled
from deltafmt.runtime.model_batch import is_distributed
from deltafmt.runtime.uncopied import Uncopied
from deltafmt.terms.cutting import check_cut

# The variable of transformers' forward that holds the module's own.
_OWN_FORWARD: Final = "original_forward"
# A style of transformers that changes gradients alone.
_FORWARD_AS_IT_IS: Final = "ReplicatedWithGradAllReduce"


def own_forward(module: nn.Module) -> CellType | None:
    """Return the cell of transformers' forward that holds the module's own; None if the module has no such forward."""
    forward = module.__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    library = str(getattr(forward, "__module__", "")).partition(".")[0]
    if library != "transformers" or code is None or _OWN_FORWARD not in code.co_freevars:
        return None
    cell: CellType = forward.__closure__[code.co_freevars.index(_OWN_FORWARD)]  # type: ignore[union-attr]
    return cell


def changes_gradients_alone(module: nn.Module) -> bool:
    """Tell whether transformers' forward of a module computes what the module's own does."""
    forward = module.__dict__.get("forward")
    return str(getattr(forward, "__qualname__", "")).startswith(f"{_FORWARD_AS_IT_IS}.")


class _Inner(Uncopied):
    """What runs in the place of a module's own forward."""

    def __init__(self, own: Any, linear: nn.Linear) -> None:
        self.own = own
        self.linear = linear

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # With gradients transformers computes with DTensors, and nothing is served.
        if torch.is_grad_enabled() or any(is_distributed(value) for value in args):
            return self.own(*args, **kwargs)
        return self.linear(*map(settled, args), **kwargs)


_Pair = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class _StandIn:
    """A stand-in, with the module that it stands in for and the parameters that it shares."""

    module: nn.Module
    parameters: _Pair
    linear: nn.Linear
    cell: CellType
    own: Any

    def is_for(self, module: nn.Module, parameters: _Pair, cell: CellType) -> bool:
        """Tell whether the stand-in has these parameters of this module."""
        same = all(one is other for one, other in zip(self.parameters, parameters, strict=True))
        return same and self.module is module and self.cell is cell


class StandIns:
    """The stand-ins of one model's modules."""

    def __init__(self) -> None:
        self._made: dict[int, _StandIn] = {}

    def place(self, bound: BoundModule, entries: Mapping[str, TensorEntry]) -> None:
        """Find out what part of a module this process has, and give the module a stand-in where it needs one.

        Args:
            bound: a module that a delta changes; gets its ``local``, its ``cuts`` and what becomes of its bias.
            entries: the delta's entries by tensor name.

        Raises:
            UsageError: the module is cut in a way that deltas cannot follow.
        """
        module = bound.module
        is_cut = any(is_distributed(parameter) for parameter in module.parameters(recurse=False))
        cell = own_forward(module)
        if not is_cut and (cell is None or changes_gradients_alone(module)):
            return
        if bound.role is Role.EMBEDDING and type(module).forward is nn.Embedding.forward:
            return  # its output is whole, and so is its delta
        if bound.role is not Role.LINEAR or type(module) is not nn.Linear or cell is None:
            raise UsageError(
                f'module "{bound.name}", a {type(module).__name__}, is cut over processes in a way that deltas cannot '
                f"follow; {WAY_OUT}"
            )
        cuts = {
            key: cut_of(f"{bound.name}.{key}", parameter)
            for key, parameter in module.named_parameters(recurse=False)
            if is_distributed(parameter)
        }
        for key, tensor in bound.tensors.items():
            if key in cuts:
                _check(tensor, entries[tensor], cuts[key], tuple(getattr(module, key).shape))
        bound.local = self._stand_in(module, cell, cuts)
        bound.cuts = cuts
        bias: torch.Tensor | None = module.bias  # torch says that there is one
        if "bias" in bound.tensors and bias is not None and "bias" not in dict(bound.local.named_parameters()):
            # The bias is added once, behind the sum. A change of it is added by the first process, before the sum.
            bound.summed_bias = _local(bias)
            bound.bias_elsewhere = cuts["weight"].columns.start > 0

    def close(self) -> None:
        """Give each module its own forward back."""
        for made in self._made.values():
            made.cell.cell_contents = made.own
        self._made.clear()

    def _stand_in(self, module: nn.Linear, cell: CellType, cuts: Mapping[str, Cut]) -> nn.Linear:
        made = self._made.get(id(module))
        now = module._parameters["weight"], module._parameters["bias"]  # noqa: SLF001
        if made is None or not made.is_for(module, now, cell):
            own = made.own if made is not None and made.cell is cell else cell.cell_contents
            linear = _linear(module, cuts)
            cell.cell_contents = _Inner(own, linear)
            made = self._made[id(module)] = _StandIn(module, now, linear, cell, own)
        return made.linear


def _linear(module: nn.Linear, cuts: Mapping[str, Cut]) -> nn.Linear:
    """Return a linear module that shares the memory of a module's cut."""
    weight = _local(module.weight)
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    summed = "weight" in cuts and columns != module.in_features
    bias: torch.Tensor | None = module.bias  # torch says that there is one
    if bias is not None and not summed:
        linear.bias = nn.Parameter(_local(bias), requires_grad=False)
    return linear.eval()


def _local(parameter: Any) -> torch.Tensor:
    found: torch.Tensor = parameter.to_local() if is_distributed(parameter) else parameter
    return found.detach()


def _check(name: str, entry: TensorEntry, cut: Cut, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of which this process's cut cannot be served.

    Raises:
        UsageError: names the tensor.
    """
    if entry.shape != shape or (entry.base is not None and entry.base.shape != shape):
        raise UsageError(
            f'tensor "{name}" is {list(entry.shape)} where the model has {list(shape)}, cut over processes; {WAY_OUT}'
        )
    try:
        for term in entry.terms:
            check_cut(term.layout, (entry.delta_rows, entry.columns), cut.rows, cut.columns)
    except UsageError as error:
        raise UsageError(
            f'tensor "{name}" cannot be cut over so many processes: {error}; take fewer, or {WAY_OUT}'
        ) from error
