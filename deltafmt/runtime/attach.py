"""Deltas attached to a model: the base is in memory once, and each row of a batch names the fine-tune that it uses.

Any ``torch.nn.Module`` will do that is built of linear, embedding and other innermost modules. The model keeps its
class, its modules, its parameters and its state dict: forward hooks add the deltas to the modules' outputs, and
:meth:`Deltas.close` removes the hooks.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.bases import named_base
from deltafmt.runtime.base_check import BaseCheck
from deltafmt.runtime.binding import Binding, Rename, Role, bind, weight_shape
from deltafmt.runtime.delta_store import DeltaStore, read_attached
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.merge import Merge
from deltafmt.runtime.model_batch import batch_of, device_of, models_in
from deltafmt.runtime.residency import Residency
from deltafmt.runtime.selection import BASE, Selection
from deltafmt.runtime.served_modules import ServedModules

Names = str | None | Sequence[str | None]

BASE_NAME = "base"

# The selections of this thread (or task), by the model's id. An inner ``with`` block shadows the outer one.
_active: ContextVar[Mapping[int, Selection]] = ContextVar("deltafmt_selections", default={})  # noqa: B039 - never written to


class Deltas:
    """The deltas of one model.

    Args:
        model: the base, on its device and in its dtype; it must not be moved or converted while deltas are attached.
        device: the device of the deltas; the device of the model's parameters if not given.
        budget: the bytes of deltas that the device may hold; None for no limit.
        host_budget: the bytes of copies in host memory; a delta comes back from a copy quicker than from its file.
        verify_base: compare the model's parameters with the fingerprints of every delta's base.
        ignore: patterns; tensors whose names match one of them are left out.
        rename: a function from a tensor's name in a file to its name in the model; needed only for names that are not
            found by themselves.
        fuse: let linear modules that receive the same input share one launch.

    Attributes:
        residency: the deltas on the device.
        unchecked: the names of base tensors that could not be compared, by delta name; see :class:`BaseCheck`.
        ignored: the names of changed tensors that were left out, by delta name.

    Raises:
        UsageError: the model lies on several devices, and ``device`` is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        budget: int | None = None,
        host_budget: int = 0,
        verify_base: bool = True,
        ignore: Sequence[str] = (),
        rename: Rename | None = None,
        fuse: bool = True,
    ) -> None:
        self.unchecked: dict[str, list[str]] = {}
        self.ignored: dict[str, list[str]] = {}
        self._model = model
        self._device = device_of(model) if device is None else torch.device(device)
        self._verify_base = verify_base
        self._ignore = tuple(ignore)
        self._rename = rename
        self._check = BaseCheck(type(model).__name__)
        self._served = ServedModules(self._device, self._active, fuse=fuse)
        self._store = DeltaStore(self._device, self._served.release)
        self.residency: Residency[DeviceDelta, DeviceDelta] = Residency(self._store, budget, host_budget)
        self._lock = threading.RLock()
        self._bindings: dict[str, Binding] = {}
        self._open = 0
        self._merge: Merge | None = None
        self._merged: str | None = None
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in models_in(model)
        ]

    @property
    def names(self) -> list[str]:
        """The names of the deltas, in the order in which they were added."""
        return list(self._bindings)

    @property
    def merged(self) -> str | None:
        """The name of the delta that is merged into the base's weights."""
        return self._merged

    @property
    def saved_bytes(self) -> int:
        """Bytes of the base's original values, which are kept in host memory while a delta is merged."""
        return 0 if self._merge is None else self._merge.saved_bytes

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """Attach a delta. The index of its file is read and the base is checked; the delta is loaded on first use.

        Raises:
            UsageError: the name is taken, the delta alone exceeds the budget, or a tensor has no place in the model.
            WrongBaseError: the model is not the delta's base; names the delta and the first tensor that differs.
            UnsupportedError: a tensor has a term of a kind that cannot be served.
            StorageError, InvalidFileError: the file cannot be read.
        """
        if not name or name == BASE_NAME:
            raise UsageError(f'a delta cannot have the name "{name}"')
        self._refuse_merged("another is added")
        source = read_attached(os.fspath(path))
        named = named_base(source.opened.metadata)
        try:
            binding = bind(self._model, source.entries, source.removed, self._ignore, self._rename)
        except WrongBaseError as error:
            raise WrongBaseError(f"{error}{named}") from error
        self._check_growth(source.entries, binding)
        unchecked = []
        if self._verify_base:
            taken = {tensor for bound in binding.modules for tensor in bound.tensors.values()}
            entries = {tensor: entry for tensor, entry in source.entries.items() if tensor in taken}
            try:
                unchecked = self._check.check(entries, binding.parameters)
            except WrongBaseError as error:
                raise WrongBaseError(f'delta "{name}": {error}{named}') from error
        needed = _changed(source.entries, binding)
        with self._lock:
            if name in self._bindings:
                raise UsageError(f'there is a delta "{name}" already')
            self._store.files[name] = replace(source, needed=needed)
            try:
                self.residency.add(name)
            except UsageError:
                del self._store.files[name]
                raise
            self._bindings[name] = binding
            self.unchecked[name] = unchecked
            self.ignored[name] = binding.ignored
            self._served.prepare(
                bound for bound in binding.modules if not set(needed).isdisjoint(bound.tensors.values())
            )

    def remove(self, name: str) -> None:
        """Detach one delta and free its memory.

        Raises:
            UsageError: the delta is unknown or in use.
        """
        self.residency.remove(name)
        with self._lock:
            for held in (self._bindings, self.unchecked, self.ignored, self._store.files):
                held.pop(name)

    def prefetch(self, name: str) -> bool:
        """Start to load a delta and return at once; return False if the deltas in use leave no room for it.

        Raises:
            UsageError: the delta is unknown.
        """
        return self.residency.prefetch(name)

    def unused(self) -> list[str]:
        """Return the names of modules that deltas change but that have not run while such a delta was served.

        If a module that the model uses is still listed after a forward, the model reads its weight without calling
        the module. No delta is added then.
        """
        return self._served.unused()

    @contextlib.contextmanager
    def use(self, names: Names, *, wait: float = 0) -> Iterator[None]:
        """Serve deltas within a ``with`` block, in this thread, without gradients.

        Args:
            names: one name for all rows of the batch, or a name for each row; None or "base" for the base alone. If
                the model receives several rows for each name (beams), the rows of a name stand side by side.
            wait: seconds to wait for other threads to give deltas back, if the budget has no room.

        Raises:
            UsageError: a name is unknown, no names are given, a delta is merged, or the deltas together exceed the
                budget.
            NoRoomError: the deltas in use leave no room.
            StorageError, InvalidFileError: a delta's file cannot be read, or has changed.
        """
        rows = [names] if names is None or isinstance(names, str) else list(names)
        if not rows:
            raise UsageError("no names of deltas are given")
        rows = [None if name == BASE_NAME else name for name in rows]
        with self._lock:
            self._refuse_merged("deltas are served")
            self._open += 1
        try:
            wanted = [name for name in rows if name is not None]
            with self.residency.acquire(wanted, wait) as lease, torch.no_grad():
                slots = {
                    name: self._served.assign(name, value, self._bindings[name].modules)
                    for name, value in lease.values.items()
                }
                row_slots = [BASE if name is None else slots[name] for name in rows]
                selection = Selection(row_slots, self._served.count, self._device)
                token = _active.set({**_active.get(), id(self): selection})
                try:
                    yield
                finally:
                    _active.reset(token)
        finally:
            with self._lock:
                self._open -= 1

    def merge(self, name: str) -> None:
        """Add a delta to the base's weights in place; every parameter gets the values that unpacking would write.

        The original values of the changed elements are kept in host memory, so that :meth:`unmerge` restores every
        bit.

        Raises:
            UsageError: deltas are in use or merged, or a tensor cannot be merged; the message names it.
        """
        # The lock is not held while waiting: the thread that loads deltas takes it to empty slots.
        with self._lock:
            self._refuse_merged("another is merged")
            self._check_idle("merge")
            self._merged = name
        lease = None
        try:
            lease = self.residency.acquire([name])
            self._merge = Merge(name, lease, self._bindings[name])
            self._merge.apply()
        except BaseException:
            self._merge = self._merged = None
            if lease is not None:
                lease.release()
            raise

    def unmerge(self) -> None:
        """Restore the base's weights, bit for bit.

        Raises:
            UsageError: nothing is merged, or the weights were changed since; then nothing is restored.
        """
        if self._merge is None:
            raise UsageError("no delta is merged")
        self._merge.undo()
        self._merge = self._merged = None

    def close(self) -> None:
        """Remove every hook and free every delta.

        Raises:
            UsageError: deltas are in use or merged.
        """
        with self._lock:
            self._check_idle("detach")
            self._refuse_merged("deltas are detached")
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._served.close()
        self.residency.close()

    def _refuse_merged(self, what: str) -> None:
        if self._merged is not None:
            raise UsageError(f'delta "{self._merged}" is merged into the base; unmerge it before {what}')

    def _check_idle(self, what: str) -> None:
        if self._open:
            raise UsageError(f"cannot {what} while deltas are in use")

    def _check_growth(self, entries: Mapping[str, TensorEntry], binding: Binding) -> None:
        """Refuse a weight with more or fewer rows than the base's; only a vocabulary may grow or shrink."""
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        for bound in binding.modules:
            shape = weight_shape(bound.module, bound.role)
            name = bound.tensors.get("weight")
            if shape is None or name is None or bound.role is Role.EMBEDDING or bound.module is head:
                continue
            if entries[name].shape != shape:
                found = f"{list(entries[name].shape)} where {type(self._model).__name__} has {list(shape)}"
                raise UsageError(f'tensor "{name}" is {found}; only embeddings and the output head may differ in rows')

    def _active(self) -> Selection | None:
        return _active.get().get(id(self))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        selection = self._active()
        batch = batch_of(args, kwargs)
        if selection is not None and batch is not None:
            selection.enter(*batch, type(module).__name__)


def _changed(entries: Mapping[str, TensorEntry], binding: Binding) -> tuple[str, ...]:
    taken = {tensor: None for bound in binding.modules for tensor in bound.tensors.values()}
    return tuple(name for name in taken if entries[name].action != "same")
