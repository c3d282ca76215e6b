"""Sites of modules that compute with parameters in a way of their own: they run with the delta's values in their place.

A router, a state-space layer, the sinks of an attention, ``torch.nn.MultiheadAttention``: nothing is known of what such
a module computes. With one delta for all rows it runs once, with the values that the delta gives its parameters and
buffers. With several they are tensors with values for each (:mod:`deltafmt.runtime.per_delta`). The modules inside are
served for themselves.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltafmt.errors import UsageError
from deltafmt.runtime.binding import place_of
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.runtime.frames import refuse_trace, untraced
from deltafmt.runtime.per_delta import group_of, merge, merge_input
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.sites import Site, refuse_gradient
from deltafmt.runtime.uncopied import Uncopied

MOST_ELEMENTS = 1 << 26  # of a parameter whose values are decoded whole
# Parameters of torch.nn.utils.weight_norm and spectral_norm, which write the weight beside them before each call.
_DERIVED = ("_g", "_v", "_orig")
_KEPT_ELEMENTS = 1 << 16  # values of so few elements are kept with the slot


class WrappedSite(Site):
    """A site that takes the place of its module's forward, instead of adding to the output."""

    def changes(self, selection: Selection) -> bool:
        """Tell whether one of the selection's slots changes this module, alone or in a sum."""
        return not self.slots.isdisjoint(selection.touched)

    def after(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002 - of every site
        """Return the output as it is: the forward was this site's own."""
        return output

    @abstractmethod
    def run(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output with the selection's deltas; only called if one of them changes this module."""


class Wrapped(Uncopied):
    """The forward of a module with a wrapped site.

    Args:
        site: the site.
        active: a function that returns the selection of the calling thread, or None if it serves no delta.
    """

    def __init__(self, site: WrappedSite, active: Callable[[], Selection | None]) -> None:
        module = site.module
        self._site, self._active = site, active
        self._before: Callable[..., Any] = module.forward
        self._own = "forward" in module.__dict__
        functools.update_wrapper(self, self._before, updated=())
        # Inner modules take rows of one delta each, be they served or not.
        inner = [one for one in module.modules() if one is not module and one._parameters]  # noqa: SLF001
        self._hooks = [one.register_forward_pre_hook(merge_input, prepend=True, with_kwargs=True) for one in inner]
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, with the deltas of the calling thread."""
        return untraced(self._run, args, kwargs) if torch.compiler.is_compiling() else self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        selection = self._active()
        if selection is not None:
            refuse_trace()
        if selection is not None and selection.walk is not None:
            selection.walk.note(self._site, args, kwargs, None)
        if selection is None or not self._site.changes(selection):
            return self._before(*args, **kwargs)
        self._site.ran = True
        return self._site.run(selection, args, kwargs)

    def remove(self) -> None:
        """Give the module its own forward back."""
        for hook in self._hooks:
            hook.remove()
        if self._own:
            self._site.module.forward = self._before
        else:
            self._site.module.__dict__.pop("forward", None)


class SubstitutedSite(WrappedSite):
    """A module that runs with the deltas' values in place of its parameters and buffers."""

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        super().__init__(name, module, device)
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        # Where the batch comes second, rows cannot be told from positions.
        self._batch_second = isinstance(module, nn.MultiheadAttention) and not module.batch_first

    def grow(self, slots: int) -> None:
        """Do nothing: there is room for any number of slots."""

    def _put(self, slot: int, tensors: Mapping[str, DeviceTensor]) -> None:  # noqa: ARG002 - of every site
        self._kept[slot] = {}

    def _clear(self, slot: int) -> None:
        self._kept.pop(slot, None)

    def _base(self, key: str) -> torch.Tensor:
        _, held, own = place_of(self.module, key)
        found = held.get(own)
        assert found is not None
        return found.detach()

    def values(self, slot: int, key: str) -> torch.Tensor:
        """Return the whole values that a slot's delta gives a parameter; those of a small one are kept."""
        kept = self._kept.get(slot, {})
        if key not in kept:
            found = super().values(slot, key)
            if found.numel() > _KEPT_ELEMENTS or key not in self.held(slot):
                return found
            kept[key] = found
        return kept[key]

    def run(self, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output with the deltas' values."""
        touched = [slot for slot in self.slots if slot in selection.touched]
        keys = sorted({key for slot in touched for key in self.held(slot)})
        refuse_training(self.name, self.module, keys)
        if selection.uniform:
            found = self._call({key: self.selected(selection, selection.slots[0], key) for key in keys}, args, kwargs)
            self._refuse_gradient(found)
            return found
        if self._batch_second:
            raise UsageError(
                f"{self.name} takes positions before rows (batch_first=False); it serves one delta at a time"
            )
        return self._run_mixed(keys, selection, args, kwargs)

    def _run_mixed(self, keys: list[str], selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        group = group_of(selection)
        outer, group.where, group.site = (group.where, group.site), self.name, self
        before = group.alive()
        values = {key: group.of([self.selected(selection, slot, key) for slot in group.slots]) for key in keys}
        try:
            found = merge(self._call(values, args, kwargs))
            values.clear()
            group.refuse_kept(before)
        finally:
            group.where, group.site = outer
        self._refuse_gradient(found)
        return found

    def _refuse_gradient(self, found: Any) -> None:
        for value in found if isinstance(found, tuple | list) else (found,):
            refuse_gradient(self.name, value)

    def _call(self, values: Mapping[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        twin = twin_of(self.module, values)
        return type(twin).forward(twin, *args, **kwargs)


def refuse_training(name: str, module: nn.Module, keys: Iterable[str]) -> None:
    """Refuse to run a module in training mode with a delta's buffers, to which it would write.

    Raises:
        UsageError: names the module.
    """
    if module.training and any(key in module._buffers for key in keys):  # noqa: SLF001 - a quick look
        raise UsageError(f"{name} is in training mode, and would write to a delta's buffers; call model.eval()")


def refuse_other(name: str, module: nn.Module, keys: Sequence[str]) -> None:
    """Refuse a module that cannot run with other parameters.

    One that keeps its parameters, or what it made of them, elsewhere would go on to find the base's. One with very
    large parameters would need them all for each delta.

    Raises:
        UsageError: names the module.
    """
    for key in keys:
        _, held, own = place_of(module, key)
        tensor = held.get(own)
        if tensor is not None and tensor.numel() > MOST_ELEMENTS:
            raise UsageError(
                f'the delta changes the {key} of "{name}", a {type(module).__name__}, which is too large to be decoded '
                "whole; unpack the delta instead"
            )
    mine = {id(parameter) for parameter in module.parameters(recurse=False)}
    held = module.__dict__
    kept = (leaf for key, value in held.items() if key[:1] != "_" or key == "_flat_weights" for leaf in _tensors(value))
    if any(id(leaf) in mine for leaf in kept) or any(
        isinstance(held.get(key.removesuffix(end)), torch.Tensor)
        for key in keys
        for end in _DERIVED
        if key.endswith(end)
    ):
        raise UsageError(
            f"{name}, a {type(module).__name__}, keeps copies of its parameters, and cannot be served; unpack the "
            "delta instead"
        )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        yield from (
            one for one in (value.values() if isinstance(value, dict) else value) if isinstance(one, torch.Tensor)
        )


def twin_of(module: nn.Module, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module with other parameters and buffers; everything else is shared with the module.

    Args:
        module: the module.
        values: by key; ``out_proj.weight`` is the weight of a module inside, of which the copy has a copy.
    """
    twin = object.__new__(type(module))  # copy.copy asks the class, and parametrized ones refuse
    twin.__dict__.update(module.__dict__)
    # With the names whose parameter is None, such as the bias of torch.nn.LayerNorm(bias=False).
    held = {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
    for path in {key.rpartition(".")[0] for key in values}:
        own = {key.rpartition(".")[2]: value for key, value in values.items() if key.rpartition(".")[0] == path}
        if path:
            held["_modules"][path] = twin_of(module.get_submodule(path), own)
        for key, value in own.items() if not path else ():
            held["_parameters" if key in held["_parameters"] else "_buffers"][key] = value
    twin.__dict__.update(held)
    return twin


def refreshed(twin: nn.Module, module: nn.Module) -> nn.Module:
    """Return what :func:`twin_of` made, with the attributes that its module has now, such as another epsilon.

    It is a new object in each call: other threads compute with the one that was given.
    """
    made: nn.Module = object.__new__(type(twin))
    held = {name: twin.__dict__[name] for name in ("_parameters", "_buffers", "_modules")}
    made.__dict__.update(module.__dict__ | held)
    return made
