"""An embedding whose ids are the same for all rows of the batch, where the rows use several deltas.

Positions, and the buckets of T5's relative positions, are looked up once for all rows, and each delta gives other
values. The output then stands for one tensor a delta, with the form that the model expects. What the model does with it
alone is done to each of them. When it meets a tensor of the batch, it takes that tensor's rows: each row of the batch
has the values of its own delta from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from deltafmt.errors import UsageError
from deltafmt.runtime.call_rows import Walk
from deltafmt.runtime.owners import Owners, in_order, owners_along
from deltafmt.runtime.selection import BASE, Selection

_FORM = frozenset(("__get__", "size", "dim", "numel", "ndimension", "__len__", "is_floating_point", "stride"))


class PerRow(torch.Tensor):
    """One tensor for each slot, under the form of one of them.

    Args:
        walk: the call of the model.
        site: the site of the module that made it.
        where: the module's name, for messages.
        found: the tensors by slot.
    """

    _walk: Walk
    _site: object
    _where: str
    _found: dict[int, torch.Tensor]

    def __new__(cls, walk: Walk, site: object, where: str, found: dict[int, torch.Tensor]) -> Self:
        """Make a tensor without memory of its own."""
        some = next(iter(found.values()))
        made = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch has no other
            cls, some.shape, dtype=some.dtype, device=some.device
        )
        made.__dict__.update(_walk=walk, _site=site, _where=where, _found=found)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch on the tensors of all slots, or of all rows."""
        kwargs = kwargs or {}
        if func.__name__ in _FORM:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        mine = [one for one in _leaves((args, kwargs)) if isinstance(one, PerRow)]
        others = [one for one in _leaves((args, kwargs)) if not isinstance(one, PerRow)]
        first = mine[0]
        sources = {source for other in others if (source := first._source(other)) is not None}  # noqa: SLF001
        if len(sources) > 1:
            raise first._refused("tensors with different rows")  # noqa: SLF001
        if sources:
            size, source = max(other.dim() for other in others), sources.pop()
            args, kwargs = _replaced((args, kwargs), lambda one: one._rows(size, source))  # noqa: SLF001
            return func(*args, **kwargs)
        found = {}
        for slot in first._found:  # noqa: SLF001
            given, options = _replaced((args, kwargs), lambda one: one._found[slot])  # noqa: B023, SLF001 - used at once
            found[slot] = func(*given, **options)
        if not all(isinstance(one, torch.Tensor) for one in found.values()):
            raise first._refused(func.__name__)  # noqa: SLF001
        return cls(first._walk, first._site, first._where, found)  # noqa: SLF001

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse what does not go through the functions of torch."""
        raise next(one for one in _leaves((args, kwargs)) if isinstance(one, PerRow))._refused(str(func))  # noqa: SLF001

    def _source(self, other: torch.Tensor) -> int | None:
        """Return the source whose items a tensor that this one meets has in its first dimension; None if it has none.

        Raises:
            UsageError: its rows stand elsewhere.
        """
        walk = self._walk
        if walk.follower is None:  # as it was when a call of this form was followed
            source = walk.met(self._site)
            if source is None or other.dim() < self.dim() or other.shape[0] != len(walk.slots[source]):
                return None
            return source
        owners = walk.follower.owners(other)
        if owners is None:
            if other.dim() >= self.dim() and other.shape[0] != 1:
                walk.unsteady()
            return None
        if isinstance(owners, Owners):
            dim, line = owners.line()
            count = len(walk.slots[owners.source])
            if count == 1 and dim is None and not bool(line.any()) and other.shape[0] == 1:
                dim = 0
            if dim == 0 and other.dim() >= self.dim() and len(line) == count and in_order(line, count):
                walk.meet(self._site, owners.source)
                return owners.source
        raise self._refused("a tensor whose rows are not the batch's")

    def _refused(self, what: str) -> UsageError:
        return UsageError(
            f"{self._where} is looked up for all rows of the batch at once, and meets {what}; such a model serves one "
            "delta at a time"
        )

    def _rows(self, dims: int, source: int) -> torch.Tensor:
        """Return the tensor with the batch's rows first, to be broadcast to ``dims`` dimensions."""
        slots = self._walk.slots[source].tolist()
        places = {slot: place for place, slot in enumerate(self._found)}
        numbers = torch.tensor([places[slot] for slot in slots], device=self.device)
        stacked = torch.stack(list(self._found.values()))
        shape = stacked.shape[1:]
        if len(shape) < dims:
            rows = stacked[numbers].view(len(slots), *[1] * (dims - 1 - len(shape)), *shape)
        elif shape[0] == 1:
            rows = stacked[numbers, 0]
        elif shape[0] == len(slots):
            rows = stacked[numbers, torch.arange(len(slots), device=self.device)]
        else:
            raise self._refused("a tensor of another form")
        if self._walk.follower is not None:
            owners = owners_along(rows.shape, 0, torch.arange(len(slots), device="cpu"))
            self._walk.follower.mark(rows, Owners(owners.items, source, rows=self._walk.rows[source]))
        return rows


def per_row(
    site: object,
    where: str,
    selection: Selection,
    base: torch.Tensor,
    changed: set[int],
    run: Callable[[int], torch.Tensor],
) -> PerRow:
    """Return a module's output for ids that are the same for all rows.

    Args:
        site: the module's site.
        where: the module's name.
        selection: the rows of the batch.
        base: the base's output.
        changed: the slots whose deltas change the module.
        run: a function that returns the output with one slot's delta.
    """
    assert selection.walk is not None
    alone = {slot: run(slot) for slot in selection.touched & changed}
    found = {}
    for slot in dict.fromkeys(selection.slots):
        if slot >= 0:
            found[slot] = alone.get(slot, base)
        elif slot == BASE:
            found[slot] = base
        else:
            total = base.float()
            for one, weight in selection.mixes[slot]:
                if one in alone:
                    total = total + weight * (alone[one].float() - base.float())
            found[slot] = total.to(base.dtype)
    return PerRow(selection.walk, site, where, found)


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [one for part in value for one in _leaves(part)]
    if isinstance(value, Mapping):
        return [one for part in value.values() for one in _leaves(part)]
    return []


def _replaced(value: Any, replace: Callable[[PerRow], Any]) -> Any:
    if isinstance(value, PerRow):
        return replace(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(one, replace) for one in value)
    if isinstance(value, dict):
        return {key: _replaced(one, replace) for key, one in value.items()}
    return value
