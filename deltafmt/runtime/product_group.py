"""The products that linear modules share which receive the same input (q, k and v; gate and up).

The first of them computes the base's outputs of all siblings, one launch adds the deltas, and the other outputs wait
until their modules are called. If all tokens use one delta and the base's weights are plain, base and delta are one
product. On a GPU, a module without siblings is a group of its own, for the sake of that product.

What was decided for an input is kept with the places of the rows, as a *routine*: in the next steps a group takes the
base's outputs and launches, and decides nothing. A routine holds for the same deltas, the same rows and inputs of the
same form, until a slot of the group changes.

If a sibling is called with another tensor, or with the same tensor after a change, it computes its output by itself.
Torch does not count the changes of tensors that are made under ``torch.inference_mode``; nothing is shared there.
(``generate`` runs under ``torch.no_grad``.)

While the compiler looks on, the same is done without a selection: the code that it makes is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltafmt.kernels.products import bind_fused, bind_product, can_fuse, fused_linear, matmul_, multiply_recorded_
from deltafmt.kernels.recorded_launches import BoundLaunches
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.compiled_products import multiply_now
from deltafmt.runtime.compiled_state import CompiledState
from deltafmt.runtime.frames import check_input, graph_now, note_input, refuse_trace, untraced
from deltafmt.runtime.operations import multiply_, new_key
from deltafmt.runtime.selection import Selection, Waiting
from deltafmt.runtime.served_linear import ServedLinear, restore
from deltafmt.runtime.sites import LinearSite
from deltafmt.runtime.uncopied import Uncopied
from deltafmt.runtime.values import version_of

Active = Callable[[], Selection | None]
After = Callable[[LinearSite, Any, Any, Any], Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Routine:
    """How a group's product is made of inputs of one form.

    Attributes:
        version: of the group when the routine was made.
        product: the launches.
        segments: which token uses which delta; None if base and delta are one product.
    """

    version: int
    product: BoundLaunches
    segments: Segments | None


class _Member(Uncopied):
    """One module of a group. Its ``run`` is the module's forward where the module's class cannot be changed.

    It is a method, because compiled code takes methods of equal modules for the same, and functions for different ones.
    """

    __slots__ = ("__weakref__", "group", "key", "number", "plain", "site")

    def __init__(self, group: ProductGroup, number: int, site: LinearSite, plain: Callable[..., Any]) -> None:
        self.group = group
        self.number = number
        self.site = site
        self.plain = plain

    def place(self) -> None:
        """Make ``run`` the module's forward."""
        self.key = new_key(self, self.group.compiled_state.device)
        self.site.module.forward = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        if torch.compiler.is_compiling():
            return self.group.traced(self.number, args, kwargs)
        return self.group.computed(self, args, kwargs)

    def computed(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for code that is not compiled."""
        return self.group.computed(self, args, kwargs)

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Add the products of the deltas that are served now to the output of this module alone."""
        multiply_now(outputs, given, self.site.table.operands, self.group.compiled_state, [self.site])


class ProductGroup:
    """A group of linear modules with one operand table.

    Args:
        sites: the modules' sites, in the order of their calls.
        slots: the number of slots of the operand tables.
        active: a function that returns the selection of the calling thread, or None.
        after: adds the deltas to the output of a module that has no hook, as a hook would; it gives None if there are
            none.
        compiled_state: what compiled code reads.

    Attributes:
        members: the modules' forwards.
        slots: the slots of the deltas that change one of the modules.
        version: how often a slot of the group has changed.
        key: stands for the group in compiled code, if its modules keep their classes.
        plain: the modules' own forwards.
    """

    def __init__(
        self, sites: list[LinearSite], slots: int, active: Active, after: After, compiled_state: CompiledState
    ) -> None:
        self.sites = sites
        self._numbers = [id(site) for site in sites]
        self._active = active
        self._after = after
        self.compiled_state = compiled_state
        for site in sites:
            restore(site.module)  # before its forward is taken for its own
        self.plain = [site.module.forward for site in sites]
        self.slots: set[int] = set()
        self._alone = len(sites) == 1
        self.version = 0
        self._table = None if self._alone else self._new_table(slots)
        self._forwards: dict[int, tuple[Callable[..., Any], bool]] = {}
        for site in sites:
            for slot in site.table.slots:
                self.refresh(slot)
            self._forwards[id(site)] = site.module.forward, "forward" in site.module.__dict__
        self.members = [_Member(self, number, site, self.plain[number]) for number, site in enumerate(sites)]
        modules = [site.module for site in sites]
        self._classes = ServedLinear(modules, self.members, self) if ServedLinear.takes(modules) else None
        if self._classes is None:
            self.key = new_key(self, compiled_state.device)
            for member in self.members:
                member.place()

    def _new_table(self, slots: int) -> OperandTable:
        rows = [site.rows for site in self.sites]
        operands = self.sites[0].table.operands
        return OperandTable(slots, rows, operands.columns, operands.device, operands.memory)

    @property
    def table(self) -> OperandTable:
        """The operands of all modules; a single module's own table."""
        return self.sites[0].table.operands if self._table is None else self._table

    def refresh(self, slot: int) -> None:
        """Copy a slot from the modules' own tables, or clear it if none of them has it."""
        if any(slot in site.table.slots for site in self.sites):
            if self._table is not None:
                self._table.put(slot, [site.table.operands.operands(slot)[0] for site in self.sites])
            self.slots.add(slot)
        elif slot in self.slots:
            if self._table is not None:
                self._table.clear(slot)
            self.slots.discard(slot)
        self.version += 1

    def grow(self, slots: int) -> None:
        """Make the table larger, for ``slots`` slots."""
        if self._table is not None:
            self._table = self._table.grown(slots)
        self.version += 1

    def dissolve(self) -> None:
        """Give each module its own forward back, unless a caller has put another one there."""
        if self._classes is not None:
            self._classes.close()
            return
        for site, member in zip(self.sites, self.members, strict=True):
            forward, own = self._forwards[id(site)]
            if site.module.__dict__.get("forward") != member.run:
                continue
            if own:
                site.module.forward = forward
            else:
                site.module.__dict__.pop("forward", None)

    def computed(self, member: _Member, args: Any, kwargs: Any) -> Any:
        """Return a module's output, as the calling thread's selection wants it."""
        selection = self._active()
        if selection is None or not selection.touched:
            return member.plain(*args, **kwargs)
        refuse_trace()
        site, output = member.site, None
        shared = shareable(args, kwargs, alone=self._alone)
        if shared and selection.routines is not None:
            output = self._by_routine(member, args[0], selection, selection.routines)
            if output is not None:
                return _served(site, selection, output)
        if selection.walk is not None:
            selection.walk.note(site, args, kwargs, None)
        if shared and not self.slots.isdisjoint(selection.used):
            output = self._take(site, args[0], selection)
            if output is None and member.number == 0:
                output = self._compute(args[0], selection)
        # Everything is added here, whether the module has a hook or not: one may come or go while this runs.
        selection.finished.discard(id(site))
        if output is not None:
            if selection.walk is not None:
                selection.walk.same_rows(output, args[0])
            if site.multiplies_only and not selection.mixes:
                return _served(site, selection, output)
            selection.multiplied.add(id(site))
        else:
            selection.multiplied.discard(id(site))
            output = member.plain(*args, **kwargs)
        found = self._after(site, args, kwargs, output)
        selection.multiplied.discard(id(site))
        if site.hooked:
            selection.finished.add(id(site))
        return output if found is None else found

    def _by_routine(
        self, member: _Member, given: torch.Tensor, selection: Selection, routines: dict[object, Any]
    ) -> torch.Tensor | None:
        """Return a module's output, if a routine says how; the outputs of the others wait for their calls."""
        waiting = selection.waiting
        if waiting is not None and waiting.complete and waiting.given is given:
            output = self._take(member.site, given, selection)
            if output is not None:
                return output
        routine: _Routine | None = routines.get(self) if member.number == 0 else None
        if routine is None or routine.version != self.version or not routine.product.takes(given):
            return None
        if routine.segments is None:
            weights = self._plain_weights(given)
            outputs = [given.new_empty(*given.shape[:-1], site.rows) for site in self.sites]
            if weights is None or not routine.product.run([*outputs, *weights], given):
                return None
        else:
            outputs = [forward(given) for forward in self.plain]
            if not routine.product.run(outputs, given):
                outputs = self._multiply(outputs, given, routine.segments)
        self._keep(given, selection, outputs, complete=True)
        return outputs[0]

    def traced(self, number: int, args: Any, kwargs: Any) -> Any:
        """Return a module's output while the compiler looks on: the same code for every selection.

        The first module's call computes for all, and the others take their outputs if they are given the same tensor.
        """
        if kwargs or len(args) != 1 or torch.is_grad_enabled():
            return untraced(self.members[number].computed, args, kwargs)
        given = args[0]
        if number == 0:
            outputs = [forward(given) for forward in self.plain]
            multiply_(outputs, given, self.key)
            if len(outputs) > 1:
                note_input(self.key, given)
                self.compiled_state.ahead = self.key, given, [None, *outputs[1:]], graph_now()
            return outputs[0]
        ahead = self.compiled_state.ahead
        output = ahead[2][number] if ahead is not None and ahead[0] is self.key and ahead[1] is given else None
        # Another graph cannot tell whether the input was written to since.
        if ahead is not None and output is not None and ahead[3] == graph_now():
            check_input(self.key, given)
            ahead[2][number] = None
            if number == len(self.plain) - 1:
                self.compiled_state.ahead = None
            return output
        output = self.plain[number](given)
        multiply_([output], given, self.members[number].key)
        return output

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Add the products of the deltas that are served now to the outputs of all modules."""
        multiply_now(outputs, given, self.table, self.compiled_state, self.sites)

    @staticmethod
    def _take(site: LinearSite, given: torch.Tensor, selection: Selection) -> torch.Tensor | None:
        waiting = selection.waiting
        if waiting is None or waiting.given is not given or waiting.version != version_of(given):
            return None
        output = waiting.outputs.pop(id(site), None)
        if not waiting.outputs:
            selection.waiting = None
        return output

    def _compute(self, given: torch.Tensor, selection: Selection) -> torch.Tensor:
        """Return the first module's output with its deltas; the outputs of the others wait for their calls."""
        version, order = self.version, self.sites[0].order(selection, given, given.shape[:-1])
        weights = self._fusable(given, selection)
        outputs = None if weights is None else self._compute_fused(given, selection, weights)
        routines = selection.routines if selection.steady(given) else None
        if weights is not None and outputs is not None:
            (slot,) = selection.used
            self._keep_routine(routines, version, bind_fused(outputs, given, weights, self.table, slot), None)
        elif outputs is None:
            outputs = [forward(given) for forward in self.plain]
            segments = order.segments()
            outputs = self._multiply(outputs, given, segments)
            if weights is None:
                self._keep_routine(routines, version, bind_product(outputs, given, self.table, segments), segments)
        self._keep(given, selection, outputs, complete=False)
        return outputs[0]

    def _multiply(self, outputs: list[torch.Tensor], given: torch.Tensor, segments: Segments) -> list[torch.Tensor]:
        """Return outputs of the base with the deltas' products, which are added in place if that is possible."""
        if multiply_recorded_(outputs, given, self.table, segments):
            return outputs
        flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
        x = given.to(flat[0].dtype).reshape(-1, given.shape[-1])
        matmul_(flat, x, self.table, segments)
        return [output.view(*given.shape[:-1], -1) for output in flat]

    def _keep_routine(
        self, routines: dict[object, Any] | None, version: int, product: BoundLaunches | None, segments: Segments | None
    ) -> None:
        """Keep how a product was made, for the next input of the same form."""
        if routines is not None and product is not None and all(site.multiplies_only for site in self.sites):
            routines[self] = _Routine(version, product, segments)

    def _keep(self, given: torch.Tensor, selection: Selection, outputs: list[torch.Tensor], *, complete: bool) -> None:
        others = dict(zip(self._numbers[1:], outputs[1:], strict=True))
        selection.waiting = Waiting(given, version_of(given), others, complete) if others else None

    def _fusable(self, given: torch.Tensor, selection: Selection) -> list[torch.Tensor] | None:
        """Return the modules' weights if base and delta can be one product; otherwise None.

        They can if all tokens use one delta, and the base's weights are plain.
        """
        if not selection.uniform:
            return None
        (slot,) = selection.used
        if not can_fuse(self.table, slot, given.numel() // given.shape[-1]):
            return None
        return self._plain_weights(given)

    def _plain_weights(self, given: torch.Tensor) -> list[torch.Tensor] | None:
        """Return the modules' weights if all that the modules do is to multiply with these; otherwise None."""
        weights = []
        for site in self.sites:
            weight = site.plain_weight(given)
            if weight is None or self._forwards[id(site)][1]:
                return None
            weights.append(weight)
        return weights

    def _compute_fused(
        self, given: torch.Tensor, selection: Selection, weights: list[torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """Return the modules' outputs, base and delta in one product; None while its kernels are being compiled."""
        (slot,) = selection.used
        x = given.reshape(-1, given.shape[-1]).contiguous()
        found = fused_linear(x, weights, self.table, slot)
        return None if found is None else [y.view(*given.shape[:-1], -1) for y in found]


def _served(site: LinearSite, selection: Selection, output: torch.Tensor) -> torch.Tensor:
    """Return an output that has all that the deltas change."""
    site.ran = True
    if site.hooked:
        selection.finished.add(id(site))
    return output


def shareable(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, alone: bool = False) -> bool:
    """Tell whether a call may be shared: it has one tensor, torch counts its changes, and no gradient is wanted.

    Args:
        args, kwargs: of the call.
        alone: the module has no siblings, so that nothing depends on changes.
    """
    if kwargs or len(args) != 1 or torch.is_grad_enabled():
        return False
    return isinstance(args[0], torch.Tensor) and (alone or not args[0].is_inference())
