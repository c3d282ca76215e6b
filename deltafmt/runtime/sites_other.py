"""Sites of embeddings, and of other innermost modules such as norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltafmt.errors import UsageError
from deltafmt.kernels.products import embedding_
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.runtime.binding import held_tensor
from deltafmt.runtime.call_rows import mixed_error
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.orders import Order
from deltafmt.runtime.per_row import per_row
from deltafmt.runtime.row_places import LOOKED_UP, OUTPUT
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.shape_queries import function_name, lends_form
from deltafmt.runtime.sites import Site, WeightSite, first_input, output_error
from deltafmt.runtime.substituted import SubstitutedSite, refreshed, refuse_training, twin_of
from deltafmt.runtime.values import new_values

_KEPT_ROWS = 1024  # a weight for each row is kept for the next call up to this many rows


class EmbeddingSite(WeightSite):
    """An embedding.

    A delta brings packed terms or a whole other weight, and new rows. A module that does more than look up rows (it
    scales them, or computes the row numbers itself) runs a second time, and the deltas are added inside its look-up.
    One that indexes its weight instead runs with the deltas' values.
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
        self._plain = type(module).forward is nn.Embedding.forward
        self._direct = SubstitutedSite(name, module, device)

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        self._put_weight(slot, tensors["weight"])
        if not self._plain:
            self._direct.put(slot, tensors)

    def _clear(self, slot: int) -> None:
        super()._clear(slot)
        self._direct.clear(slot)

    def before(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Clamp the ids of new rows, which the base lacks, so that the base's look-up does not fail."""
        grown = selection.used & self._new_rows.keys()
        if not grown:
            return None
        ids = first_input(args, kwargs)
        selection.stash[id(self)] = ids
        held = ids.clamp(max=self.rows - 1)
        if not selection.uniform:
            order = selection.order(self, 0, ids, ids.shape, self.name)
            if order is not None:
                flat = ids.reshape(-1).clone()
                for slot in grown:
                    mine = order.members(slot)
                    flat[mine] = held.reshape(-1)[mine]
                held = flat.view(ids.shape)
        return ((held, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): held})

    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with the deltas' rows."""
        asked = selection.stash.pop(id(self), None)
        if self._plain:
            ids = asked if asked is not None else first_input(args, kwargs)
            if selection.walk is not None:
                selection.walk.note_tensor(self, LOOKED_UP, ids)
            return self._look_up(selection, ids, output)
        if asked is not None:
            raise UsageError(f"{self.name}, a {type(self.module).__name__}, cannot serve the new rows of a delta")
        look_ups = _LookUps(self, selection)
        with look_ups:
            found = type(self.module).forward(self.module, *args, **kwargs)
        if look_ups.found and not look_ups.otherwise:
            return found
        return self._direct.run(selection, args, kwargs)

    def _look_up(self, selection: Selection, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        order = selection.order(self, LOOKED_UP, ids, ids.shape, self.name)
        if order is None:
            return per_row(
                self,
                self.name,
                selection,
                output,
                self.slots,
                lambda slot: self._look_up(selection.alone(slot), ids, output.clone()),
            )
        flat = ids.reshape(-1)
        y = output.reshape(len(flat), -1)
        for slot in selection.used & self._weights.keys():
            mine = order.members(slot)
            # An id beyond these rows belongs to a new row; its values are set below.
            held = flat[mine].clamp(max=len(self._weights[slot]) - 1) if slot in self._new_rows else flat[mine]
            y[mine] = functional.embedding(held, self._weights[slot]).to(y.dtype)
        if self.table.serves(selection):
            embedding_(y, flat, self.table.operands, order.segments())
        for slot in selection.used & self._new_rows.keys():
            mine = order.members(slot)
            beyond = flat[mine] - self.rows
            rows = functional.embedding(beyond.clamp(min=0), self._new_rows[slot])
            y[mine] = torch.where((beyond >= 0)[:, None], rows.to(y.dtype), y[mine])
        return y.view(output.shape)


class _LookUps(TorchFunctionMode):
    """A torch mode that adds the deltas to every look-up in a module's weight.

    Attributes:
        found: True if there was a look-up.
        otherwise: True if the module computed with its weight in another way.
    """

    def __init__(self, site: EmbeddingSite, selection: Selection) -> None:
        super().__init__()
        self.found = self.otherwise = False
        self._site = site
        self._selection = selection

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        weight = self._site.module.weight
        if func is functional.embedding and len(args) > 1 and args[1] is weight:
            return self._changed(args[0], output)
        if func is torch.Tensor.__getitem__ and args[0] is weight:
            ids = args[1]
            if isinstance(ids, slice):
                ids = torch.arange(len(weight), device=weight.device)[ids]
            if isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool:
                return self._changed(ids, output)
        given: tuple[tuple[int | str, Any], ...] = (*enumerate(args), *kwargs.items())
        if any(one is weight and not lends_form(function_name(func), place) for place, one in given):
            self.otherwise = True
        return output

    def _changed(self, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        self.found = True
        if self._selection.walk is not None:
            self._selection.walk.note_tensor(self._site, LOOKED_UP, ids)
        # Rows that were sliced off the weight are the weight's own memory.
        return self._site._look_up(self._selection, ids, output.clone())  # noqa: SLF001 - this class is part of the site


class OtherSite(Site):
    """Another innermost module, such as a norm: it runs with the delta's own parameters.

    With one delta for all rows it runs once. With several deltas it runs once for each of them, on the delta's rows. An
    RMSNorm that is written in torch operations multiplies with its weight; it runs once, with a weight for each row.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        super().__init__(name, module, device)
        # Whether the output is a sum with the parameters as factors, so that weights of deltas apply to it.
        self._values: dict[int, dict[str, torch.Tensor]] = {}
        self._twins: dict[int, nn.Module] = {}
        self._by_row = type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm)
        self._norm = type(module).__name__.endswith("Norm")
        self.linear = self._norm or isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001

    def grow(self, slots: int) -> None:
        """Do nothing: there is room for any number of slots."""

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        values = {}
        for key, tensor in tensors.items():
            base = held_tensor(self.module, key)
            assert base is not None
            values[key] = new_values(tensor, base.detach().to(self.device))
        self._values[slot], self._twins[slot] = values, twin_of(self.module, values)

    def _clear(self, slot: int) -> None:
        self._values.pop(slot, None)
        self._twins.pop(slot, None)

    def order(self, selection: Selection, given: torch.Tensor, shape: Sequence[int], number: int = 0) -> Order:
        """Return the order of the deltas in a tensor; see :meth:`Site.order`.

        Raises:
            UsageError: as there; or the batch is packed, and the module may compute a token from others.
        """
        if selection.packed and not self._norm:
            raise mixed_error(self.name, given.shape)
        return super().order(selection, given, shape, number)

    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output that the module gives with the deltas' parameters."""
        if not isinstance(output, torch.Tensor):
            raise output_error(self, output)
        refuse_training(self.name, self.module, (key for values in self._values.values() for key in values))
        if selection.uniform:
            return _run(self._twin(selection.slots[0]), args, kwargs)
        order = self.order(selection, output, output.shape[:-1], OUTPUT)
        if self._by_row:
            found = _run(refreshed(self._spread(selection, order, output.dim()), self.module), args, kwargs)
            if found.shape == output.shape:
                return found
        # The arguments that have rows of the batch, each with its own order.
        orders = {
            number: selection.order(self, number, value, value.shape, self.name)
            for number, value in enumerate((*args, *kwargs.values()))
            if isinstance(value, torch.Tensor)
        }
        output = output.clone()
        for slot in selection.used & self._values.keys():
            mine = [_pick(value, orders.get(number), slot) for number, value in enumerate((*args, *kwargs.values()))]
            named = dict(zip(kwargs, mine[len(args) :], strict=True))
            found = _run(self._twin(slot), tuple(mine[: len(args)]), named)
            output.index_copy_(order.dim, order.along(slot), found)
        return output

    def _twin(self, slot: int) -> nn.Module:
        return refreshed(self._twins[slot], self.module)

    def _spread(self, selection: Selection, order: Order, dimensions: int) -> nn.Module:
        """Return a copy of the module whose parameters have a row for each row of the batch: (rows, 1, ..., size)."""

        def build() -> nn.Module:
            slots = list(dict.fromkeys(selection.slots))
            numbers = torch.tensor([slots.index(slot) for slot in order.line.tolist()], device=self.device)
            spread = {}
            for key, base in self.module.named_parameters(recurse=False):
                own = [self._values.get(slot, {}).get(key, base).to(self.device) for slot in slots]
                form = [-1 if dim == order.dim else 1 for dim in range(dimensions - base.dim())]
                spread[key] = torch.stack(own)[numbers].view(*form, *base.shape)
            return twin_of(self.module, spread)

        if len(order.line) > _KEPT_ROWS:
            return build()
        return order.memo((id(self), dimensions), build)


def adds_up(module: nn.Module) -> bool:
    """Tell whether a module is one whose rows do not depend on each other: of torch's own, or a norm."""
    kind = type(module)
    known = kind.__module__.startswith("torch.nn.") or kind.__name__.endswith("Norm")
    return known and next(module.children(), None) is None and not isinstance(module, nn.RNNBase)


def _run(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module without its hooks."""
    return type(twin).forward(twin, *args, **kwargs)


def _pick(value: Any, order: Order | None, slot: int) -> Any:
    """Return a slot's rows of an argument; the argument itself if it depends on no row of the batch."""
    return value if order is None else value.index_select(order.dim, order.along(slot))
