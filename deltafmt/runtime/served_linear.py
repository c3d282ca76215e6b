"""The classes that plain linear modules have while deltas are attached: ``torch.nn.Linear`` with another forward.

Compiled code checks in every call what its modules were when it was made. A forward that lies on a module itself costs
as many checks again as the module: of the method, of its object, of what the object refers to, and that a module that
is reached in two ways is one. A forward of the class costs none, for the class is checked anyway. The group of a module
is found by its weight, which compiled code has at hand.

``isinstance`` and the name of the class are those of ``torch.nn.Linear``. The module gets its class back in the end. A
class that a caller has made of ours gets ``torch.nn.Linear`` in its place, if it is a class of parametrizations: they
give the module what they were made of when they are taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.utils import parametrize

from deltafmt.runtime.frames import check_input, graph_now, note_input, untraced
from deltafmt.runtime.operations import Multiplies, bind_key, is_bound, multiply_, unbind_key
from deltafmt.runtime.uncopied import refuse_copy

# What a served module holds in its __dict__.
_MEMBER, _OTHERS = "deltafmt_member", "deltafmt_others"
# Bytes. Torch's compiler copies what lies between two such addresses.
_ALIGNMENT = 16


class _Ahead:
    """What the first module of a group has computed for the others, while the compiler looks on.

    Attributes:
        outputs: a module, the input that it must be given, its output, the key of the group, and the graph that they
            belong to: another one cannot tell whether the input was written to since.
    """

    outputs: Sequence[tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, str]] = ()


# There is one for all groups, because compiled code writes it back in every call.
_AHEAD = _Ahead()


def _computed(module: nn.Linear, args: Any, kwargs: Any) -> Any:
    """Return a module's output for code that is not compiled."""
    member = module.__dict__.get(_MEMBER)
    if member is None:  # the deltas have gone, and a caller has kept this forward
        return nn.Linear.forward(module, *args, **kwargs)
    return member.computed(*args, **kwargs)


def _untraced(module: nn.Linear, args: Any, kwargs: Any) -> Any:
    return untraced(_computed, (module, args, kwargs), {})


def _reduced(module: nn.Linear, protocol: Any) -> Any:
    """Refuse to copy or pickle a module that is served; pickle would ask torch for its class."""
    if _MEMBER in module.__dict__:
        refuse_copy()
    return nn.Linear.__reduce_ex__(module, protocol)


def _traces(args: Any, kwargs: Any) -> bool:
    """Tell whether compiled code serves a call."""
    return not kwargs and len(args) == 1 and not torch.is_grad_enabled()


class AloneLinear(nn.Linear):
    """A module without siblings."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the deltas' products."""
        if not torch.compiler.is_compiling():
            return _computed(self, args, kwargs)
        if type(self) is not AloneLinear or not _traces(args, kwargs):
            return _untraced(self, args, kwargs)
        output = nn.Linear.forward(self, args[0])
        multiply_([output], args[0], self.weight)
        return output


class FirstLinear(nn.Linear):
    """The module of a group that is called first, and computes for all."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the deltas' products; the outputs of the others wait for their calls."""
        if not torch.compiler.is_compiling():
            return _computed(self, args, kwargs)
        if type(self) is not FirstLinear or not _traces(args, kwargs):
            return _untraced(self, args, kwargs)
        given = args[0]
        others: Sequence[nn.Linear] = self.deltafmt_others  # type: ignore[assignment]
        outputs = [nn.Linear.forward(self, given)]
        outputs += [nn.Linear.forward(other, given) for other in others]
        multiply_(outputs, given, self.weight)
        note_input(self.weight, given)
        graph = graph_now()
        _AHEAD.outputs = [(other, given, outputs[1 + at], self.weight, graph) for at, other in enumerate(others)]
        return outputs[0]


class OtherLinear(nn.Linear):
    """A further module of a group: it takes its output if it is given what the first was given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the deltas' products."""
        if not torch.compiler.is_compiling():
            return _computed(self, args, kwargs)
        if type(self) is not OtherLinear or not _traces(args, kwargs):
            return _untraced(self, args, kwargs)
        given, ahead = args[0], _AHEAD.outputs
        for entry in ahead:
            if entry[0] is self:
                _AHEAD.outputs = [other for other in ahead if other[0] is not self]
                if entry[1] is given and entry[4] == graph_now():
                    check_input(entry[3], given)
                    return entry[2]
        output = nn.Linear.forward(self, given)
        multiply_([output], given, self.weight)
        return output


_CLASSES: tuple[type[nn.Linear], ...] = (AloneLinear, FirstLinear, OtherLinear)
for _kind in _CLASSES:
    _kind.__name__ = nn.Linear.__name__
    _kind.__module__ = nn.__name__  # torch.fx looks into modules that are not torch's, and would record the base
    setattr(_kind, "__reduce_ex__", _reduced)  # noqa: B010 - mypy takes no method of a class for another's


def restore(module: nn.Module) -> None:
    """Give a module that is not served its own class back, if a caller has made it one of ours again."""
    if _MEMBER in module.__dict__:
        return
    kind = type(module)
    if kind in _CLASSES:
        module.__class__ = nn.Linear
    elif kind.__bases__[0] in _CLASSES and len(kind.__bases__) == 1 and parametrize.is_parametrized(module):
        kind.__bases__ = (nn.Linear,)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a module is ``torch.nn.Linear`` and no class of its own, be it served or not."""
    return type(module) is nn.Linear or type(module) in _CLASSES


class ServedLinear:
    """The classes of the modules of a group, from now until :meth:`close`.

    Args:
        modules: in the order of their calls; :meth:`takes` must be true of them.
        members: of the modules, for code that is not compiled and as the operations of single modules.
        group: the operation of all modules.
    """

    def __init__(self, modules: Sequence[nn.Module], members: Sequence[Multiplies], group: Multiplies) -> None:
        self._modules = list(modules)
        operations = [group, *members[1:]]
        self._keys = [(module.weight.data_ptr(), one) for module, one in zip(modules, operations, strict=True)]  # type: ignore[operator]
        for key, operation in self._keys:
            bind_key(key, operation)
        modules[0].__dict__[_OTHERS] = tuple(modules[1:])
        for module, member in zip(modules, members, strict=True):
            module.__dict__[_MEMBER] = member
        kinds = (AloneLinear,) if len(modules) == 1 else (FirstLinear, *(OtherLinear,) * (len(modules) - 1))
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind

    @staticmethod
    def takes(modules: Sequence[nn.Module]) -> bool:
        """Tell whether modules are plain ones with weights that stand for them, and are not served already."""
        addresses = set()
        for module in modules:
            held, weight = module.__dict__, module._parameters.get("weight")  # noqa: SLF001 - not what a class makes of it
            if not is_plain(module) or _MEMBER in held or "forward" in held or type(weight) is not nn.Parameter:
                return False
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - nothing is computed with the weight here
                whole = type(weight.data) is torch.Tensor
            if not whole or weight.device.type == "meta":
                return False
            if weight.device.type != "cpu" and weight.data_ptr() % _ALIGNMENT:
                return False  # compiled code may be given a copy
            addresses.add(weight.data_ptr())
        return len(addresses) == len(modules) and not any(is_bound(address) for address in addresses)

    def close(self) -> None:
        """Give the modules their class back, unless a caller has given them another one."""
        for module in self._modules:
            module.__dict__.pop(_MEMBER, None)
            module.__dict__.pop(_OTHERS, None)
            restore(module)
        for key, operation in self._keys:
            unbind_key(key, operation)
