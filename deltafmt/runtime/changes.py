"""What happens to a model after deltas were attached: modules that are replaced, weights that are written or converted.

Torch calls a hook when a module or a parameter is registered, and a model converts all its parameters through one
method. These note a change as it happens and cost a call nothing. What they miss (a write in place, an offload) shows
in the parameters themselves, which are looked at when a block is first used and before every prefill.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from deltafmt.errors import UsageError
from deltafmt.runtime.binding import Binding, held_tensor, place_of
from deltafmt.runtime.values import version_of


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A parameter as it was when it was last looked at."""

    module: nn.Module
    key: str
    parameter: weakref.ref[torch.Tensor]
    version: int
    address: int
    dtype: torch.dtype
    device: torch.device

    def is_at(self, parameter: torch.Tensor) -> bool:
        """Tell whether a parameter is this one, with the values that it had."""
        return (
            self.parameter() is parameter
            and version_of(parameter) == self.version
            and parameter.data_ptr() == self.address
        )


_Quick = tuple[Mapping[str, torch.Tensor | None], str, "weakref.ref[torch.Tensor]", int | None, int]
_Child = tuple[Mapping[str, nn.Module | None], str, "weakref.ref[nn.Module]"]


class Watch:
    """Notice changes of a model.

    Args:
        model: the model.

    Attributes:
        registrations: how often one of its modules was given another module or parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[tuple[int, str], Seen] = {}
        self._quick: list[_Quick] = []
        self._by_tensor: dict[str, Seen] = {}
        self._modules: set[int] = set()
        self._children: list[_Child] = []
        self._noted = self._converted = False
        self.registrations = 0
        _watches.add(self)
        self._wrap_conversion()

    def registered(self, module: nn.Module) -> None:
        """Note that a module was given another module or parameter."""
        if id(module) in self._modules:
            self._noted = True
            self.registrations += 1

    def _wrap_conversion(self) -> None:
        """Note ``model.to``, ``half``, ``cuda`` and the like, which all come down to ``_apply``."""
        original: Callable[..., nn.Module] = self._model._apply  # noqa: SLF001 - torch has no hook for it
        mine = weakref.ref(self)

        def apply(*args: Any, **kwargs: Any) -> nn.Module:
            if (watch := mine()) is not None:
                watch._converted = True  # noqa: SLF001 - of this class
            return original(*args, **kwargs)

        self._model.__dict__["_apply"] = apply

    def stamp(self, bindings: Iterable[Binding]) -> None:
        """Take the model as it is now for unchanged."""
        self._note_modules()
        self._seen, self._quick, self._by_tensor = {}, [], {}
        for binding in bindings:
            self.add(binding)
        self._noted = self._converted = False

    def add(self, binding: Binding) -> None:
        """Watch the parameters of one more delta as well; those that are watched already stay what they were."""
        for bound in binding.modules:
            for key, tensor in bound.tensors.items():
                module, held, own = place_of(bound.module, key)
                parameter = held.get(own)
                if parameter is None:
                    continue
                if (id(module), own) in self._seen:
                    self._by_tensor.setdefault(tensor, self._seen[id(module), own])
                    continue
                version, address = version_of(parameter), parameter.data_ptr()
                seen = Seen(
                    module,
                    own,
                    weakref.ref(parameter),
                    version,
                    address,
                    parameter.dtype,
                    parameter.device,
                )
                self._seen[id(module), own] = self._by_tensor[tensor] = seen
                self._quick.append((held, own, seen.parameter, None if version < 0 else version, address))

    def changed(self, *, closely: bool) -> bool:
        """Tell whether the model may have changed.

        Args:
            closely: look at every parameter, not only at what was noted.
        """
        if self._converted:
            return True  # there and back again, values are rounded, and may lie where they lay before
        if not self._noted:
            self._noted = closely and not self._all_same()
            return self._noted
        modules = {id(module) for module in self._model.modules()}
        if all(id(seen.module) in modules for seen in self._seen.values()) and self._same_parameters():
            self._note_modules()
            self._noted = False
        return self._noted

    def _note_modules(self) -> None:
        """Take the modules that the model has now for its own."""
        modules = list(self._model.modules())
        self._modules = {id(module) for module in modules}
        self._children = [
            (module._modules, name, weakref.ref(child))  # noqa: SLF001 - torch has no other name for it
            for module in modules
            for name, child in module._modules.items()  # noqa: SLF001
            if child is not None
        ]

    def _all_same(self) -> bool:
        """Tell whether every module is in its place, and has the parameters that it had.

        Torch tells nobody of a module that is put into ``_modules``, as its quantization does.
        """
        for held, name, child in self._children:
            if held.get(name) is not child():
                return False
        return self._same_parameters()

    def _same_parameters(self) -> bool:
        """Tell whether every module has the parameter that it had, at its address and not written to; a quick loop."""
        for parameters, key, before, version, address in self._quick:
            now = parameters.get(key)
            if now is None or now is not before() or now.data_ptr() != address:
                return False
            if version is not None and now._version != version:  # noqa: SLF001 - torch has no other name for it
                return False
        return True

    def refuse_moved(self) -> None:
        """Refuse a model that was moved to another device.

        Raises:
            UsageError: names both devices.
        """
        for seen in self._seen.values():
            now = held_tensor(seen.module, seen.key)
            if now is not None and now.device != seen.device and not now.is_meta:
                raise UsageError(f"it was moved from {seen.device} to {now.device}; move it back")

    def refuse_lost(self, binding: Binding, unchecked: Iterable[str]) -> None:
        """Refuse a changed parameter of which it cannot be told whether it is still the base's.

        Args:
            binding: a delta, bound to the model as it is now.
            unchecked: the tensors that could not be compared with their fingerprints.

        Raises:
            UsageError: names the tensor.
        """
        for tensor in unchecked:
            seen = self._by_tensor.get(tensor)
            parameter = None if seen is None else held_tensor(seen.module, seen.key)
            if seen is not None and parameter is None:
                raise UsageError(
                    f'the parameter of tensor "{tensor}" gave way to a value that is computed, as pruning and '
                    "parametrizations do, and cannot be compared"
                )
            if seen is None or parameter is None or tensor not in binding.parameters:
                continue
            # A conversion keeps the version and changes the dtype; its bits are those that a model loaded so has.
            if seen.dtype == parameter.dtype and not seen.is_at(parameter):
                raise UsageError(
                    f'the parameter of tensor "{tensor}" was written to, and has no fingerprint to compare'
                )

    def close(self) -> None:
        """Stop watching."""
        _watches.remove(self)
        self._model.__dict__.pop("_apply", None)


class _Watches:
    """The watches of the process, behind one hook of torch that stays.

    A hook for each watch would end when the watch does, in the middle of what another thread does with torch's table of
    hooks: it compiles a model, whose guards name the entries, or it registers a module.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: tuple[weakref.ref[Watch], ...] = ()
        self._hooked = False

    def add(self, watch: Watch) -> None:
        """Tell a watch what is registered, for as long as it lives."""
        with self._lock:
            if not self._hooked:
                self._hooked = True
                for register in (
                    torch_module.register_module_module_registration_hook,
                    torch_module.register_module_parameter_registration_hook,
                ):
                    register(_registered)
            self._held = (*(held for held in self._held if held() is not None), weakref.ref(watch))

    def remove(self, watch: Watch) -> None:
        """Tell a watch nothing any more."""
        with self._lock:
            self._held = tuple(held for held in self._held if held() not in (None, watch))

    def living(self) -> list[Watch]:
        """Return those that still watch."""
        return [watch for held in self._held if (watch := held()) is not None]


_watches = _Watches()


def _registered(module: nn.Module, _name: str, _value: object) -> None:
    if not torch.compiler.is_compiling():
        for watch in _watches.living():
            watch.registered(module)
