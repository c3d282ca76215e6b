"""The parts of a model that calibration works on: its linear modules, and its list of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from deltafmt.errors import UsageError


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module.

    Attributes:
        name: the module's name in the model.
        weight_name: the weight's name; a tied weight has the first of its names.
        module: the module itself.
        axis: the dimension of the weight that runs over the inputs.
    """

    name: str
    weight_name: str
    module: nn.Module
    axis: int

    @property
    def weight(self) -> torch.Tensor:
        """The weight."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def own(self) -> bool:
        """True if the weight is not tied. A tied weight has other uses, of which this module's moments know nothing."""
        return self.weight_name == f"{self.name}.weight"

    @property
    def columns(self) -> int:
        """The size of an input."""
        return int(self.weight.shape[self.axis])


def linear_modules(model: nn.Module) -> dict[str, Linear]:
    """Return every linear module by name, in the model's order: ``nn.Linear``, and GPT-2's ``Conv1D``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for name, module in model.named_modules():
        axis = 1 if isinstance(module, nn.Linear) else 0 if _stores_inputs_first(module) else None
        weight = getattr(module, "weight", None)
        if axis is not None and isinstance(weight, nn.Parameter) and weight.ndim == 2:
            found[name] = Linear(name, names[id(weight)], module, axis)
    return found


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the name and the members of the model's list of blocks; ("", []) if there is none.

    This is the longest list of modules that all have linear modules inside. Lists within lists, such as the experts of
    a block, do not count.
    """
    best: tuple[str, list[nn.Module]] = "", []
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        lists.append(name)
        if len(module) > len(best[1]) and all(linear_modules(member) for member in module):
            best = name, list(module)
    return best


def replace_weight(linear: Linear, new: object) -> None:
    """Set a module's weight, rounded to its dtype, in place: a tied weight changes wherever it is used.

    Raises:
        UsageError: the new weight has another shape or is not finite.
    """
    replace_parameter(linear.weight, linear.weight_name, new)


def replace_parameter(parameter: torch.Tensor, name: str, new: object) -> None:
    """Set a parameter, rounded to its dtype, in place; see :func:`replace_weight`."""
    value = torch.as_tensor(new)
    if value.shape != parameter.shape:
        shapes = f'of shape {list(value.shape)} does not fit "{name}" of shape {list(parameter.shape)}'
        raise UsageError(f"a new weight {shapes}")
    if not bool(value.isfinite().all()):
        raise UsageError(f'a new weight for "{name}" is not finite')
    with torch.no_grad():
        parameter.copy_(value)


def _stores_inputs_first(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
