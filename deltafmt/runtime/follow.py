"""Following the rows of a batch through a model: which row each part of every tensor was computed from.

A torch mode sees every operation of a call. It carries the owners (:mod:`deltafmt.runtime.owners`) from an operation's
inputs to its outputs. A tensor that depends on no row (a weight, a table of positions) has no owners. Where an
operation is not known, or mixes the rows, the owners are lost, and so are those of all that is computed from it.

This is slow, so it is done for the first call of each form; :mod:`deltafmt.runtime.row_places` keeps what it found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deltafmt.runtime.follow_moves import pointwise
from deltafmt.runtime.follow_rules import RULES
from deltafmt.runtime.follow_seen import NO_ROWS, Rule, Seen, name_of, tensors_in
from deltafmt.runtime.owners import LOST, Found, Owners, joined

_NAME: Final = "_deltafmt_owners"
_VIEWED: Final = "_deltafmt_viewed"


def _each(tensor: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Return the values of a tensor that has one for each delta (:mod:`deltafmt.runtime.per_delta`)."""
    found: tuple[torch.Tensor, ...] | None = getattr(tensor, "each", None)
    return found


def _alike(told: Sequence[Found]) -> Found:
    """Return owners that are the same for every delta; LOST where they are not."""
    first = told[0]
    for other in told[1:]:
        if isinstance(first, Owners) and isinstance(other, Owners):
            if first.source != other.source or not torch.equal(first.items, other.items):
                return LOST
        elif other is not first:
            return LOST
    return first


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A torch mode that follows the rows of one call."""

    def mark(self, tensor: torch.Tensor, owners: Found) -> None:
        """Give a tensor its owners."""
        if owners is not None or getattr(tensor, _NAME, None) is not None:
            with contextlib.suppress(AttributeError):
                setattr(tensor, _NAME, (self, owners))
        for part in _parts(tensor):
            self.mark(part, _resized(owners, part.shape))

    def owners(self, tensor: torch.Tensor) -> Found:
        """Return the owners of a tensor; None if it depends on no row."""
        found = getattr(tensor, _NAME, None)
        if found is not None and found[0] is self:
            owners: Found = found[1]
            return owners
        for part in _parts(tensor):
            return _resized(self.owners(part), tensor.shape)
        return None

    def same_rows(self, made: Any, given: torch.Tensor) -> None:
        """Give a module's new output the owners of its old one; the last dimension may differ."""
        if not isinstance(made, torch.Tensor) or made is given:
            return
        owners = self.owners(given)
        if isinstance(owners, Owners):
            if made.shape[:-1] == given.shape[:-1]:
                owners = owners.having(owners.items[..., :1].expand(made.shape))
            else:
                owners = LOST
        self.mark(made, owners)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        rule = RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        given = [self.owners(tensor) for tensor in tensors_in((args, kwargs))]
        if rule is None and any(given) and name not in NO_ROWS and func._can_decompose():  # noqa: SLF001
            with self:
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        changed = tensors_in(output)
        if not any(found is not None for found in given):
            for tensor in changed:
                self.mark(tensor, None)
            return output
        if name in NO_ROWS:
            found: Any = None
        elif rule is None:
            found = LOST
        else:
            found = self._ruled(rule, func, args, kwargs, changed)
        for number, tensor in enumerate(changed):
            one = found[number] if isinstance(found, tuple) else found
            self.mark(tensor, one)
            if func._schema.is_mutable:  # noqa: SLF001 - torch has no public name for it
                self._write_back(tensor, one)
        if changed and name in ("slice", "select") and isinstance(args[0], torch.Tensor):
            setattr(changed[0], _VIEWED, (self, args[0], name, args[1] if len(args) > 1 else 0, args[2:]))
        return output

    def _ruled(self, rule: Rule, func: Any, args: Any, kwargs: Any, changed: list[torch.Tensor]) -> Any:
        """Return what a rule says of an operation; of values per delta, what it says of all of them alike."""
        tensors = [*tensors_in((args, kwargs)), *changed]
        count = max((len(each) for tensor in tensors if (each := _each(tensor)) is not None), default=0)
        if not count:
            return rule(Seen(self.owners, func, args, kwargs, changed))
        told: list[Any] = []
        for number in range(count):
            one = pytree.tree_map_only(torch.Tensor, lambda tensor: self._one(tensor, number), (args, kwargs, changed))  # noqa: B023
            told.append(rule(Seen(self.owners, func, *one)))
        first = told[0]
        if isinstance(first, tuple):
            return tuple(_alike(found) for found in zip(*told, strict=True))
        return _alike(told)

    def _one(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """Return one delta's value of a tensor that has several, with the tensor's owners."""
        each = _each(tensor)
        if each is None:
            return tensor
        self.mark(each[number], self.owners(tensor))
        return each[number]

    def _write_back(self, view: torch.Tensor, owners: Found) -> None:
        """Tell the tensor that a changed view shows a part of."""
        link = getattr(view, _VIEWED, None)
        if link is None or link[0] is not self or owners is None or not view.numel():
            return
        _, base, kind, dim, _ = link
        dim %= base.dim()
        before = self.owners(base)
        after: Found = LOST
        if isinstance(owners, Owners) and before is not LOST:
            items = owners.items.unsqueeze(dim) if kind == "select" else owners.items
            if not items.stride(dim) or items.size(dim) == 1:
                whole = items.narrow(dim, 0, 1).expand(base.shape)
                after = owners.having(whole)
                if isinstance(before, Owners):
                    after = joined([after, before], base.shape)
        self.mark(base, after)
        self._write_back(base, after)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what a tensor that stands for others holds: one that is cut over processes holds a cut.

    Such a tensor is put around the others, and taken off, without an operation.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def _resized(owners: Found, shape: torch.Size) -> Found:
    """Return the owners of a tensor that is cut in the other dimensions alone; otherwise they are lost."""
    if not isinstance(owners, Owners) or owners.items.shape == shape:
        return owners
    dim, line = owners.line()
    if len(shape) != owners.items.dim() or shape[dim or 0] != owners.items.shape[dim or 0]:
        return LOST
    return owners.having(line.view([-1 if place == dim else 1 for place in range(len(shape))]).expand(shape))
