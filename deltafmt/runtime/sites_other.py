"""Sites of embeddings, and of other innermost modules such as norms."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltafmt.errors import UsageError
from deltafmt.kernels.products import embedding_
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.selection import Selection, mixed_error
from deltafmt.runtime.sites import Site, WeightSite, first_input
from deltafmt.runtime.values import new_values

_KEPT_ROWS = 1024  # a weight for each row is kept for the next call up to this many rows


class EmbeddingSite(WeightSite):
    """An embedding.

    A delta brings packed terms or a whole other weight, and new rows. A module that does more than look up rows (it
    scales them, or computes the row numbers itself) runs a second time, and the deltas are added inside its look-up.
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

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        self._put_weight(slot, tensors["weight"])

    def before(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Clamp the ids of new rows, which the base lacks, so that the base's look-up does not fail."""
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
            raise UsageError(f"{self.name}, a {type(self.module).__name__}, cannot serve the new rows of a delta")
        with _LookUps(self, selection):
            return type(self.module).forward(self.module, *args, **kwargs)

    def _look_up(self, selection: Selection, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not selection.uniform:
            ids, output = self.by_row(selection, ids, output)
        flat = ids.reshape(-1)
        y = output.reshape(len(flat), -1)
        for slot in selection.used & self._weights.keys():
            mine = selection.members(slot, len(flat), self.name)
            # An id beyond these rows belongs to a new row; its values are set below.
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

    def by_row(
        self, selection: Selection, ids: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and output with one row for each row of the batch; positions often have a single row for all.

        Raises:
            UsageError: the ids do not tell which of them belongs to which row of the batch.
        """
        relative = "relative" in self.name.rpartition(".")[2]
        if ids.dim() > 1 and ids.shape[0] == 1 and selection.rows and not (relative or selection.packed):
            rows = selection.rows
            return ids.expand(rows, *ids.shape[1:]), output.expand(rows, *output.shape[1:]).contiguous()
        flat = ids.dim() == 1 and ids.shape[0] == selection.tokens
        if relative or not (flat or (ids.dim() > 1 and ids.shape[0] in (selection.rows, selection.tokens))):
            raise mixed_error(self.name, ids.shape)
        if selection.packed:
            selection.check(ids.shape, self.name)
        return ids, output


class _LookUps(TorchFunctionMode):
    """A torch mode that adds the deltas to every look-up in a module's weight."""

    def __init__(self, site: EmbeddingSite, selection: Selection) -> None:
        super().__init__()
        self._site = site
        self._selection = selection

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.embedding and len(args) > 1 and args[1] is self._site.module.weight:
            return self._site._look_up(self._selection, args[0], output)  # noqa: SLF001 - this class is part of the site
        return output


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
        self.linear = type(module).__name__.endswith("Norm") or isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001

    def grow(self, slots: int) -> None:
        """Do nothing: there is room for any number of slots."""

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:
        base = dict(self.module.named_parameters(recurse=False))
        values = {key: new_values(tensor, base[key].detach().to(self.device)) for key, tensor in tensors.items()}
        self._values[slot], self._twins[slot] = values, self._twin(values)

    def _clear(self, slot: int) -> None:
        del self._values[slot], self._twins[slot]

    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output that the module gives with the deltas' parameters."""
        if not isinstance(output, torch.Tensor):
            module_type = type(self.module).__name__
            raise UsageError(
                f"{self.name}, a {module_type}, gives {type(output).__name__}, which a delta cannot be added to"
            )
        if selection.uniform:
            return _run(self._twins[selection.slots[0]], args, kwargs)
        if selection.packed and self.turned(selection, first_input(args, kwargs)):
            args, kwargs = each(turn, args, kwargs)
            return turn(self.after(selection, args, kwargs, turn(output)))
        selection.check(output.shape, self.name)
        if selection.packed and output.shape[0] != selection.tokens:
            # (1, tokens, ...): each token is a row of its own.
            row = functools.partial(_row, selection.tokens)
            args, kwargs = each(row, args, kwargs)
            return self._by_rows(selection, args, kwargs, output[0])[None]
        return self._by_rows(selection, args, kwargs, output)

    def turned(self, selection: Selection, given: torch.Tensor) -> bool:
        """Tell whether a norm of a packed batch is given (1, heads, tokens, size), a view of (1, tokens, heads, size).

        A norm works on the last dimension alone, so it may be given the one for the other.
        """
        if not type(self.module).__name__.endswith("Norm") or given.dim() != 4 or given.shape[0] != 1:
            return False
        heads, tokens = given.shape[1:3]
        return tokens == selection.tokens and (heads != tokens or given.stride(1) < given.stride(2))

    def _by_rows(
        self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        """Return the output for rows that use several deltas."""
        rows = output.shape[0]
        if self._by_row:
            found: torch.Tensor = _run(self._spread(selection, rows, output.dim()), args, kwargs)
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
        """Return a copy of the module with other parameters; everything else is shared with the module."""
        twin = copy.copy(self.module)
        # With the names whose parameter is None, such as the bias of torch.nn.LayerNorm(bias=False).
        twin.__dict__["_parameters"] = {**self.module.__dict__["_parameters"], **values}
        return twin

    def _spread(self, selection: Selection, rows: int, dimensions: int) -> nn.Module:
        """Return a copy of the module whose parameters have a row for each row of the batch: (rows, 1, ..., size)."""

        def build() -> nn.Module:
            spread = {}
            for key, base in self.module.named_parameters(recurse=False):
                values = selection.spread(stacked(key, base), rows, self.name)
                spread[key] = values.view(rows, *[1] * (dimensions - 1 - base.dim()), *base.shape)
            return self._twin(spread)

        def stacked(key: str, base: torch.Tensor) -> torch.Tensor:
            own = [self._values.get(slot, {}).get(key, base) for slot in selection.slots]
            return torch.stack([value.to(self.device) for value in own])

        if rows > _KEPT_ROWS:
            return build()
        return selection.memo((id(self), "rows", rows, dimensions), build)


def _run(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module without its hooks."""
    return type(twin).forward(twin, *args, **kwargs)


def each(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, each of them changed."""
    return tuple(map(change, args)), {key: change(value) for key, value in kwargs.items()}


def turn(value: Any) -> Any:
    """Exchange heads and tokens of a tensor that has both; any other argument stays as it is."""
    return value.transpose(1, 2) if isinstance(value, torch.Tensor) and value.dim() == 4 else value


def _row(tokens: int, value: Any) -> Any:
    """Return the only row of an argument of the shape (1, tokens, ...); any other argument as it is."""
    return value[0] if isinstance(value, torch.Tensor) and value.shape[:2] == (1, tokens) else value


def _pick(value: Any, rows: int, mine: torch.Tensor | slice) -> Any:
    """Return some rows of an argument if it has as many rows as the batch; otherwise the argument itself."""
    return value[mine] if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows else value
