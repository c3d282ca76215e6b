"""Sites: the served modules, with the parts of every delta that concern them. This file has the linear ones.

A site adds the deltas to its module's output. The base is not changed: a forward hook sees the module's input and
output, and returns another output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from deltafmt.errors import UsageError
from deltafmt.kernels.products import matmul_, operand_delta
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.runtime.binding import bias_of
from deltafmt.runtime.call_rows import mixed_error
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.growing_table import GrowingTable
from deltafmt.runtime.orders import Order
from deltafmt.runtime.selection import BASE, Selection
from deltafmt.runtime.served_linear import is_plain
from deltafmt.runtime.values import new_values


class Tensors(Protocol):
    """The tensors of a slot that are made when they are asked for (:mod:`deltafmt.runtime.slot_plan`)."""

    def tensors(self, site: Site) -> Mapping[str, DeviceTensor]:
        """Return those of a site, by the names of its module's parameters."""


class Site(ABC):
    """A served module, and the parts of the deltas that change it, by slot.

    Attributes:
        whole: the model's module, if ``module`` stands in for the part of it that this process has.
        slots: the slots of the deltas that change the module.
        hooked: True if a forward hook adds the deltas; False if the module's siblings do.
        ran: True once the module has run while a delta that changes it was served.
        tensors: the tensors of these deltas, by the names of the module's parameters.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        self.name = name
        self.module = module
        self.whole = module
        self.device = device
        self.slots: set[int] = set()
        self.hooked = True
        self.ran = False
        self.tensors: dict[int, Mapping[str, DeviceTensor] | Tensors] = {}

    @property
    def multiplies_only(self) -> bool:
        """True if the deltas change the output by products alone, which siblings add."""
        return False

    def changes(self, selection: Selection) -> bool:
        """Tell whether one of the selection's slots changes this module."""
        return not self.slots.isdisjoint(selection.used)

    def put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        """Fill a slot with a delta's tensors, given by the names of the module's parameters."""
        self.clear(slot)
        changed = {key: tensor for key, tensor in tensors.items() if tensor.entry.action != "same"}
        if changed:
            self.tensors[slot] = changed
            self.slots.add(slot)
            try:
                self._put(slot, changed)
            except BaseException:
                self.clear(slot)  # what was put before the failure would be the next delta's
                raise

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if slot in self.slots:
            self.slots.discard(slot)
            del self.tensors[slot]
            self._clear(slot)

    def held(self, slot: int) -> Mapping[str, DeviceTensor]:
        """Return a slot's tensors, by the names of the module's parameters."""
        found = self.tensors.get(slot, {})
        return found if isinstance(found, Mapping) else found.tensors(self)

    def values(self, slot: int, key: str) -> torch.Tensor:
        """Return the whole values that a slot's delta gives a parameter; the base's if it does not change it.

        Raises:
            UsageError: the fine-tune's parameter has another shape.
        """
        base = self._base(key)
        tensor = self.held(slot).get(key)
        if tensor is None:
            return base
        if tensor.entry.shape != tuple(base.shape):
            raise UsageError(
                f'the model reads the {key} of "{self.name}" whole, and the delta gives it the shape '
                f"{list(tensor.entry.shape)} where the base has {list(base.shape)}; such a delta cannot be served"
            )
        return new_values(tensor, base.to(self.device)).to(base.device)

    def _base(self, key: str) -> torch.Tensor:
        base: torch.Tensor = getattr(self.module, key).detach()
        return base

    def selected(self, selection: Selection, slot: int, key: str) -> torch.Tensor:
        """Return the whole values of a parameter for a slot of a selection, be it the base's or that of a sum."""

        def build() -> torch.Tensor:
            # The base's parameter itself, although the mode of runtime/uncalled_reads.py may watch.
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - torch has no other name for it
                return compute()

        def compute() -> torch.Tensor:
            if slot > BASE:
                return self.values(slot, key)
            base = self._base(key)
            changing = [(one, weight) for one, weight in selection.mixes.get(slot, ()) if one in self.slots]
            if not changing:
                return base
            if not base.is_floating_point():
                raise UsageError(f'the {key} of "{self.name}" is no sum of deltas; a row takes one delta there')
            total = base.float()
            for one, weight in changing:
                total = total + weight * (self.values(one, key).float() - base.float())
            return total.to(base.dtype)

        return selection.memo((id(self), slot, key, "whole"), build)

    def before(self, _selection: Selection, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        """Return other arguments for the base module, or None to keep the given ones."""
        return None

    def order(self, selection: Selection, given: torch.Tensor, shape: Sequence[int], number: int = 0) -> Order:
        """Return the order of the deltas in a tensor that the module was given.

        Args:
            selection: the rows of the batch.
            given: the tensor.
            shape: its leading dimensions.
            number: the number of the argument.

        Raises:
            UsageError: whose rows these are cannot be told, or they are the same for all rows of the batch.
        """
        found = selection.order(self, number, given, shape, self.name)
        if found is None:
            raise mixed_error(self.name, given.shape)
        return found

    @abstractmethod
    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with the selection's deltas; only called if one of them changes this module."""

    @abstractmethod
    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots."""

    @abstractmethod
    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None: ...

    @abstractmethod
    def _clear(self, slot: int) -> None: ...


class WeightSite(Site):
    """A module with a weight. A delta brings packed terms or a whole other weight, and new rows behind either."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        rows: int,
        columns: int,
        memory: RecordMemory | None = None,
    ) -> None:
        super().__init__(name, module, device)
        self.rows, self.columns = rows, columns
        self.table = GrowingTable(rows, columns, device, memory)
        self._weights: dict[int, torch.Tensor] = {}
        self._new_rows: dict[int, torch.Tensor] = {}

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        self.table.grow(slots)

    def growing(self) -> set[int]:
        """Return the slots that give the module another number of rows."""
        return set(self._new_rows)

    def _put_weight(self, slot: int, tensor: DeviceTensor) -> None:
        if tensor.terms:
            self.table.put(slot, tensor)
            if tensor.data is not None:
                self._new_rows[slot] = tensor.data
        elif tensor.data is not None:
            self._weights[slot] = tensor.data[: self.rows]
            if tensor.entry.rows > self.rows:
                self._new_rows[slot] = tensor.data[self.rows :]

    def _clear(self, slot: int) -> None:
        self.table.clear(slot)
        self._weights.pop(slot, None)
        self._new_rows.pop(slot, None)


class LinearSite(WeightSite):
    """A linear module, quantized or not.

    A delta brings packed terms or a whole other weight with the same columns, and perhaps another bias, whose
    difference to the base's is added. An output head with more rows than the base's gives more logits; rows of the
    batch whose delta lacks them get the dtype's lowest number there. It is as improbable as minus infinity, and
    differences of such logits (guidance, divergences) are numbers.

    Attributes:
        summed_bias: the base's bias, if it is added behind a sum over processes, and not by the module.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        rows: int,
        columns: int,
        memory: RecordMemory | None = None,
    ) -> None:
        super().__init__(name, module, device, rows, columns, memory)
        self.summed_bias: torch.Tensor | None = None
        self._totals: dict[int, int] = {}
        self._biases: dict[int, torch.Tensor] = {}

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        if "bias" in tensors:
            old = bias_of(self.module) if self.summed_bias is None else self.summed_bias
            assert old is not None
            old = old.detach().to(self.device)
            self._biases[slot] = new_values(tensors["bias"], old).float() - old.float()
        if "weight" in tensors:
            self._put_weight(slot, tensors["weight"])

    def _put_weight(self, slot: int, tensor: DeviceTensor) -> None:
        super()._put_weight(slot, tensor)
        if tensor.entry.rows != self.rows:
            self._totals[slot] = tensor.entry.rows

    def _clear(self, slot: int) -> None:
        super()._clear(slot)
        self._totals.pop(slot, None)
        self._biases.pop(slot, None)

    def growing(self) -> set[int]:
        """Return the slots that give the module another number of rows."""
        return super().growing() | self._totals.keys() if self._totals or self._new_rows else set()

    def only_multiplies(self, slot: int) -> bool:
        """Tell whether a slot's delta brings packed terms of the weight, and nothing else."""
        other = (self._weights, self._biases, self._totals, self._new_rows)
        return slot in self.table.slots and not any(slot in held for held in other)

    @property
    def multiplies_only(self) -> bool:
        """True if no delta brings a weight, a bias or rows of its own."""
        return not (self._weights or self._biases or self._totals or self._new_rows)

    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with the deltas' weights, products, biases and new logits."""
        if not isinstance(output, torch.Tensor):
            raise output_error(self, output)
        given = first_input(args, kwargs)
        order = self.order(selection, given, given.shape[:-1])
        x = given.to(output.dtype).reshape(-1, given.shape[-1])
        y = output.reshape(-1, output.shape[-1])
        for slot in selection.used & self._weights.keys():
            mine = order.members(slot)
            weight = self._weights[slot].to(x.dtype)
            bias = bias_of(self.module)
            bias = None if bias is None else bias[: len(weight)].to(x.dtype)
            y[mine, : len(weight)] = functional.linear(x[mine], weight, bias)
        if id(self) in selection.multiplied:
            selection.multiplied.discard(id(self))
        else:
            self._multiply(y, x, selection, order)
        if not selection.used.isdisjoint(self._biases):
            self._add_biases(y, selection, order)
        if not selection.used.isdisjoint(self._totals):
            y = self._widen(y, x, selection, order)
        return y.view(*output.shape[:-1], -1)

    def plain_weight(self, given: torch.Tensor) -> torch.Tensor | None:
        """Return the base's weight if the module does nothing but multiply ``given`` with it; otherwise None."""
        if not is_plain(self.module) or bias_of(self.module) is not None or self._weights:
            return None
        weight = self.module.weight
        plain = weight.dtype == given.dtype and weight.device == given.device and weight.is_contiguous()
        return weight if plain else None

    def _multiply(self, y: torch.Tensor, x: torch.Tensor, selection: Selection, order: Order) -> None:
        """Add the products of the packed terms."""
        if self.table.serves(selection):
            matmul_([y], x, self.table.operands, order.segments())

    def _add_biases(self, y: torch.Tensor, selection: Selection, order: Order) -> None:
        """Add to each token the difference between its delta's bias and the base's, in float32."""
        some = next(iter(self._biases.values()))
        slots = list(dict.fromkeys(selection.slots))

        def build() -> torch.Tensor:
            return torch.stack([self._biases.get(slot, torch.zeros_like(some)) for slot in slots])

        differences = selection.memo((id(self), "bias"), build)
        y[:, : some.shape[0]] += differences if order.uniform else differences[order.numbers(slots)]

    def _widen(self, y: torch.Tensor, x: torch.Tensor, selection: Selection, order: Order) -> torch.Tensor:
        """Return logits for the largest vocabulary among the selection's deltas."""
        width = max(self._totals.get(slot, self.rows) for slot in selection.slots)
        lowest = torch.finfo(y.dtype).min
        wide = y.new_full((len(y), width), lowest)
        shared = min(width, self.rows)
        wide[:, :shared] = y[:, :shared]
        for slot in selection.used & self._totals.keys():
            mine = order.members(slot)
            total = self._totals[slot]
            wide[mine, total:] = lowest
            if slot in self._new_rows:
                wide[mine, self.rows : total] = functional.linear(x[mine], self._new_rows[slot].to(x.dtype))
        return wide


class TransposedSite(LinearSite):
    """GPT-2's Conv1D, whose weight has the shape (in, out), where the kernels multiply with (out, in).

    The delta is decoded for every product, which is correct but slow.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        rows: int,
        columns: int,
        memory: RecordMemory | None = None,
    ) -> None:
        super().__init__(name, module, device, rows, columns, memory)
        self._terms: dict[int, DeviceTensor] = {}

    def _put_weight(self, slot: int, tensor: DeviceTensor) -> None:
        if tensor.terms:
            self._terms[slot] = tensor
        elif tensor.data is not None:
            self._weights[slot] = tensor.data.T

    def _clear(self, slot: int) -> None:
        super()._clear(slot)
        self._terms.pop(slot, None)

    def _multiply(self, y: torch.Tensor, x: torch.Tensor, selection: Selection, order: Order) -> None:
        for slot in selection.used & self._terms.keys():
            mine = order.members(slot)
            for operand in self._terms[slot].terms:
                y[mine] = (y[mine].float() + x[mine].float() @ operand_delta(operand)).to(y.dtype)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the input of a call to a module that has a single input."""
    given: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def output_error(site: Site, output: Any) -> UsageError:
    """Return the error for a module that gives something else than a tensor."""
    return UsageError(
        f"{site.name}, a {type(site.module).__name__}, gives {type(output).__name__}, which a delta cannot be added to"
    )


def refuse_gradient(name: str, output: Any) -> None:
    """Refuse an output that takes part in a gradient: the gradient would not pass through the delta.

    Raises:
        UsageError: the output requires a gradient.
    """
    if isinstance(output, torch.Tensor) and output.requires_grad:
        raise UsageError(f"{name} would compute a gradient, and deltas have none; run the model under torch.no_grad()")
