"""The served modules of a model: their hooks, and the slot of every delta that is on the device.

A slot is a place in the modules' operand tables. A delta on the device has the same slot in all modules.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.runtime.binding import Binding, BoundModule, Role, weight_shape
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.mixing import mixed_output
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.siblings import Active, SharedInput, Siblings, shareable
from deltafmt.runtime.sites import LinearSite, Site, TransposedSite, refuse_gradient
from deltafmt.runtime.sites_other import EmbeddingSite, OtherSite
from deltafmt.runtime.uncopied import Uncopied

_FIRST_SLOTS = 4


class ServedModules:
    """The sites of a model's modules, and the slots of its deltas.

    Args:
        device: the device of all deltas.
        active: a function that returns the selection of the calling thread, or None if it serves no delta.
        fuse: let linear modules that receive the same input share one launch.

    Attributes:
        count: the number of slots of every operand table.
    """

    def __init__(self, device: torch.device, active: Active, *, fuse: bool) -> None:
        self.count = 0
        self._device = device
        self._active = active
        self._fuse = fuse
        self._lock = threading.RLock()
        self._memory = RecordMemory(device)
        self._sites: dict[int, Site] = {}
        self._hooks: dict[int, list[RemovableHandle]] = {}
        self._groups: dict[int, Siblings] = {}
        self._slots: dict[str, int] = {}
        self._held: dict[str, tuple[DeviceDelta, Binding]] = {}
        self._free: list[int] = []

    def unused(self) -> list[str]:
        """Return the names of modules that deltas change but that have not run while such a delta was served."""
        return [site.name for site in self._sites.values() if not site.ran]

    def sites(self) -> list[Site]:
        """Return the sites of all served modules."""
        return list(self._sites.values())

    def siblings_of(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules whose outputs may be computed together with a module's."""
        group = self._groups.get(id(self._sites[id(module)])) if id(module) in self._sites else None
        return [] if group is None else [site.module for site in group.sites]

    def note_ran(self, site: Site) -> None:
        """Note that a module's parameters were used."""
        site.ran = True

    def prepare(self, modules: Iterable[BoundModule]) -> None:
        """Make a site for each module that has none, and hook the module."""
        with self._lock:
            for bound in modules:
                if id(bound.module) not in self._sites:
                    site = _make_site(bound, self._device, self._memory)
                    site.grow(self.count)
                    self._sites[id(bound.module)] = site
                    self._hook(site)

    def has(self, names: set[str]) -> bool:
        """Tell whether all these deltas have slots."""
        return names <= self._slots.keys()

    def assign(self, name: str, delta: DeviceDelta, binding: Binding) -> int:
        """Return the slot of a delta that is on the device; a delta without a slot gets a free one."""
        with self._lock:
            if name in self._slots:
                return self._slots[name]
            if not self._free:
                self._grow(max(2 * self.count, _FIRST_SLOTS))
            self._slots[name] = slot = self._free.pop()
            self._held[name] = delta, binding
            try:
                self._fill(slot, delta, binding)
            except BaseException:
                self.release(name)
                raise
            return slot

    def rebuild(self, bindings: Mapping[str, Binding], modules: Iterable[BoundModule]) -> None:
        """Make the sites anew for a model whose modules or dtypes have changed; slots stay what they are.

        Args:
            bindings: the new binding of each delta.
            modules: the modules that some delta changes.
        """
        with self._lock:
            self._unhook()
            self.prepare(modules)
            for name, slot in self._slots.items():
                delta, _ = self._held[name]
                self._held[name] = delta, bindings[name]
                self._fill(slot, delta, bindings[name])

    def _fill(self, slot: int, delta: DeviceDelta, binding: Binding) -> None:
        for bound in binding.modules:
            if id(bound.module) in self._sites:
                tensors = {key: delta[tensor] for key, tensor in bound.tensors.items() if tensor in delta}
                self._sites[id(bound.module)].put(slot, tensors)
        groups = set(self._groups.values())
        for group in groups:
            group.refresh(slot)
        self._settle(groups)
        self._bring_records(groups)

    def _bring_records(self, groups: Iterable[Siblings]) -> None:
        """Bring the records of all tables to the device with one copy, before a product asks for them."""
        for group in groups:
            group.prepare()
        for number, site in self._sites.items():
            if number not in self._groups:
                site.prepare()
        self._memory.flush()

    def release(self, name: str) -> None:
        """Forget a delta's tensors and free its slot, if it has one."""
        with self._lock:
            slot = self._slots.pop(name, None)
            self._held.pop(name, None)
            if slot is not None:
                for site in self._sites.values():
                    site.clear(slot)
                for group in set(self._groups.values()):
                    group.refresh(slot)
                self._free.append(slot)

    def close(self) -> None:
        """Remove all hooks, so that the modules are as they were before."""
        with self._lock:
            self._unhook()

    def _unhook(self) -> None:
        with self._lock:
            for hook in itertools.chain.from_iterable(self._hooks.values()):
                hook.remove()
            for group in set(self._groups.values()):
                group.dissolve()
            self._hooks, self._groups, self._sites = {}, {}, {}

    def _grow(self, count: int) -> None:
        for site in self._sites.values():
            site.grow(count)
        for group in set(self._groups.values()):
            group.grow(count)
        self._free += range(count - 1, self.count - 1, -1)
        self.count = count

    def _hook(self, site: Site) -> None:
        hooks = _Hooks(self, site)
        handles = self._hooks[id(site)] = []
        if isinstance(site, EmbeddingSite):
            handles.append(site.module.register_forward_pre_hook(hooks.before, with_kwargs=True))
        # Hooks that a caller registered before see the fine-tune's output, as they would see the unpacked model's.
        handles.append(site.module.register_forward_hook(hooks.after, with_kwargs=True, prepend=True))
        site.hooked = True

    def _settle(self, groups: Iterable[Siblings]) -> None:
        """Hook the modules of groups that need more than products, and take the hooks from those that do not."""
        for site in itertools.chain.from_iterable(group.sites for group in groups):
            if site.hooked and site.multiplies_only:
                for hook in self._hooks.pop(id(site)):
                    hook.remove()
                site.hooked = False
            elif not site.hooked and not site.multiplies_only:
                self._hook(site)

    def after(self, site: Site, args: Any, kwargs: Any, output: Any) -> Any:
        """Return a module's output with the deltas of the calling thread; None if there are none."""
        selection = self._active()
        if selection is None:
            return None
        changed = site.changes(selection)
        if not changed and not selection.mixes:
            return None
        refuse_gradient(site.name, output)
        site.ran = True
        if selection.mixes:
            return mixed_output(site, selection, args, kwargs, output, changed=changed)
        if self._fuse and type(site) is LinearSite and id(site) not in self._groups and shareable(args, kwargs):
            self._learn(site, args[0], selection)
        return site.after(selection, args, kwargs, output)

    def before(self, site: Site, args: Any, kwargs: Any) -> Any:
        """Return other arguments for a module, or None to keep the given ones."""
        selection = self._active()
        return None if selection is None or not site.changes(selection) else site.before(selection, args, kwargs)

    def _learn(self, site: LinearSite, given: torch.Tensor, selection: Selection) -> None:
        ended = selection.memo("run", SharedInput).observe(site, given)
        if len(ended) > 1 or (ended and self._device.type == "cuda"):
            with self._lock:
                if not any(id(found) in self._groups for found in ended):
                    group = Siblings(ended, self.count, self._active, self.after)
                    self._groups.update({id(found): group for found in ended})
                    self._settle([group])


def _make_site(bound: BoundModule, device: torch.device, memory: RecordMemory) -> Site:
    shape = weight_shape(bound.module, bound.role)
    if shape is None:
        return OtherSite(bound.name, bound.module, device)
    rows, columns = shape
    if bound.role is Role.TRANSPOSED:
        return TransposedSite(bound.name, bound.module, device, columns, rows, memory)
    made = EmbeddingSite if bound.role is Role.EMBEDDING else LinearSite
    return made(bound.name, bound.module, device, rows, columns, memory)


class _Hooks(Uncopied):
    """The hooks of one module. A copy of the module would have them too, and compute with this one's weights."""

    def __init__(self, served: ServedModules, site: Site) -> None:
        self._served = served
        self._site = site

    def before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run before the module's forward."""
        return self._served.before(self._site, args, kwargs)

    def after(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Run after the module's forward."""
        return self._served.after(self._site, args, kwargs, output)
