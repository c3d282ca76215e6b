"""How deltas are added to the outputs of embeddings and of small innermost modules such as norms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltafmt.errors import UsageError
from deltafmt.kernels.products import embedding_
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.selection import Selection, mixed_error
from deltafmt.runtime.sites import Site, WeightSite, first_input
from deltafmt.runtime.values import new_values


class EmbeddingSite(WeightSite):
    """An embedding.

    Its weight takes packed terms, another weight, and new rows. A module that does more than look up (scales the rows,
    or works out the numbers itself) runs again, with the deltas added to what its look-up gives.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device, rows: int, columns: int) -> None:
        super().__init__(name, module, device, rows, columns)
        self._plain = type(module).forward is nn.Embedding.forward

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        self._put_weight(slot, tensors["weight"])

    def before(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the base's look-up within its rows, where a delta has more of them."""
        grown = selection.used & self._new_rows.keys()
        if not grown:
            return None
        ids = first_input(args, kwargs)
        selection.stash[id(self)] = ids
        held = ids.clamp(max=self.rows - 1)
        if not selection.uniform:
            flat = ids.reshape(-1).clone()
            for slot in grown:
                mine = selection.members(slot, len(flat), self.name)
                flat[mine] = held.reshape(-1)[mine]
            held = flat.view(ids.shape)
        return ((held, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): held})

    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with the deltas' rows."""
        asked = selection.stash.pop(id(self), None)
        if self._plain:
            ids = asked if asked is not None else first_input(args, kwargs)
            return self._look_up(selection, ids, output)
        if asked is not None:
            raise UsageError(f"{self.name}, a {type(self.module).__name__}, cannot take the new rows of a delta")
        with _LookUps(self, selection):
            return type(self.module).forward(self.module, *args, **kwargs)

    def _look_up(self, selection: Selection, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not selection.uniform:
            ids, output = self._by_row(selection, ids, output)
        flat = ids.reshape(-1)
        y = output.reshape(len(flat), -1)
        for slot in selection.used & self._weights.keys():
            mine = selection.members(slot, len(flat), self.name)
            # An id beyond these rows is one of the new rows, which follow.
            held = flat[mine].clamp(max=len(self._weights[slot]) - 1) if slot in self._new_rows else flat[mine]
            y[mine] = functional.embedding(held, self._weights[slot]).to(y.dtype)
        if self.table.serves(selection):
            embedding_(y, flat, self.table.operands, selection.segments(len(flat), self.name))
        for slot in selection.used & self._new_rows.keys():
            mine = selection.members(slot, len(flat), self.name)
            beyond = flat[mine] - self.rows
            rows = functional.embedding(beyond.clamp(min=0), self._new_rows[slot])
            y[mine] = torch.where((beyond >= 0)[:, None], rows.to(y.dtype), y[mine])
        return y.view(output.shape)

    def _by_row(
        self, selection: Selection, ids: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and output with one row for each row of the batch; positions often come as one row for all.

        Raises:
            UsageError: it cannot be told which id belongs to which row.
        """
        relative = "relative" in self.name.rpartition(".")[2]
        if ids.dim() > 1 and ids.shape[0] == 1 and selection.rows and not relative:
            rows = selection.rows
            return ids.expand(rows, *ids.shape[1:]), output.expand(rows, *output.shape[1:]).contiguous()
        flat = ids.dim() == 1 and ids.shape[0] == selection.tokens
        if relative or not (flat or (ids.dim() > 1 and ids.shape[0] in (selection.rows, selection.tokens))):
            raise mixed_error(self.name, ids.shape)
        return ids, output


class _LookUps(TorchFunctionMode):
    """Add deltas to the look-ups in a module's weight."""

    def __init__(self, site: EmbeddingSite, selection: Selection) -> None:
        super().__init__()
        self._site = site
        self._selection = selection

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.embedding and len(args) > 1 and args[1] is self._site.module.weight:
            return self._site._look_up(self._selection, args[0], output)  # noqa: SLF001 - the two are one thing
        return output


class OtherSite(Site):
    """An innermost module of another kind: it runs on the delta's own parameters.

    With one delta for all rows it runs once. Otherwise it runs once for each, on its rows; or, if it is an RMSNorm
    written in torch operations, which multiplies with its weight, once for all with a weight for each row.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        super().__init__(name, module, device)
        self._values: dict[int, dict[str, torch.Tensor]] = {}
        self._twins: dict[int, nn.Module] = {}
        self._by_row = type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm)

    def grow(self, slots: int) -> None:
        """Do nothing: any number has room."""

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        base = dict(self.module.named_parameters(recurse=False))
        values = {key: new_values(tensor, base[key].detach().to(self.device)) for key, tensor in tensors.items()}
        self._values[slot], self._twins[slot] = values, self._twin(values)

    def _clear(self, slot: int) -> None:
        del self._values[slot], self._twins[slot]

    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output that the deltas' parameters give."""
        if not isinstance(output, torch.Tensor):
            kind = type(self.module).__name__
            raise UsageError(f"{self.name}, a {kind}, gives {type(output).__name__}, which a delta cannot be added to")
        if selection.uniform:
            return _run(self._twins[selection.slots[0]], args, kwargs)
        rows = output.shape[0]
        selection.check(output.shape, self.name)
        if self._by_row:
            found = _run(self._spread(selection, rows, output.dim()), args, kwargs)
            if found.shape == output.shape:
                return found
        output = output.clone()
        for slot in selection.used & self._values.keys():
            mine = selection.members(slot, rows, self.name)
            picked = [_pick(value, rows, mine) for value in args]
            named = {key: _pick(value, rows, mine) for key, value in kwargs.items()}
            output[mine] = _run(self._twins[slot], tuple(picked), named)
        return output

    def _twin(self, values: Mapping[str, torch.Tensor]) -> nn.Module:
        """Return the module with other parameters; the two share the rest."""
        twin = copy.copy(self.module)
        twin.__dict__["_parameters"] = {**dict(self.module.named_parameters(recurse=False)), **values}
        return twin

    def _spread(self, selection: Selection, rows: int, dimensions: int) -> nn.Module:
        """Return the module with parameters for each row, shape (rows, 1, ..., size)."""

        def build() -> nn.Module:
            each = selection.share(rows, self.name)
            spread = {}
            for key, base in self.module.named_parameters(recurse=False):
                own = [self._values.get(slot, {}).get(key, base) for slot in selection.slots]
                stacked = torch.stack([value.to(self.device) for value in own]).repeat_interleave(each, 0)
                spread[key] = stacked.view(rows, *[1] * (dimensions - 1 - base.dim()), *base.shape)
            return self._twin(spread)

        return selection.memo((id(self), "rows", rows, dimensions), build)


def _run(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module without its hooks."""
    return type(twin).forward(twin, *args, **kwargs)


def _pick(value: Any, rows: int, mine: torch.Tensor | slice) -> Any:
    """Return the rows of an argument that has as many as the batch."""
    return value[mine] if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows else value
