"""What a delta's tensors are called in a model in memory, where the file's names are not the model's.

The base may be recorded under another name, the library may rename what it loads, and a wrapper or a prefix may differ.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from deltafmt.checkpoint.layouts import Slice
from deltafmt.checkpoint.library_names import names_in_model
from deltafmt.checkpoint.matching import match_shapes
from deltafmt.checkpoint.spellings import plain_name
from deltafmt.format.constants import element_count
from deltafmt.index.entries import TensorEntry


@dataclass(slots=True)
class ModelNames:
    """What was found.

    Attributes:
        names: the tensor's name in the model by its name in the file.
        joined: the elements of a tensor of the model that one of the file's is, by its name; the first ones, where
            several tensors of the model are one of the file's.
        split: the names of those of ``joined`` that are several tensors of the model.
    """

    names: dict[str, str] = field(default_factory=dict)
    joined: dict[str, Slice] = field(default_factory=dict)
    split: set[str] = field(default_factory=set)


def model_names(
    model: nn.Module, entries: Mapping[str, TensorEntry], missing: Iterable[str], has: Callable[[str], bool]
) -> ModelNames:
    """Find the names in the model of tensors that it does not have under the file's names.

    Args:
        model: the model.
        entries: the delta's entries by name.
        missing: the names to find.
        has: tells whether the model has a tensor of a name.
    """
    found = ModelNames()
    recorded = {name: _recorded(name, entries[name]) for name in missing}
    spelled = {name: plain_name(name) for name in (*recorded, *recorded.values())}
    loaded = _loaded(model, {*spelled, *spelled.values()})  # the library's names may be those of the files alone

    def in_memory(name: str) -> str:
        return loaded.get(name) or loaded.get(spelled[name], spelled[name])

    for name, other in recorded.items():
        for candidate in (other, in_memory(name), in_memory(other)):
            if has(candidate):
                found.names[name] = candidate
                break
    left = {
        other: (entries[name].base or entries[name]).shape
        for name, other in recorded.items()
        if name not in found.names
    }
    taken = {*(name for name in entries if has(name)), *found.names.values()}
    free = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in taken}
    if left and free:
        match = match_shapes(left, free, in_memory)
        for name, other in recorded.items():
            slices = match.slices.get(other, []) if name not in found.names else []
            whole = len(slices) == 1 and slices[0].count == element_count(free[slices[0].name])
            if whole:
                found.names[name] = slices[0].name
            elif slices:
                found.joined[name] = slices[0]
                found.split.update([name] * (len(slices) > 1))
    return found


def _recorded(name: str, entry: TensorEntry) -> str:
    """Return the name that a tensor's base has in its file; the tensor's own if the base is made of several."""
    parts = entry.base.parts if entry.base is not None and entry.name == name else ()
    return parts[0].name if len(parts) == 1 else name


def _loaded(model: nn.Module, names: Iterable[str]) -> Mapping[str, str]:
    """Return the names that transformers gives to tensors of a file, if the model is one of its own."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    with contextlib.suppress(Exception):  # no public interface: a version without it knows no other names
        return names_in_model(model, names)
    return {}
