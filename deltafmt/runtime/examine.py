"""The examination of a delta before it is served by a model: its tensors' places, their shapes, and the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from deltafmt.errors import DeltafmtError, UsageError, WrongBaseError
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.bases import named_base
from deltafmt.runtime.base_check import BaseCheck
from deltafmt.runtime.binding import Binding, BoundModule, Rename, Role, bind, place_of, weight_shape
from deltafmt.runtime.changes import Watch
from deltafmt.runtime.cuts import HeldTensor
from deltafmt.runtime.delta_store import AttachedFile
from deltafmt.runtime.experts import refuse_experts
from deltafmt.runtime.float8 import find_scales
from deltafmt.runtime.model_batch import refuse_elsewhere, refuse_offloaded, refuse_parallel
from deltafmt.runtime.parallel import StandIns, own_forward
from deltafmt.runtime.substituted import refuse_other
from deltafmt.runtime.uncopied import Uncopied


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """What the examination of a delta found.

    Attributes:
        binding: the modules and parameters that its tensors are bound to.
        needed: the names of the tensors that must be on the device.
        unchecked: the names of base tensors that could not be compared.
        vocabulary: the rows of its output head, if they are not the base's.
        grown: the name of a tensor that has more or fewer rows than the base's, if there is one.
    """

    binding: Binding
    needed: tuple[str, ...]
    unchecked: list[str]
    vocabulary: int | None
    grown: str | None

    def held(self) -> dict[str, HeldTensor] | None:
        """Return the cuts of tensors that must be on the device, by name; None if no module is cut over processes."""
        changed = self.changed_modules()
        if all(bound.local is None for bound in changed):
            return None
        held = (one for bound in changed for one in bound.held().values())
        needed = set(self.needed)
        return {name: part for name, part in held if part.tensor in needed}

    def changed_modules(self) -> list[BoundModule]:
        """Return the modules that the delta changes."""
        needed = set(self.needed)
        return [bound for bound in self.binding.modules if not needed.isdisjoint(bound.tensors.values())]


class Examiner:
    """Examine deltas for one model.

    Args:
        model: the base.
        device: of the deltas.
        computes: a function that tells whether a module still has the forward that deltas put there; None for none.
        verify_base: compare the model's parameters with the fingerprints of the delta's base.
        ignore: patterns; tensors whose names match one of them are left out.
        rename: a function from a tensor's name in a file to its name in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        computes: Callable[[nn.Module], bool | None],
        *,
        verify_base: bool,
        ignore: Sequence[str],
        rename: Rename | None,
    ) -> None:
        self._model = model
        self._device = device
        self._computes = computes
        self._verify_base = verify_base
        self._ignore = tuple(ignore)
        self._rename = rename
        self._check = BaseCheck(type(model).__name__)
        self._stand_ins = StandIns()

    def examine(self, source: AttachedFile, name: str) -> Examined:
        """Examine a delta.

        Args:
            source: its file.
            name: its name, for messages.

        Raises:
            UsageError: a tensor has no place in the model, or the model is offloaded, cut over processes, or on another
                device.
            WrongBaseError: the model is not the delta's base.
        """
        refuse_offloaded(self._model)
        refuse_parallel(self._model)
        named = named_base(source.opened.container)
        try:
            binding = bind(self._model, source.entries, source.removed, self._ignore, self._rename)
        except WrongBaseError as error:
            raise WrongBaseError(f"{error}{named}") from error
        vocabulary, grown = self._growth(source.entries, binding)
        taken = {tensor: None for bound in binding.modules for tensor in bound.tensors.values()}
        unchecked = list(taken)
        if self._verify_base:
            entries = {tensor: entry for tensor, entry in source.entries.items() if tensor in taken}
            try:
                scaled = source.opened.container.scaled()
                scales = find_scales(binding.modules) if scaled else {}
                unchecked = self._check.check(entries, binding.parameters, scaled, scales)
            except WrongBaseError as error:
                raise WrongBaseError(f'delta "{name}": {error}{named}') from error
        needed = tuple(tensor for tensor in taken if source.entries[tensor].action != "same")
        found = Examined(binding, needed, unchecked, vocabulary, grown)
        for bound in found.changed_modules():
            refuse_elsewhere(bound.name, bound.module, self._device)
            self._stand_ins.place(bound, source.entries)
            self._refuse_own_forward(bound)
            changed = [key for key, tensor in bound.tensors.items() if tensor in needed]
            refuse_computed(bound, changed)
            if bound.role is Role.EXPERTS:
                refuse_experts(bound.name, bound.module, changed)
            elif bound.role is Role.OTHER:
                refuse_other(bound.name, bound.module, changed)
        for bound in binding.modules:
            bound.held()  # now, and not when the first request waits
        return found

    def examine_again(self, files: Mapping[str, tuple[AttachedFile, str]], watch: Watch) -> dict[str, Examined]:
        """Examine deltas for the model as it is now, after it has changed.

        Args:
            files: each delta's file and its name for messages, by what tells it from others.
            watch: what the model was like.

        Raises:
            UsageError, WrongBaseError: the model is no longer the base of a delta, or that cannot be told.
        """
        self._check.forget()
        try:
            watch.refuse_moved()
            found = {key: self.examine(file, name) for key, (file, name) in files.items()}
            for one in found.values():
                watch.refuse_lost(one.binding, one.unchecked)
        except DeltafmtError as error:
            raise type(error)(
                f"the model has changed since deltas were attached: {error}; undo the change, or detach the deltas and "
                "attach them to the model as it is now"
            ) from error
        return found

    def close(self) -> None:
        """Give modules that are cut over processes their own forward back."""
        self._stand_ins.close()

    def head(self) -> nn.Module | None:
        """Return the model's output head, if it has one."""
        found = getattr(self._model, "get_output_embeddings", lambda: None)()
        return found if isinstance(found, nn.Module) else None

    def vocabulary(self) -> int | None:
        """Return the rows of the model's output head, if it has one."""
        return getattr(self.head(), "out_features", None)

    def _refuse_own_forward(self, bound: BoundModule) -> None:
        """Refuse a module whose forward was replaced by a caller: a delta follows from what its class does.

        Accelerate's forward is let through: it moves tensors between devices, and the model lies on one.

        Raises:
            UsageError: names the module.
        """
        held = bound.module.__dict__
        known = "_hf_hook" in held or bound.local is not None or own_forward(bound.module) is not None
        known = known or isinstance(held.get("forward"), Uncopied)  # of the calls of a model inside the model
        ours = self._computes(bound.module)
        if "forward" in held and not ours and (ours is False or not known):
            raise UsageError(
                f'module "{bound.name}", a {type(bound.module).__name__}, was given another forward, of which deltafmt '
                "cannot tell what it computes; make it a forward hook, or a class of its own"
            )

    def _growth(self, entries: Mapping[str, TensorEntry], binding: Binding) -> tuple[int | None, str | None]:
        """Return the rows of a head that grew, and the name of a tensor that did.

        Raises:
            UsageError: another weight has more or fewer rows than the base's; only a vocabulary may grow or shrink.
        """
        vocabulary, grown = None, None
        head = self.head()
        for bound in binding.modules:
            shape = weight_shape(bound.module, bound.role)
            name = bound.tensors.get("weight")
            if shape is None or name is None or entries[name].shape == shape:
                continue
            grown = name
            if bound.module is head:
                vocabulary = entries[name].shape[0]
            elif bound.role is not Role.EMBEDDING:
                found = f"{list(entries[name].shape)} where {type(self._model).__name__} has {list(shape)}"
                raise UsageError(f'tensor "{name}" is {found}; only embeddings and the output head may differ in rows')
        return vocabulary, grown


def refuse_computed(bound: BoundModule, keys: Iterable[str]) -> None:
    """Refuse a weight that a module computes from others: a delta of the weight is added behind the computation.

    Args:
        bound: the module.
        keys: its parameters that a delta changes.

    Raises:
        UsageError: names the module.
    """
    for key in keys:
        module, held, own = place_of(bound.module, key)
        if held.get(own) is None and (own in module.__dict__ or is_parametrized(module, own)):
            raise UsageError(
                f'the {own} of module "{bound.name}" is computed from other tensors, as by pruning or a '
                "parametrization; attach the deltas to the model without it"
            )
