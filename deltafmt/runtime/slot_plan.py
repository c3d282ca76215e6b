"""How a delta of a known layout gets a slot: worked out from the first such delta, and repeated for the others.

Deltas whose files have one layout, and whose tensors have the same names, change the same modules in the same way. So
their records are written all at once, and no operand is made before somebody asks for it. What is not linear, or
brings more than packed terms, gets its tensors one by one, as it does from the first delta.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from deltafmt.kernels.operand import Operand
from deltafmt.kernels.operand_records import OperandRecords
from deltafmt.kernels.record_memory import RecordMemory, Records, SlotRecords
from deltafmt.kernels.table import Bound, Forms, OperandTable, Parts
from deltafmt.runtime.binding import Arrangement, Binding, BoundModule
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.device_views import DeviceTensors
from deltafmt.runtime.placement import LayoutPlan
from deltafmt.runtime.product_group import ProductGroup
from deltafmt.runtime.sites import LinearSite, Site, WeightSite

# Where allocations begin, that all deltas of a layout may be read alike; no kernel asks for more.
ADDRESS_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class Occupant:
    """The delta in a slot; tables and sites get its parts when they ask."""

    plan: SlotPlan
    delta: DeviceDelta
    made: dict[object, Parts] = field(default_factory=dict)

    def parts(self, key: object) -> Parts:
        """Return the operands in the table of a key."""
        found = self.made.get(key)
        if found is None:
            names = self.plan.names[key]
            found = self.made[key] = tuple(() if name is None else self.delta[name].terms for name in names)
        return found

    def forms(self, key: object) -> Forms:
        """Return the layouts and the rows of these operands, none of which is made for that."""
        return self.plan.forms[key]

    def tensors(self, site: Site) -> Mapping[str, DeviceTensor]:
        """Return the tensors of a site, by the names of its module's parameters."""
        return {"weight": self.delta[self.plan.weights[site]]}


class SlotPlan:
    """Where the parts of a delta go, whatever its slot.

    Args:
        slot: of a delta of the layout that was put there tensor by tensor.
        delta: that delta.
        binding: its binding.
        sites: of all modules, by the ids of the modules.
        groups: all groups.
        memory: of the records.

    Attributes:
        names: the tensor of each part of a table, by the table's key; None for a part that the delta does not change.
        forms: the layout and rows of each operand of a table, by the table's key.
        weights: the tensor that changes a site's weight.
        other_sites: those that get their tensors one by one.
        other_groups: the groups that these belong to.
        refreshes: True if what compiled code can serve is to be found out anew.
    """

    def __init__(
        self,
        slot: int,
        delta: DeviceDelta,
        tensors: DeviceTensors,
        binding: Binding,
        sites: Mapping[int, Site],
        groups: Iterable[ProductGroup],
        memory: RecordMemory,
    ) -> None:
        self.names: dict[object, tuple[str | None, ...]] = {}
        self.forms: dict[object, Forms] = {}
        self.weights: dict[Site, str] = {}
        self._others: list[int] = []
        self.other_sites: list[Site] = []
        self._sites: list[LinearSite] = []
        for number, bound in enumerate(binding.modules):
            site = sites.get(id(bound.serving))
            if site is None or slot not in site.slots:
                continue
            if type(site) is LinearSite and site.only_multiplies(slot):
                self.weights[site] = bound.tensors["weight"]
                self._sites.append(site)
            else:
                self._others.append(number)
                self.other_sites.append(site)
        # Not those that have terms of the slot: a group may be changed by biases alone, or by whole weights.
        changed = [group for group in groups if any(slot in site.slots for site in group.sites)]
        self.other_groups = [
            group for group in changed if any(slot in site.slots and site not in self.weights for site in group.sites)
        ]
        self._groups = [group for group in changed if group not in self.other_groups]
        tables: list[tuple[OperandTable, tuple[str | None, ...]]] = [
            (site.table.operands, (self.weights[site],)) for site in self._sites
        ]
        tables += [
            (group.table, tuple(map(self.weights.get, group.sites))) for group in self._groups if len(group.sites) > 1
        ]
        places: list[tuple[Records, int]] = []
        operands: list[Operand] = []
        seeds: list[int] = []
        self._tables: list[OperandTable] = []
        self._unwritten: list[OperandTable] = []
        self._bounded: list[tuple[OperandTable, tuple[Bound, ...]]] = []
        first = {
            id(operand): tensors.layout.seeds[delta[name].entry.name] + term
            for name in self.weights.values()
            for term, operand in enumerate(delta[name].terms)
        }
        for table, names in tables:
            self.names[table.key], self.forms[table.key] = names, table.forms(slot)
            if bounds := table.bounds_of(slot):
                self._bounded.append((table, bounds))
            found = table.places(slot)
            (self._tables if found else self._unwritten).append(table)
            places += ((records, part) for records, part, _ in found)
            operands += (operand for _, _, operand in found)
            seeds += (first[id(operand)] for _, _, operand in found)
        self._records = OperandRecords(operands, tensors.address, seeds)
        self._places = SlotRecords(memory, places)
        self._slots = [slots for site in self._sites for slots in (site.slots, site.table.slots)]
        self._slots += (group.slots for group in self._groups)
        self._residue = tensors.address % ADDRESS_ALIGNMENT
        self.refreshes = bool(self._bounded) or any(isinstance(site, WeightSite) for site in self.other_sites)

    def others(self, binding: Binding) -> list[BoundModule]:
        """Return the modules of a binding that get their tensors one by one."""
        return [binding.modules[number] for number in self._others]

    def fits(self, tensors: DeviceTensors) -> bool:
        """Tell whether a delta of the layout lies where kernels can read it as they read the first one."""
        return tensors.address % ADDRESS_ALIGNMENT == self._residue

    def enter(self, slot: int, delta: DeviceDelta, tensors: DeviceTensors) -> None:
        """Give a delta of the layout a slot, except in the other modules; a flush brings the records to the device."""
        occupant = Occupant(self, delta)
        for slots in self._slots:
            slots.add(slot)
        for site in self._sites:
            site.tensors[slot] = occupant
        for table in self._tables:
            table.held[slot] = occupant
        for table in self._unwritten:
            table.put_later(slot, occupant)
        for table, bounds in self._bounded:
            table.bound(slot, bounds)
        for group in self._groups:
            group.version += 1
        # Behind the operands: a thread that writes the records of a table at the same time takes them from there.
        assert tensors.seeds is not None
        self._places.write(slot, self._records.of(tensors.address, tensors.seeds))

    def leave(self, slot: int) -> None:
        """Empty the slot of a delta that entered, except in the other modules."""
        for slots in self._slots:
            slots.discard(slot)
        for site in self._sites:
            site.tensors.pop(slot, None)
        for table in self._tables:
            table.held[slot] = table.empty
        for table in self._unwritten:
            table.put_later(slot, table.empty)
        for table, _ in self._bounded:
            table.bound(slot, ())
        for group in self._groups:
            group.version += 1
        self._places.write(slot, None)


class SlotPlans:
    """The plans of a model's modules, which hold until a module, a group or a table changes."""

    def __init__(self) -> None:
        self._plans: weakref.WeakKeyDictionary[LayoutPlan, dict[Arrangement, SlotPlan]] = weakref.WeakKeyDictionary()
        self._used: dict[int, SlotPlan] = {}

    def forget(self) -> None:
        """Forget all plans, because a module, a group or a table has changed."""
        self._plans.clear()
        self._used.clear()

    def enter(self, slot: int, delta: DeviceDelta, binding: Binding) -> SlotPlan | None:
        """Give a delta a slot; return None, and do nothing, if no plan says how."""
        tensors = delta.tensors
        if not isinstance(tensors, DeviceTensors):
            return None
        plan = self._plans.get(tensors.layout, {}).get(binding.arrangement)
        if plan is None or not plan.fits(tensors):
            return None
        self._used[slot] = plan
        plan.enter(slot, delta, tensors)
        return plan

    def learn(
        self,
        slot: int,
        delta: DeviceDelta,
        binding: Binding,
        sites: Mapping[int, Site],
        groups: Iterable[ProductGroup],
        memory: RecordMemory,
    ) -> None:
        """Keep how a delta was put into a slot, tensor by tensor, for the next one of its layout."""
        tensors = delta.tensors
        if isinstance(tensors, DeviceTensors) and tensors.seeds is not None:
            plan = SlotPlan(slot, delta, tensors, binding, sites, groups, memory)
            self._plans.setdefault(tensors.layout, {})[binding.arrangement] = plan

    def leave(self, slot: int) -> SlotPlan | None:
        """Empty the slot of a delta that entered by a plan; return None, and do nothing, if it did not."""
        plan = self._used.pop(slot, None)
        if plan is not None:
            plan.leave(slot)
        return plan
