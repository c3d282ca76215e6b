"""The served modules of a model: their hooks, and the slot of every delta that is on the device.

A slot is a place in the modules' operand tables. A delta on the device has the same slot in all modules.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.runtime.binding import BoundModule, Role, weight_shape
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.siblings import Active, SharedInput, Siblings, shareable
from deltafmt.runtime.sites import LinearSite, Site, TransposedSite
from deltafmt.runtime.sites_other import EmbeddingSite, OtherSite

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
        self._sites: dict[int, Site] = {}
        self._hooks: dict[int, list[RemovableHandle]] = {}
        self._groups: dict[int, Siblings] = {}
        self._slots: dict[str, int] = {}
        self._free: list[int] = []

    def unused(self) -> list[str]:
        """Return the names of modules that deltas change but that have not run while such a delta was served."""
        return [site.name for site in self._sites.values() if not site.ran]

    def prepare(self, modules: Iterable[BoundModule]) -> None:
        """Make a site for each module that has none, and hook the module."""
        with self._lock:
            for bound in modules:
                if id(bound.module) not in self._sites:
                    site = _make_site(bound, self._device)
                    site.grow(self.count)
                    self._sites[id(bound.module)] = site
                    self._hook(site)

    def assign(self, name: str, delta: DeviceDelta, modules: Iterable[BoundModule]) -> int:
        """Return the slot of a delta that is on the device; a delta without a slot gets a free one."""
        with self._lock:
            if name in self._slots:
                return self._slots[name]
            if not self._free:
                self._grow(max(2 * self.count, _FIRST_SLOTS))
            self._slots[name] = slot = self._free.pop()
            try:
                for bound in modules:
                    if id(bound.module) in self._sites:
                        tensors = {key: delta[tensor] for key, tensor in bound.tensors.items() if tensor in delta}
                        self._sites[id(bound.module)].put(slot, tensors)
                for group in set(self._groups.values()):
                    group.refresh(slot)
                self._settle(set(self._groups.values()))
            except BaseException:
                self.release(name)
                raise
            return slot

    def release(self, name: str) -> None:
        """Forget a delta's tensors and free its slot, if it has one."""
        with self._lock:
            slot = self._slots.pop(name, None)
            if slot is not None:
                for site in self._sites.values():
                    site.clear(slot)
                for group in set(self._groups.values()):
                    group.refresh(slot)
                self._free.append(slot)

    def close(self) -> None:
        """Remove all hooks, so that the modules are as they were before."""
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
        def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            selection = self._active()
            return None if selection is None or not site.changes(selection) else site.before(selection, args, kwargs)

        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            selection = self._active()
            if selection is None or not site.changes(selection):
                return None
            if self._fuse and type(site) is LinearSite and id(site) not in self._groups and shareable(args, kwargs):
                self._learn(site, args[0], selection)
            return site.served(selection, args, kwargs, output)

        hooks = self._hooks[id(site)] = []
        if isinstance(site, EmbeddingSite):
            hooks.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(site.module.register_forward_hook(after, with_kwargs=True))
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

    def _learn(self, site: LinearSite, given: torch.Tensor, selection: Selection) -> None:
        ended = selection.memo("run", SharedInput).observe(site, given)
        if len(ended) > 1 or (ended and self._device.type == "cuda"):
            with self._lock:
                if not any(id(found) in self._groups for found in ended):
                    group = Siblings(ended, self.count, self._active)
                    self._groups.update({id(found): group for found in ended})
                    self._settle([group])


def _make_site(bound: BoundModule, device: torch.device) -> Site:
    shape = weight_shape(bound.module, bound.role)
    if shape is None:
        return OtherSite(bound.name, bound.module, device)
    rows, columns = shape
    if bound.role is Role.TRANSPOSED:
        return TransposedSite(bound.name, bound.module, device, columns, rows)
    made = EmbeddingSite if bound.role is Role.EMBEDDING else LinearSite
    return made(bound.name, bound.module, device, rows, columns)
