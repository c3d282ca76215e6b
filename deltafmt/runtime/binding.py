"""The binding of a delta's tensors to the modules of a model.

A tensor's name is a path to a module and the name of a parameter there. Names in a file and in a loaded model differ in
known ways: the prefix of the inner model (``model.``, ``bert.``) may be missing, and old checkpoints say ``gamma`` and
``beta`` for ``weight`` and ``bias``. A parameter that several modules share is found under all of them.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn

from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.format.constants import element_count
from deltafmt.index.entries import TensorEntry
from deltafmt.runtime.cuts import Cut, HeldTensor
from deltafmt.runtime.keys import Key
from deltafmt.runtime.model_names import ModelNames, model_names
from deltafmt.runtime.part_keys import part_key, part_of, split_key

Rename = Callable[[str], str]

# Modules that the module around them does not call: it computes with their parameters.
NEVER_CALLED = ("NonDynamicallyQuantizableLinear",)
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}


class Role(Enum):
    """The way in which a module uses its parameters."""

    LINEAR = "linear"
    TRANSPOSED = "transposed linear"
    EMBEDDING = "embedding"
    EXPERTS = "experts"
    OTHER = "other"


@dataclass(slots=True, eq=False)
class BoundModule:
    """A module that tensors of a delta are bound to.

    Attributes:
        name: the module's name in the model.
        module: the module.
        role: the way in which the module uses its parameters.
        tensors: the tensors' names by the names of the module's parameters and buffers, such as ``weight``; or by the
            keys of parts of them (:mod:`deltafmt.runtime.part_keys`).
        local: the module that computes with this process's cut, if the model is cut over several processes.
        cuts: the cuts of the parameters that this process has, by the parameters' names; the others it has whole.
        summed_bias: the bias, if it is added behind a sum over processes.
        bias_elsewhere: True if another process adds the change of that bias.
    """

    name: str
    module: nn.Module
    role: Role
    tensors: dict[str, str] = field(default_factory=dict)
    local: nn.Module | None = None
    cuts: dict[str, Cut] = field(default_factory=dict)
    summed_bias: torch.Tensor | None = None
    bias_elsewhere: bool = False
    _held: dict[str, tuple[str, HeldTensor]] | None = None

    @property
    def serving(self) -> nn.Module:
        """The module whose output the deltas are added to."""
        return self.module if self.local is None else self.local

    def held(self) -> dict[str, tuple[str, HeldTensor]]:
        """Return for each parameter the name that its tensor has on the device, and the cut that is there.

        It is worked out once, when all of that is known.
        """
        if self._held is None:
            self._held = {}
            for key, tensor in self.tensors.items():
                if not (key == "bias" and self.bias_elsewhere):
                    part = HeldTensor(tensor, self.cuts.get(key))
                    self._held[key] = (part.key, part)
        return self._held


class Arrangement:
    """Which tensors are bound to which parameters of the modules of one model."""


_ARRANGEMENTS: weakref.WeakValueDictionary[Key, Arrangement] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """The modules and parameters that the tensors of one delta are bound to.

    Attributes:
        modules: the modules with at least one bound tensor, changed or unchanged.
        parameters: the parameter that each tensor changes, by the tensor's name. A quantized module holds its weight
            in a form of its own; such a weight is missing here.
        ignored: the names of changed tensors that were left out because they match an ``ignore`` pattern.
        arrangement: the same object for all deltas whose tensors of the same names are bound to the same parameters.
    """

    modules: list[BoundModule]
    parameters: dict[str, torch.Tensor]
    ignored: list[str]
    arrangement: Arrangement


def role_of(module: nn.Module) -> Role:
    """Return a module's role. It is told from attributes that quantized modules have as well, not from the class."""
    if isinstance(getattr(module, "nf", None), int) and type(module).__name__ == "Conv1D":
        return Role.TRANSPOSED
    if _is_special(module):
        return Role.OTHER
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Role.LINEAR
    if isinstance(getattr(module, "num_embeddings", None), int):
        return Role.EMBEDDING
    # What transformers tells of its experts, so that one function may compute those of all architectures.
    if all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed", "down_proj")):
        return Role.EXPERTS
    return Role.OTHER


def _is_special(module: nn.Module) -> bool:
    """Tell whether a module is called linear but computes something else, as the routers of some experts do."""
    kind = type(module)
    return (
        isinstance(module, nn.Linear)
        and kind.forward is not nn.Linear.forward
        and kind.__module__.startswith("transformers.models.")
    )


def weight_shape(module: nn.Module, role: Role) -> tuple[int, int] | None:
    """Return the rows and columns that a linear or embedding weight has in a file; None for other modules."""
    if role is Role.TRANSPOSED:
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    if role is Role.LINEAR:
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if role is Role.EMBEDDING:
        return int(module.num_embeddings), int(module.embedding_dim)  # type: ignore[arg-type]
    return None


def bind(
    model: nn.Module,
    entries: Mapping[str, TensorEntry],
    removed: Sequence[str] = (),
    ignore: Sequence[str] = (),
    rename: Rename | None = None,
) -> Binding:
    """Bind the tensors of a delta to the modules of a model.

    Args:
        model: the base.
        entries: the delta's entries by tensor name; an alias has the entry of its target.
        removed: the names of tensors that only the base has.
        ignore: patterns; tensors whose names match one of them are left out.
        rename: a function from a tensor's name in the file to its name in the model.

    Raises:
        UsageError: a changed tensor has no place in the model, or only in a module that cannot be served; or the model
            has a tensor that the fine-tune lacks.
        WrongBaseError: a module's parameter has another shape than the tensor's base, or tensors that are tied in the
            fine-tune differ in the model.
    """
    finder = _Finder(model, rename)
    finder.learn(model, entries)
    modules: dict[int, BoundModule] = {}
    parameters: dict[str, torch.Tensor] = {}
    ignored = []
    found: dict[str, tuple[str, str]] = {}
    for name, entry in entries.items():
        where = finder.find(name)
        if _matches(name, ignore):
            if entry.action != "same":
                ignored.append(name)
        elif where is not None:
            found[name] = where
        elif entry.action != "same":
            raise finder.missing(model, name)
    named = set(found.values())
    for name in removed:
        spot = finder.find(name)
        if spot is not None and spot not in finder.reached(named) and not _matches(name, ignore):
            raise UsageError(
                f'the fine-tune has no tensor "{name}", which {type(model).__name__} has; '
                f'ignore=["{name}"] takes the base\'s'
            )
    names_of: dict[tuple[str, str], str] = {spot: name for name, spot in found.items()}
    for name, (path, attribute) in found.items():
        shared = [(path, attribute), *(spot for spot in finder.shared(path, attribute) if spot not in named)]
        parameter = finder.parameter(path, attribute)
        if parameter is not None:
            _check_part(model, parameter, key=attribute, name=name, shape=_base_shape(entries[name]))
            parameters[name] = part_of(parameter, attribute, _base_shape(entries[name]))
        copies = (names_of[spot] for spot in finder.shared(path, attribute) if spot in names_of)
        copied = any(_is_copy(entries[name], entries[other]) for other in copies)
        for bound, key in finder.serving(shared, name, entries[name], copied=copied):
            known = modules.setdefault(id(bound.module), bound)
            known.tensors[key] = name
            _check_shape(model, known, key, name, entries[name])
    for name in parameters:
        _check_tie(name, entries[name], parameters)
    bound_names = Key(tuple((number, tuple(bound.tensors.items())) for number, bound in modules.items()))
    arrangement = _ARRANGEMENTS.setdefault(bound_names, Arrangement())
    return Binding(list(modules.values()), parameters, ignored, arrangement)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_tie(name: str, entry: TensorEntry, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse an alias whose parameter in the model differs from the parameter of its target."""
    mine, target = parameters.get(name), parameters.get(entry.name)
    if entry.action == "replace" or mine is None or target is None or mine is target:
        return
    if not torch.equal(mine, target):
        raise WrongBaseError(f'tensors "{name}" and "{entry.name}" are tied in the fine-tune but differ in the model')


class _Finder:
    """Look up modules and parameters of a model by the names that files use."""

    def __init__(self, model: nn.Module, rename: Rename | None) -> None:
        self._rename = rename
        self._known = ModelNames()
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._prefix = getattr(model, "base_model_prefix", "")
        self._spots: dict[int, list[tuple[str, str]]] = {}
        for path, module in self._modules.items():
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                self._spots.setdefault(id(tensor), []).append((path, key))

    def learn(self, model: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
        """Find what the tensors of a delta are called in the model, where the model lacks their names."""
        missing = [name for name in entries if self.find(name) is None]
        if missing:
            self._known = model_names(model, entries, missing, lambda name: self.find(name) is not None)

    def missing(self, model: nn.Module, name: str) -> UsageError:
        """Return the error for a changed tensor without a place in the model."""
        kind = type(model).__name__
        if name in self._known.joined:
            return UsageError(
                f'{kind} keeps tensor "{name}" of the delta stacked or fused with others in one tensor, '
                f'"{self._known.joined[name].name}", which is not served; unpack the delta instead'
            )
        return UsageError(
            f'{kind} has no place for tensor "{name}" of the delta; rename=["FROM=TO"] says what it is called there'
        )

    def find(self, name: str) -> tuple[str, str] | None:
        """Return the path of the module and the parameter's name there, or None."""
        known = self._known.names.get(name, name)
        for candidate in self._candidates(known if self._rename is None else self._rename(known)):
            path, _, key = candidate.rpartition(".")
            if path in self._modules and self._holds(self._modules[path], key):
                return self._owner(path, key)
        part = self._known.joined.get(name)
        if part is not None and name not in self._known.split:
            path, _, key = part.name.rpartition(".")
            if role_of(self._modules[path]) is Role.EXPERTS:
                return path, part_key(key, part.start, part.count)
        return None

    def _owner(self, path: str, key: str) -> tuple[str, str]:
        """Return the module inside whose parameter the module at ``path`` only shows, as PEFT's layers do."""
        shown = None if key in self._modules[path]._parameters else getattr(self._modules[path], key, None)  # noqa: SLF001
        inside = (spot for spot in self._spots.get(id(shown), ()) if spot[0].startswith(f"{path}." if path else ""))
        return (path, key) if shown is None else next(inside, (path, key))

    def _candidates(self, name: str) -> Iterator[str]:
        path, _, key = name.rpartition(".")
        keys = [key, _OLD_NAMES[key]] if key in _OLD_NAMES else [key]
        paths = [path]
        if self._prefix:
            inner = path.removeprefix(f"{self._prefix}.")
            paths += [inner, f"{self._prefix}.{path}"]
        for path in paths:
            for key in keys:
                yield f"{path}.{key}" if path else key

    @staticmethod
    def _holds(module: nn.Module, key: str) -> bool:
        if isinstance(getattr(module, key, None), nn.Parameter) or module._buffers.get(key) is not None:  # noqa: SLF001
            return True
        # A quantized module keeps its weight in a form of its own, not as a parameter.
        if key == "weight":
            return role_of(module) in (Role.LINEAR, Role.EMBEDDING)
        return key == "bias" and role_of(module) is Role.LINEAR and bias_of(module) is not None

    def parameter(self, path: str, key: str) -> torch.Tensor | None:
        """Return the parameter or buffer, or None if the module keeps it in another form."""
        return held_tensor(self._modules[path], split_key(key)[0])

    def shared(self, path: str, key: str) -> list[tuple[str, str]]:
        """Return the other modules and names under which the model has the same parameter."""
        own, elements = split_key(key)
        parameter = self.parameter(path, key)
        others = [] if parameter is None else [spot for spot in self._spots[id(parameter)] if spot != (path, own)]
        return others if elements is None else [(other, key.replace(own, name, 1)) for other, name in others]

    def reached(self, spots: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        """Return the given places of parameters, and all other places of the same parameters."""
        return {other for spot in spots for other in (spot, *self.shared(*spot))}

    def serving(
        self, spots: Iterable[tuple[str, str]], name: str, entry: TensorEntry, *, copied: bool
    ) -> Iterator[tuple[BoundModule, str]]:
        """Yield the modules that compute with a parameter.

        A module with other modules inside may own a parameter only to hand it to an inner module, as the output head of
        BERT does with its bias; the inner module is served then. Where the file has the tensor twice, as ``copied``
        says, the inner module is served under the other name. The parts of torch.nn.MultiheadAttention are read by
        it, and it is served with them.
        """
        modules = [(BoundModule(path, self._modules[path], role_of(self._modules[path])), key) for path, key in spots]
        plain = [(bound, key) for bound, key in modules if is_plain(bound.module)]
        if entry.action == "same" or plain:
            yield from (self._reader(bound, key) for bound, key in plain)
        elif any(not bound.name for bound, _ in modules):
            raise UsageError(
                f'tensor "{name}" belongs to {type(modules[0][0].module).__name__} itself, not to a module inside, and '
                "is not served; unpack the delta instead"
            )
        elif not copied:
            yield from modules

    def _reader(self, bound: BoundModule, key: str) -> tuple[BoundModule, str]:
        """Return the module that reads a parameter: the module itself, or the one that does not call it."""
        if type(bound.module).__name__ not in NEVER_CALLED:
            return bound, key
        path, _, child = bound.name.rpartition(".")
        return BoundModule(path, self._modules[path], Role.OTHER), f"{child}.{key}"


def _is_copy(entry: TensorEntry, other: TensorEntry) -> bool:
    """Tell whether two entries store the same bytes whole."""
    return entry.action == other.action == "replace" and entry.digest == other.digest


def is_plain(module: nn.Module) -> bool:
    """Tell whether a module is linear, an embedding, a stack of experts, or has no modules inside."""
    return role_of(module) is not Role.OTHER or next(module.children(), None) is None


def held_tensor(module: nn.Module, key: str) -> torch.Tensor | None:
    """Return a module's own parameter or buffer, or None."""
    return place_of(module, key)[1].get(key)


def place_of(module: nn.Module, key: str) -> tuple[nn.Module, Mapping[str, torch.Tensor | None], str]:
    """Return the module, its parameters or buffers, and the name there of the tensor that a bound module's key says."""
    path, _, own = split_key(key)[0].rpartition(".")
    module = module.get_submodule(path)
    held = module._parameters if module._parameters.get(own) is not None else module._buffers  # noqa: SLF001
    return module, held, own


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """Return a linear module's bias, or None; dynamically quantized modules have a method of that name."""
    bias = getattr(module, "bias", None)
    value = bias() if callable(bias) and not isinstance(bias, torch.Tensor) else bias
    return value if isinstance(value, torch.Tensor) else None


def _base_shape(entry: TensorEntry) -> tuple[int, ...]:
    return entry.shape if entry.base is None else entry.base.shape


def _check_part(model: nn.Module, parameter: torch.Tensor, *, key: str, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that is not as many elements as the part of the parameter that it is bound to."""
    elements = split_key(key)[1]
    if elements is not None and not (
        parameter.is_contiguous()
        and elements.stop <= parameter.numel()
        and element_count(shape) == elements.stop - elements.start
        and parameter.shape[-1] == shape[-1]
    ):
        raise WrongBaseError(
            f'wrong base {type(model).__name__}: tensor "{name}" of shape {list(shape)} is no part of a stack of shape '
            f"{list(parameter.shape)}"
        )


def _check_shape(model: nn.Module, bound: BoundModule, key: str, name: str, entry: TensorEntry) -> None:
    """Refuse a tensor whose base has another shape than the module's parameter."""
    wanted = _base_shape(entry)
    if split_key(key)[1] is not None:
        return  # compared with its part already
    rows_columns = weight_shape(bound.module, bound.role) if key == "weight" else None
    held = getattr(bound.module, key, None) if "." not in key else held_tensor(bound.module, key)
    found = rows_columns or (tuple(held.shape) if isinstance(held, torch.Tensor) else wanted)
    if entry.base is None and entry.action == "replace" and len(wanted) == 2 and found[1:] == wanted[1:]:
        return  # a vocabulary of another size
    if found != wanted:
        raise WrongBaseError(
            f'wrong base {type(model).__name__}: tensor "{name}" has shape {list(found)}, not {list(wanted)}'
        )
