"""Sites of experts: stacks of matrices of which each token uses a few, as Mixtral, Qwen's, DeepSeek's and GPT-OSS have.

transformers keeps the experts of a layer in one module, with parameters ``gate_up_proj`` [E, 2I, H] and ``down_proj``
[E, H, I] (or with the last two dimensions exchanged), and tells of each module what it is made of: whether it has
gates, biases, exchanged dimensions. So one forward computes all of them here, as one does there. Pairs of a token and
one of its experts are sorted by expert; the base multiplies them in groups, and one launch adds the products of all
pairs of a delta and an expert. Only experts that a token has chosen are multiplied with or decoded.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deltafmt.errors import UsageError
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.expert_matrices import ExpertMatrices
from deltafmt.runtime.part_keys import split_key
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.sites import refuse_gradient
from deltafmt.runtime.substituted import WrappedSite
from deltafmt.runtime.values import new_values


def matrices_of(module: nn.Module) -> tuple[str, str]:
    """Return the names of the stacks that a module of experts multiplies with, in order."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def refuse_experts(name: str, module: nn.Module, keys: Iterable[str]) -> None:
    """Refuse experts to which deltas cannot be added.

    Args:
        name: the module's name.
        module: the experts.
        keys: the keys of what a delta changes.

    Raises:
        UsageError: names the module.
    """
    matrices = matrices_of(module)
    for key in matrices:
        held = module._parameters.get(key)  # noqa: SLF001 - quantized experts have none
        if held is None or not held.is_floating_point() or held.dim() != 3 or len(held) != module.num_experts:
            raise UsageError(
                f'"{name}", a {type(module).__name__}, holds its experts in a form of its own, to which deltas cannot '
                "be added"
            )
    known = {*matrices, *(f"{key}_bias" for key in matrices if module.has_bias)}
    for key in keys:
        if split_key(key)[0] not in known:
            raise UsageError(f'the delta changes the {key} of "{name}", and it is not known what that is for')


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """The pairs of a token and one of its experts, sorted by expert.

    Attributes:
        experts: int64, shape (pairs,): the expert of each.
        slots: int64, shape (pairs,): the slot of each; -1 for the base, a lower number for a sum.
        ends: int32, shape (E,): where each expert's pairs end.
        selection: what the call serves.
    """

    experts: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor
    selection: Selection


class ExpertsSite(WrappedSite):
    """A stack of experts, whose parameters and biases a delta brings whole or expert by expert."""

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        super().__init__(name, module, device)
        self._count = int(module.num_experts)  # type: ignore[arg-type]
        self._up = matrices_of(module)[0]
        self._matrices: dict[str, ExpertMatrices] = {}
        for key in matrices_of(module):
            held = module._parameters[key]  # noqa: SLF001
            assert held is not None
            self._matrices[key] = ExpertMatrices(f"{name}.{key}", held, transposed=bool(module.is_transposed))
        self._biases: dict[int, dict[str, torch.Tensor]] = {}

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        for matrices in self._matrices.values():
            matrices.grow(slots)

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        for key, matrices in self._matrices.items():
            own = {part: tensor for part, tensor in tensors.items() if split_key(part)[0] == key}
            matrices.put(slot, own)
            bias = self._differences(f"{key}_bias", tensors)
            if bias is not None:
                self._biases.setdefault(slot, {})[key] = bias

    def _differences(self, key: str, tensors: Mapping[str, DeviceTensor]) -> torch.Tensor | None:
        """Return what a delta adds to the biases of all experts, float32, shape (E, rows)."""
        found: torch.Tensor | None = None
        for part, tensor in tensors.items():
            own, elements = split_key(part)
            if own != key:
                continue
            base: torch.Tensor = getattr(self.module, key).detach().to(self.device)
            found = torch.zeros(base.shape, dtype=torch.float32, device=self.device) if found is None else found
            mine = slice(None) if elements is None else elements
            old = base.reshape(-1)[mine]
            found.view(-1)[mine] = new_values(tensor, old).float() - old.float()
        return found

    def values(self, slot: int, key: str) -> torch.Tensor:  # noqa: ARG002 - of every site
        """Refuse to decode a whole stack.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f'the model reads the {key} of "{self.name}" without calling it, which would decode all experts; unpack '
            "the delta instead"
        )

    def _clear(self, slot: int) -> None:
        self._biases.pop(slot, None)
        for matrices in self._matrices.values():
            matrices.clear(slot)

    def run(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the weighted sum of each token's experts, shape (tokens, H)."""
        x, chosen, weights = self._given(args, kwargs)
        rows = self.order(selection, x, x.shape[:1])
        each = chosen.shape[1]
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        pairs = _Pairs(
            experts,
            rows.slots().repeat_interleave(each)[order],
            torch.searchsorted(experts, torch.arange(self._count, device=experts.device), right=True).int(),
            selection,
        )
        module: Any = self.module
        y = self._linear(self._up, x[order // each], pairs)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)  # noqa: SLF001 - the library's interface
        y = self._linear("down_proj", y, pairs)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        y = y * weights.reshape(-1)[order, None]
        output = torch.empty_like(y)
        output[order] = y
        found = output.view(len(x), each, -1).sum(1).to(x.dtype)
        refuse_gradient(self.name, found)
        if selection.walk is not None:
            selection.walk.same_rows(found, x)
        return found

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the hidden states (tokens, H), the chosen experts and their weights (tokens, experts a token).

        Raises:
            UsageError: the module was called with something else, or shares its experts with other devices.
        """
        bound = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs)
        given = [value for value in list(bound.arguments.values())[1:] if value is not None]
        whole = len(given) == 3 and all(isinstance(value, torch.Tensor) and value.dim() == 2 for value in given)
        if not whole or given[1].shape != given[2].shape or len(given[0]) != len(given[1]):
            raise UsageError(f"{self.name}, a {type(self.module).__name__}, is called in a way that is not known")
        if getattr(self.module, "_is_expert_parallel", False):
            raise UsageError(
                f"{self.name} has only a part of its experts on this device; deltas are served on one device"
            )
        return given[0], given[1], given[2]

    def _linear(self, key: str, x: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        """Return the products of pairs with their experts, with the deltas, shape (pairs, rows)."""
        held, bias = self.module._parameters[key], self.module._parameters.get(f"{key}_bias")  # noqa: SLF001
        assert held is not None
        y = _grouped(x, held, pairs, transposed=self._matrices[key].transposed)
        if self.module.has_bias and bias is not None:
            y = y + bias[pairs.experts]
        selection = pairs.selection
        before = y.clone() if selection.mixes else y
        self._add(key, y, x, pairs.experts, pairs.slots, selection.used)
        for mix, terms in selection.mixes.items():
            mine = (pairs.slots == mix).nonzero()[:, 0]
            total = before[mine].float()
            for slot, weight in terms:
                changed = before[mine]
                self._add(key, changed, x[mine], pairs.experts[mine], torch.full_like(mine, slot), {slot})
                total = total + weight * (changed.float() - before[mine].float())
            y[mine] = total.to(y.dtype)
        return y

    def _add(
        self,
        key: str,
        y: torch.Tensor,
        x: torch.Tensor,
        experts: torch.Tensor,
        slots: torch.Tensor,
        used: AbstractSet[int],
    ) -> None:
        """Add the deltas of single slots to the products of pairs, in place."""
        self._matrices[key].add(y, x, experts, slots, used)
        for slot in used & self._biases.keys():
            biases = self._biases[slot]
            if key in biases:
                mine = (slots == slot)[:, None]
                y += torch.where(mine, biases[key][experts.clamp(0, self._count - 1)], 0).to(y.dtype)


def _grouped(x: torch.Tensor, weight: torch.Tensor, pairs: _Pairs, *, transposed: bool) -> torch.Tensor:
    """Return the base's products, by the function of transformers if there is one.

    Args:
        x: shape (pairs, columns), sorted by expert.
        weight: shape (E, rows, columns), or (E, columns, rows) if ``transposed``.
        pairs: the pairs.
    """
    library: Any = sys.modules.get("transformers.integrations.moe")
    grouped: Callable[..., torch.Tensor] | None = getattr(library, "_grouped_linear", None)
    if grouped is not None and x.is_cuda and "is_transposed" in inspect.signature(grouped).parameters:
        return grouped(x, weight, pairs.ends, is_transposed=transposed)
    y = x.new_empty(len(x), weight.shape[2 if transposed else 1])
    for expert, start, stop in _runs(pairs.ends):
        one = weight[expert].T if transposed else weight[expert]
        y[start:stop] = functional.linear(x[start:stop], one)
    return y


def _runs(ends: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield each expert that has pairs, and where they start and end."""
    for expert, (start, stop) in enumerate(itertools.pairwise((0, *ends.tolist()))):
        if stop > start:
            yield expert, start, stop
