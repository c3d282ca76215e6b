"""The served modules of a model: their hooks, and the slot of every delta that is on the device.

A slot is a place in the modules' operand tables. A delta on the device has the same slot in all modules.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.errors import UsageError
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.runtime import frames
from deltafmt.runtime.binding import Binding, BoundModule
from deltafmt.runtime.compiled_state import CompiledState, refuse_mixes
from deltafmt.runtime.cuts import settled
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.disturbed import Placed
from deltafmt.runtime.mixing import mixed_output
from deltafmt.runtime.module_hooks import Lookup, LookupHooks, ModuleHooks
from deltafmt.runtime.product_group import Active, ProductGroup, shareable
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.shared_inputs import SharedInput, known_siblings
from deltafmt.runtime.site_choice import site_of
from deltafmt.runtime.sites import LinearSite, Site, WeightSite, refuse_gradient
from deltafmt.runtime.sites_other import EmbeddingSite
from deltafmt.runtime.slot_plan import SlotPlan, SlotPlans
from deltafmt.runtime.substituted import Wrapped, WrappedSite
from deltafmt.runtime.unused import unused

# More slots mean other tables, for which a model is compiled anew.
_FIRST_SLOTS, _MORE_SLOTS = 64, 4


class ServedModules:
    """The sites of a model's modules, and the slots of its deltas.

    Args:
        model: the model.
        device: the device of all deltas.
        active: a function that returns the selection of the calling thread, or None if it serves no delta.
        alone: a function that tells whether no other thread is in a call of the model.
        fuse: let linear modules that receive the same input share one launch.

    Attributes:
        count: the number of slots of every operand table.
        lookup: what is done around a caller's own call of the embedding; None if the model has no embedding.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, active: Active, alone: Callable[[], bool], *, fuse: bool
    ) -> None:
        self.count = 0
        self.lookup: Lookup | None = None
        self._model = model
        self._device = device
        self._active = active
        self._alone = alone
        self._fuse = fuse
        self._lock = threading.RLock()
        self._memory = RecordMemory(device)
        self._sites: dict[int, Site] = {}
        self._hooks: dict[int, list[RemovableHandle | Wrapped]] = {}
        self._groups: dict[int, ProductGroup] = {}
        self._placed = Placed()
        self._slots: dict[str, int] = {}
        self._held: dict[str, tuple[DeviceDelta, Binding]] = {}
        self._free: list[int] = []
        self._plans = SlotPlans()
        self._fresh = False
        self._added = 0
        self._compiled = False
        self._token_limit: float = math.inf
        self._growing: frozenset[int] = frozenset()
        self._wrapped = False
        self._multiplying: tuple[int, ...] = ()
        self.compiled_state = CompiledState(device, active)

    def ready(self, selection: Selection | None, rows: int) -> None:
        """Bring all that compiled code reads up to date, before a call of the model.

        Args:
            selection: what the call serves; None for the base.
            rows: of the batch.
        """
        if not self._compiled:
            with self._lock:
                self._compiled, self._fresh = True, False
                self._plans.forget()  # other tables will have records
        self._bring()
        self.compiled_state.begin(selection, rows, self.count)

    def compiles(self, selection: Selection | None, tokens: int) -> bool:
        """Tell whether compiled code can serve a call of the model.

        It cannot where a slot may have more tokens than its kernel takes, where a row uses a sum of deltas or holds
        the tokens of several requests, where the rows do not come first in all inputs or are not known yet, where a
        module computes with parameters in a way of its own, or where a module's output has another shape than the
        base's, because the vocabulary is larger.

        Args:
            selection: what the call serves; None for the base.
            tokens: of the batch.
        """
        self._bring()
        if self._device.type == "cuda" and tokens > self._token_limit:
            return False
        if selection is None:
            return not self._wrapped
        if not selection.uniform and (selection.walk is None or not selection.walk.rows_first(self._multiplying)):
            return False
        return not (self._wrapped or selection.mixes or selection.packed) and selection.used.isdisjoint(self._growing)

    def _bring(self) -> None:
        """Bring what has changed in the operand tables to the device."""
        if not self._fresh:
            self._refresh()
        else:
            self._memory.flush()

    def _refresh(self) -> None:
        """Bring the operand tables to the device, and note what compiled code cannot serve."""
        with self._lock:
            self._fresh = True
            groups, sites = set(self._groups.values()), list(self._sites.values())
            weights = [site for site in sites if isinstance(site, WeightSite)]
            own = [site.table.operands for site in weights]
            if self._device.type == "cuda":  # without kernels, nothing reads the records
                for group in groups:
                    group.table.prepare()
                for site, table in zip(weights, own, strict=True):
                    # By itself, a module of a group hardly ever runs. In compiled code it must not take memory then.
                    if table.used or self._compiled or id(site) not in self._groups:
                        table.prepare()
                self._memory.flush()
            added = sum(table.added for table in (*own, *(group.table for group in groups)))
            if added > self._added:
                frames.forget()  # a graph that was captured before does not launch for the new layout
            self._added = added
            self._token_limit = min((group.table.token_limit for group in groups), default=math.inf)
            self._growing = frozenset(slot for site in weights for slot in site.growing())
            self._wrapped = any(isinstance(site, WrappedSite) for site in sites)
            self._multiplying = tuple(id(site) for site in sites if isinstance(site, LinearSite))

    def unused(self) -> list[str]:
        """Return the names of modules that deltas change but that have not run while such a delta was served."""
        return unused(self._sites.values())

    def sites(self) -> list[Site]:
        """Return the sites of all served modules."""
        return list(self._sites.values())

    def changed_by(self, selection: Selection) -> frozenset[int]:
        """Return the ids of the sites that one of the selection's deltas changes."""
        return frozenset(id(site) for site in self._sites.values() if not site.slots.isdisjoint(selection.touched))

    def serves(self, module: nn.Module) -> bool:
        """Tell whether deltas are added to what a module computes."""
        return id(module) in self._sites

    def siblings_of(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules whose outputs may be computed together with a module's: those with a forward of ours."""
        found = self._sites.get(id(module))
        if isinstance(found, WrappedSite):
            return [module]
        group = None if found is None else self._groups.get(id(found))
        return [] if group is None else [site.module for site in group.sites]

    def computes(self, module: nn.Module) -> bool | None:
        """Tell whether a module still has the forward that the deltas put there; None if they put none there."""
        site = self._sites.get(id(module))
        group = None if site is None else self._groups.get(id(site))
        hooks = () if site is None else self._hooks.get(id(site), ())
        ours = [] if group is None else [member.run for member in group.members if member.site is site]
        ours += [hook for hook in hooks if isinstance(hook, Wrapped)]
        return module.__dict__.get("forward") in ours if ours else None

    def disturbed(self) -> bool:
        """Tell whether a caller has given a module another forward, or a hook that runs before the deltas'."""
        with self._lock:
            return self._placed.disturbed(lambda key: self._hooks.get(key, ()))

    def note_ran(self, site: Site) -> None:
        """Note that a module's parameters were used."""
        site.ran = True

    def prepare(self, modules: Iterable[BoundModule]) -> None:
        """Make a site for each module that has none, and hook the module."""
        with self._lock:
            made = []
            for bound in modules:
                if id(bound.serving) not in self._sites:
                    site = site_of(bound, self._device, self._memory)
                    site.grow(self.count)
                    self._sites[id(bound.serving)] = site
                    self._hook(site)
                    self._placed.note(site)
                    made.append(site)
            if made:
                # A module that is cut over processes is given an input of its own each time.
                whole = [site for site in made if type(site) is LinearSite and site.module is site.whole]
                self._group_known(whole)
                self._plans.forget()
                frames.forget()

    def _group_known(self, sites: list[LinearSite]) -> None:
        """Group the modules that the architecture gives the same input; on a GPU, every other one is a group alone."""
        if not self._fuse:
            return
        known = known_siblings(sites, dict(self._model.named_modules()))
        if self._device.type == "cuda":
            grouped = {id(site) for group in known for site in group}
            known += [[site] for site in sites if id(site) not in grouped]
        for group in known:
            self._make_group(group)

    def _make_group(self, sites: list[LinearSite]) -> None:
        group = ProductGroup(sites, self.count, self._active, self.after, self.compiled_state)
        self._groups.update({id(site): group for site in sites})
        self._plans.forget()
        self._settle([group])
        for site in sites:
            self._placed.note(site)

    def has(self, names: set[str]) -> bool:
        """Tell whether all these deltas have slots."""
        return names <= self._slots.keys()

    def assign(self, name: str, delta: DeviceDelta, binding: Binding) -> int:
        """Return the slot of a delta that is on the device; a delta without a slot gets a free one."""
        with self._lock:
            if name in self._slots:
                return self._slots[name]
            if not self._free:
                self._grow(max(_MORE_SLOTS * self.count, _FIRST_SLOTS))
            self._slots[name] = slot = self._free.pop()
            self._held[name] = delta, binding
            try:
                known = self._fill(slot, delta, binding)
                self._bring()  # not within compiled code, whose memory may belong to a graph
                if not known:
                    groups = dict.fromkeys(self._groups.values())
                    self._plans.learn(slot, delta, binding, self._sites, groups, self._memory)
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

    def _fill(self, slot: int, delta: DeviceDelta, binding: Binding) -> bool:
        """Put a delta into a slot; return True if a plan said how."""
        plan = self._plans.enter(slot, delta, binding)
        for bound in binding.modules if plan is None else plan.others(binding):
            site = self._sites.get(id(bound.serving))
            if site is not None:
                site.put(slot, {key: delta[name] for key, (name, _) in bound.held().items() if name in delta})
        self._settle(self._refresh_groups(plan, slot))
        return plan is not None

    def _refresh_groups(self, plan: SlotPlan | None, slot: int) -> Collection[ProductGroup]:
        """Bring groups up to date whose slot has changed, except what a plan has done; return these groups."""
        groups = set(self._groups.values()) if plan is None else plan.other_groups
        for group in groups:
            group.refresh(slot)
        if plan is None or plan.refreshes:
            self._fresh = False
        return groups

    def release(self, name: str) -> None:
        """Forget a delta's tensors and free its slot, if it has one."""
        with self._lock:
            slot = self._slots.pop(name, None)
            self._held.pop(name, None)
            if slot is not None:
                plan = self._plans.leave(slot)
                for site in self._sites.values() if plan is None else plan.other_sites:
                    site.clear(slot)
                self._refresh_groups(plan, slot)
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
            self._added = 0
            self._placed.forget()
            self._plans.forget()
            frames.forget()

    def _grow(self, count: int) -> None:
        for site in self._sites.values():
            site.grow(count)
        for group in set(self._groups.values()):
            group.grow(count)
        self._free += range(count - 1, self.count - 1, -1)
        self.count = count
        self._fresh = False
        self._added = 0  # the new tables count anew
        self._plans.forget()
        frames.forget()  # the tables are elsewhere

    def _hook(self, site: Site) -> None:
        lookup = self.lookup
        looked_up = lookup is not None and lookup.module is site.module
        hooks = LookupHooks(self, site, lookup) if lookup is not None and looked_up else ModuleHooks(self, site)
        handles = self._hooks[id(site)] = []
        if isinstance(site, WrappedSite):
            handles.append(Wrapped(site, self._active))
            return
        if isinstance(site, EmbeddingSite):
            handles.append(site.module.register_forward_pre_hook(hooks.before, with_kwargs=True))
        # Hooks that a caller registered before see the fine-tune's output, as they would see the unpacked model's.
        after = {"prepend": True, "always_call": looked_up}
        handles.append(site.module.register_forward_hook(hooks.after, with_kwargs=True, **after))
        site.hooked = True

    def _settle(self, groups: Iterable[ProductGroup]) -> None:
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
                frames.forget()
            elif not site.hooked and not site.multiplies_only:
                self._hook(site)
                frames.forget()

    def after(self, site: Site, args: Any, kwargs: Any, output: Any) -> Any:
        """Return a module's output with the deltas of the calling thread; None if there are none."""
        selection = self._active()
        if selection is None:
            return None
        frames.refuse_trace()
        if id(site) in selection.finished:
            selection.finished.discard(id(site))
            if site.multiplies_only and id(site) in self._groups:
                with self._lock:
                    self._settle([self._groups[id(site)]])
            return None
        output = settled(output)
        walk = selection.walk
        if walk is None or walk.follower is None:
            return self._changed(site, selection, args, kwargs, output)
        walk.note(site, args, kwargs, output)
        # How the rows meet an output that is the same for all of them is found out whether it changes or not.
        found = self._changed(site, selection, args, kwargs, output, always=isinstance(site, EmbeddingSite))
        walk.same_rows(found, output)
        return found

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

    def compiled_output(self, site: Site, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return a module's output with the deltas of the calling thread, in compiled code; always a new tensor."""
        compiled_state = self.compiled_state
        compiled_state.used = True
        compiled_state.refuse_captured(site.name)
        selection = self._active()
        output = output.clone(memory_format=torch.contiguous_format)
        if selection is None or not selection.touched:
            return output
        refuse_mixes(selection)
        if not site.changes(selection):
            return output
        site.ran = True
        if id(site) in self._groups:
            selection.multiplied.add(id(site))
        found: torch.Tensor = site.after(selection, (given,), {}, output)
        if found.shape != output.shape:
            raise UsageError(
                f"{site.name} gives another shape with these deltas, and compiled code has one shape; call it as it is"
            )
        return found

    def before(self, site: Site, args: Any, kwargs: Any) -> Any:
        """Return other arguments for a module, or None to keep the given ones."""
        selection = self._active()
        return None if selection is None or not site.changes(selection) else site.before(selection, args, kwargs)

    def _learn(self, site: LinearSite, given: torch.Tensor, selection: Selection) -> None:
        ended = selection.memo("run", SharedInput).observe(site, given)
        if len(ended) > 1 or (ended and self._device.type == "cuda"):
            with self._lock:
                if not any(id(found) in self._groups for found in ended):
                    self._make_group(ended)
                    frames.forget()
                    self._refresh()
