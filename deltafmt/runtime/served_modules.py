"""The served modules of a model: their hooks, and the slot of every delta that is on the device.

A slot is a place in the modules' operand tables. A delta on the device has the same slot in all modules.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.runtime.binding import Binding, BoundModule, Role, weight_shape
from deltafmt.runtime.cuts import settled
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
        alone: a function that tells whether no other thread is in a call of the model.
        fuse: let linear modules that receive the same input share one launch.

    Attributes:
        count: the number of slots of every operand table.
    """

    def __init__(self, device: torch.device, active: Active, alone: Callable[[], bool], *, fuse: bool) -> None:
        self.count = 0
        self._device = device
        self._active = active
        self._alone = alone
        self._fuse = fuse
        self._lock = threading.RLock()
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
                if id(bound.serving) not in self._sites:
                    site = _make_site(bound, self._device)
                    site.grow(self.count)
                    self._sites[id(bound.serving)] = site
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
            if id(bound.serving) in self._sites:
                tensors = {key: delta[name] for key, (name, _) in bound.held().items() if name in delta}
                self._sites[id(bound.serving)].put(slot, tensors)
        for group in set(self._groups.values()):
            group.refresh(slot)
        self._settle(set(self._groups.values()))

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
        """Hook the modules of groups that need more than products, and take the hooks from those that do not.

        A call in another thread may have begun with the module's own forward, whose deltas the hook adds. While there
        is one, the hooks stay; a later call takes them.
        """
        alone = self._alone()
        for site in itertools.chain.from_iterable(group.sites for group in groups):
            if site.hooked and site.multiplies_only and alone:
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
        if id(site) in selection.finished:
            selection.finished.discard(id(site))
            if site.multiplies_only and id(site) in self._groups:
                with self._lock:
                    self._settle([self._groups[id(site)]])
            return None
        output = settled(output)
        walk = selection.walk
        follower = None if walk is None else walk.follower
        if walk is not None and follower is not None:
            walk.note(site, args, kwargs, output)
            # How the rows meet an output that is the same for all of them is found out whether it changes or not.
            found = self._changed(site, selection, args, kwargs, output, always=isinstance(site, EmbeddingSite))
            follower.same_rows(found, output)
            return found
        return self._changed(site, selection, args, kwargs, output)

    def _changed(
        self, site: Site, selection: Selection, args: Any, kwargs: Any, output: Any, *, always: bool = False
    ) -> Any:
        changed = site.changes(selection)
        if not (changed or selection.mixes or always):
            return None
        refuse_gradient(site.name, output)
        if changed or selection.mixes:
            site.ran = True
        if selection.mixes:
            return mixed_output(site, selection, args, kwargs, output, changed=changed or always)
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


def _make_site(bound: BoundModule, device: torch.device) -> Site:
    shape = weight_shape(bound.serving, bound.role)
    if shape is None:
        return OtherSite(bound.name, bound.module, device)
    rows, columns = shape
    if bound.role is Role.TRANSPOSED:
        return TransposedSite(bound.name, bound.module, device, columns, rows)
    if bound.role is Role.EMBEDDING:
        return EmbeddingSite(bound.name, bound.module, device, rows, columns)
    site = LinearSite(bound.name, bound.serving, device, rows, columns)
    site.whole, site.summed_bias = bound.module, bound.summed_bias
    return site


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
