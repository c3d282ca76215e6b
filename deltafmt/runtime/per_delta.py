"""Tensors of which each delta of a mixed batch has its own: a parameter that a module reads, and what follows from it.

A module that computes with parameters in a way of its own (a router, the decay of a state-space layer, the sinks of an
attention) is given :class:`PerDelta` tensors in their place. A torch operation on them runs once for each delta, on all
rows of the batch; what comes out is per delta again. Each delta's rows are taken from its own values where the batch
is known to come first: in the module's output, in the input of an inner module that is served, and in a tensor that is
written in place, such as a cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from deltafmt.errors import UsageError
from deltafmt.runtime.call_rows import mixed_error
from deltafmt.runtime.orders import Order
from deltafmt.runtime.row_places import MERGED
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.shape_queries import NEW_TENSORS


class Group:
    """The values of one selection, per delta: one for each of its slots.

    Args:
        selection: the rows.

    Attributes:
        slots: the slots; the base's and those of sums are among them.
        where: what is running, for messages.
        site: the site that is running, or what stands for the model.
    """

    def __init__(self, selection: Selection) -> None:
        self.slots = tuple(dict.fromkeys(selection.slots))
        self.where = "the model"
        self.site: object = Group
        self._selection = selection
        self._alive: dict[int, weakref.ref[PerDelta]] = {}

    def note(self, made: PerDelta) -> None:
        """Remember a tensor for as long as it lives."""
        number = id(made)
        alive = self._alive
        alive[number] = weakref.ref(made, lambda _: alive.pop(number, None))

    def alive(self) -> set[int]:
        """Return what tells the tensors that live now from others."""
        return set(self._alive)

    def refuse_kept(self, before: set[int]) -> None:
        """Refuse tensors that outlive the run of a module, because somebody would go on computing with them.

        Args:
            before: those that lived before the run.

        Raises:
            UsageError: names the module.
        """
        if not before.issuperset(self._alive):
            raise UsageError(
                f"{self.where} keeps what it made of a delta's parameters for later calls; such a model serves one "
                "delta at a time"
            )

    def of(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a tensor with a value for each slot."""
        return PerDelta(values, self)

    def merged(self, value: PerDelta) -> torch.Tensor:
        """Return a tensor in which each row has its own delta's values.

        Raises:
            UsageError: whose rows these are cannot be told.
        """
        order = self._order([value])
        if order is None:
            raise mixed_error(self.where, value.shape)
        return self._merged(value, order)

    def merged_if_rows(self, value: PerDelta) -> torch.Tensor:
        """Return the same, or the value itself if it depends on no row of the batch.

        Raises:
            UsageError: whose rows these are cannot be told.
        """
        order = self._order([value])
        return value if order is None else self._merged(value, order)

    def _merged(self, value: PerDelta, order: Order) -> torch.Tensor:
        found = torch.empty_like(value.each[0])
        self._write(value.each, found, order)
        walk = self._selection.walk
        if walk is not None and walk.follower is not None:
            walk.follower.mark(found, walk.follower.owners(value))
        return found

    def each(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module once for each slot, with the slot's values; what depends on no row has no other way.

        It is called in a hook before the module's forward. That run is the first slot's; the other slots' come before
        it, and a hook behind all others gives the module the output of all.

        Returns:
            What the hook returns: the input of the run that follows.

        Raises:
            UsageError: the module is called outside of a call of its model.
        """
        call = self._selection.call
        if call is None or not call.bound:
            raise mixed_error(self.where, next(leaf.shape for leaf in _values((args, kwargs))))
        before, thread = call.selection, threading.get_ident()
        try:
            others = []
            for number, slot in enumerate(self.slots[1:], 1):
                call.selection = self._selection.alone(slot)
                others.append(module(*_chosen(args, number), **_chosen(kwargs, number)))
        except BaseException:
            call.selection = before
            raise
        call.selection = self._selection.alone(self.slots[0])

        def end(_module: nn.Module, _args: object, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            handle.remove()
            call.selection = before
            return None if output is None else self._marked(_joined([output, *others], self))

        handle = module.register_forward_hook(end, always_call=True)
        return _chosen(args, 0), _chosen(kwargs, 0)

    def _marked(self, made: Any) -> Any:
        """Give values the owners of the first slot's, while the model's call is followed."""
        walk = self._selection.walk
        if walk is not None and walk.follower is not None:
            for value in _values(made):
                walk.follower.mark(value, walk.follower.owners(value.each[0]))
        return made

    def spread(
        self,
        values: Sequence[torch.Tensor],
        into: torch.Tensor,
        alike: Sequence[torch.Tensor],
        scattered: int | None = None,
    ) -> None:
        """Write each delta's rows of its own values into a tensor.

        Args:
            values: by the group's slots.
            into: the tensor.
            alike: tensors of its shape; the rows stand in it as in the first one that depends on rows.
            scattered: a dimension in which their sizes may differ, because an index says what goes where in it.

        Raises:
            UsageError: whose rows these are cannot be told.
        """
        order = self._order(alike)
        if order is None or order.dim == scattered:
            raise mixed_error(self.where, into.shape)
        self._write(values, into, order)

    def _order(self, alike: Sequence[torch.Tensor]) -> Order | None:
        """Return the order of the deltas in tensors; None if they depend on no row."""
        selection = self._selection
        given, number = alike[0], MERGED
        if selection.walk is not None:
            given, number = selection.walk.merging(self.site, alike)
        return selection.order(self.site, number, given, given.shape, self.where)

    def _write(self, values: Sequence[torch.Tensor], into: torch.Tensor, order: Order) -> None:
        for slot, value in zip(self.slots, values, strict=True):
            mine = order.along(slot)
            into.index_copy_(order.dim, mine, value.index_select(order.dim, mine))


def group_of(selection: Selection) -> Group:
    """Return the group of a selection."""
    return selection.memo("per delta", lambda: Group(selection))


class PerDelta(torch.Tensor):
    """A tensor of which each slot of a group has its own.

    Attributes:
        each: the tensors, all of one shape and dtype, by the group's slots.
        group: the group.
    """

    each: tuple[torch.Tensor, ...]
    group: Group
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001 - torch's way

    @staticmethod
    def __new__(cls, values: Sequence[torch.Tensor], group: Group) -> Self:
        """Return a tensor with a value for each slot of a group."""
        first = values[0]
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's way
            cls, first.shape, strides=first.stride(), dtype=first.dtype, device=first.device
        )
        made.each, made.group = tuple(values), group
        group.note(made)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PerDelta({len(self.each)} of {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation once for each slot."""
        kwargs = kwargs or {}
        given = _values((args, kwargs))
        group = given[0].group
        if any(one.group is not group for one in given):
            raise UsageError(f"{group.where} computes with values of another module; it serves one delta at a time")
        if func._schema.name.removeprefix("aten::") in NEW_TENSORS:  # noqa: SLF001 - torch has no other name for it
            return func(*_chosen(args, 0), **_chosen(kwargs, 0))
        written = _written(func, args, kwargs)
        if any(not isinstance(tensor, PerDelta) for tensor in written):
            return _write(func, args, kwargs, group, written)
        found = [func(*_chosen(args, number), **_chosen(kwargs, number)) for number in range(len(group.slots))]
        if written:
            _refuse_other_form(written, group)
            return written[0] if len(written) == 1 else written
        return _joined(found, group)


def _values(tree: Any) -> list[PerDelta]:
    """Return the values per delta in a tree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, PerDelta)]


def _chosen(tree: Any, number: int) -> Any:
    """Return a tree with the values of one slot."""
    return pytree.tree_map_only(PerDelta, lambda value: value.each[number], tree)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the tensors that an operation writes to."""
    found: list[Any] = []
    for number, argument in enumerate(func._schema.arguments):  # noqa: SLF001 - torch has no other name for it
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], group: Group, written: list[Any]) -> Any:
    """Run an operation that writes values per delta to a tensor whose rows are the batch's."""
    if len(written) != 1:
        raise UsageError(f"{group.where} writes to several tensors at once; it serves one delta at a time")
    (into,) = written
    values = []
    for number in range(len(group.slots)):
        copy = into.clone()
        given = _chosen(args, number), _chosen(kwargs, number)
        swapped = pytree.tree_map_only(torch.Tensor, lambda leaf: copy if leaf is into else leaf, given)  # noqa: B023
        func(*swapped[0], **swapped[1])
        values.append(copy)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    alike = [leaf for leaf in leaves if isinstance(leaf, PerDelta) and leaf.shape == into.shape]
    if func._schema.name.startswith("aten::scatter"):  # noqa: SLF001 - torch has no other name for it
        # A new tensor depends on no row yet; what is scattered into it tells the rows.
        dim = args[1] % into.dim()
        others = [leaf for leaf in leaves if leaf is not into and _same_but(dim, leaf.shape, into.shape)]
        group.spread(values, into, [*alike, into, *others], dim)
    else:
        group.spread(values, into, [*alike, into])
    return into


def _same_but(dim: int, one: torch.Size, other: torch.Size) -> bool:
    """Tell whether shapes are the same in all dimensions but one."""
    return len(one) == len(other) and all(place == dim or one[place] == other[place] for place in range(len(one)))


def _refuse_other_form(written: list[Any], group: Group) -> None:
    """Refuse tensors whose values were given another shape in place, which the tensors do not follow."""
    for tensor in written:
        if any(value.shape != tensor.shape or value.stride() != tensor.stride() for value in tensor.each):
            raise UsageError(f"{group.where} changes the shape of a value in place; it serves one delta at a time")


def _joined(found: list[Any], group: Group) -> Any:
    """Return what the runs of an operation gave, per delta.

    Raises:
        UsageError: the runs gave tensors of different shapes, or different numbers.
    """
    flat, form = zip(*(pytree.tree_flatten(one) for one in found), strict=True)
    joined = []
    for values in zip(*flat, strict=True):
        if isinstance(values[0], torch.Tensor):
            if any(value.shape != values[0].shape or value.stride() != values[0].stride() for value in values):
                raise _differs(group)
            joined.append(PerDelta(values, group))
        elif any(value != values[0] for value in values):
            raise _differs(group)
        else:
            joined.append(values[0])
    return pytree.tree_unflatten(joined, form[0])


def _differs(group: Group) -> UsageError:
    return UsageError(f"{group.where} does different things for different deltas; it serves one delta at a time")


def merge(tree: Any) -> Any:
    """Return a tree in which each row has its own delta's values."""
    return pytree.tree_map_only(PerDelta, lambda value: value.group.merged(value), tree)


def merge_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the input of an inner module with each row's own values: a hook before the module's forward.

    With values that depend on no row (a table of relative positions), the module runs once for each delta.
    """
    if not _values((args, kwargs)):
        return None
    args, kwargs = pytree.tree_map_only(PerDelta, lambda value: value.group.merged_if_rows(value), (args, kwargs))
    left = _values((args, kwargs))
    return left[0].group.each(module, args, kwargs) if left else (args, kwargs)
