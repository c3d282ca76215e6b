"""Siblings: linear modules that receive the same input (q, k and v; gate and up) share one product.

The siblings are found when a model first runs: modules that are called one after the other with the very same tensor.
From then on, the first of them computes the base's outputs of all siblings, one launch adds the deltas, and the other
outputs wait until their modules are called. If all tokens use one delta and the base's weights are plain, base and
delta are one product. On a GPU, a module without siblings is a group of its own, for the sake of that product.

If a sibling is called with another tensor, or with the same tensor after a change, it computes its output by itself.
Torch does not count the changes of tensors that are made under ``torch.inference_mode``; nothing is shared there.
(``generate`` runs under ``torch.no_grad``.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltafmt.kernels.products import can_fuse, fused_linear, matmul_, repeated_
from deltafmt.kernels.record import MAX_PARTS
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.selection import Selection, Waiting
from deltafmt.runtime.sites import LinearSite
from deltafmt.runtime.uncopied import Uncopied
from deltafmt.runtime.values import version_of

Active = Callable[[], Selection | None]
After = Callable[[LinearSite, Any, Any, Any], Any]


@dataclass(slots=True, eq=False)
class SharedInput:
    """The modules that were called one after the other with the same tensor, which is the last input seen."""

    given: weakref.ref[torch.Tensor] | None = None
    version: int = 0
    sites: list[LinearSite] = field(default_factory=list)

    def observe(self, site: LinearSite, given: torch.Tensor) -> list[LinearSite]:
        """Note a call. If its input is a new one, return the modules that shared the input before."""
        same = self.given is not None and self.given() is given and self.version == version_of(given)
        if same and site not in self.sites and len(self.sites) < MAX_PARTS:
            self.sites.append(site)
            return []
        ended, self.sites = self.sites, [site]
        self.given, self.version = weakref.ref(given), version_of(given)
        return ended


class _Forward(Uncopied):
    """A module's forward while its siblings compute together."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


class Siblings:
    """A group of linear modules with one operand table.

    Args:
        sites: the modules' sites, in the order of their calls.
        slots: the number of slots of the operand tables.
        active: a function that returns the selection of the calling thread, or None.
        after: adds the deltas to the output of a module that has no hook, as a hook would; it gives None if there are
            none.
    """

    def __init__(self, sites: list[LinearSite], slots: int, active: Active, after: After) -> None:
        self.sites = sites
        self._numbers = [id(site) for site in sites]
        self._active = active
        self._after = after
        self._slots: set[int] = set()
        self._table = self._new_table(slots)
        self._forwards: dict[int, tuple[Callable[..., Any], bool]] = {}
        for site in sites:
            for slot in site.table.slots:
                self.refresh(slot)
            self._forwards[id(site)] = site.module.forward, "forward" in site.module.__dict__
            site.module.forward = self._forward_of(site)

    def _new_table(self, slots: int) -> OperandTable:
        rows = [site.rows for site in self.sites]
        operands = self.sites[0].table.operands
        return OperandTable(slots, rows, operands.columns, operands.device)

    def refresh(self, slot: int) -> None:
        """Copy a slot from the modules' own tables, or clear it if none of them has it."""
        if any(slot in site.table.slots for site in self.sites):
            self._table.put(slot, [site.table.operands.operands(slot)[0] for site in self.sites])
            self._slots.add(slot)
        elif slot in self._slots:
            self._table.clear(slot)
            self._slots.discard(slot)

    def grow(self, slots: int) -> None:
        """Make the table larger, for ``slots`` slots."""
        grown = self._new_table(slots)
        for slot in self._slots:
            grown.put(slot, self._table.operands(slot))
        self._table = grown  # now that it is full: another thread may be about to multiply with it

    def dissolve(self) -> None:
        """Give each module its own forward back."""
        for site in self.sites:
            forward, own = self._forwards[id(site)]
            if own:
                site.module.forward = forward
            else:
                site.module.__dict__.pop("forward", None)

    def _forward_of(self, site: LinearSite) -> Callable[..., Any]:
        forward, first = self._forwards[id(site)][0], self.sites[0]

        def fused(*args: Any, **kwargs: Any) -> Any:
            selection = self._active()
            if selection is None or not selection.touched:
                return forward(*args, **kwargs)
            if selection.walk is not None and selection.walk.follower is not None:
                selection.walk.note(site, args, kwargs, None)
            output = None
            if self._serves(selection) and shareable(args, kwargs):
                output = self._take(site, args[0], selection)
                if output is None and site is first:
                    output = self._compute(args[0], selection)
            # Everything is added here, whether the module has a hook or not: one may come or go while this runs.
            selection.finished.discard(id(site))
            selection.multiplied.discard(id(site))
            if output is None:
                output = forward(*args, **kwargs)
            else:
                selection.multiplied.add(id(site))
                if selection.walk is not None and selection.walk.follower is not None:
                    selection.walk.follower.same_rows(output, args[0])
            if id(site) in selection.multiplied and not selection.mixes and site.multiplies_only:
                selection.multiplied.discard(id(site))
                site.ran = True
            else:
                found = self._after(site, args, kwargs, output)
                selection.multiplied.discard(id(site))
                output = output if found is None else found
            if site.hooked:
                selection.finished.add(id(site))
            return output

        return _Forward(fused)

    def _serves(self, selection: Selection) -> bool:
        return not self._slots.isdisjoint(selection.used)

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
        first, leading = self.sites[0], given.shape[:-1]
        order = first.order(selection, given, leading)
        outputs = self._compute_fused(given, selection) if selection.uniform else None
        if outputs is None:
            outputs = [self._forwards[number][0](given) for number in self._numbers]
            segments = order.segments()
            if not repeated_(outputs, given, self._table, segments):
                flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
                x = given.to(flat[0].dtype).reshape(-1, given.shape[-1])
                matmul_(flat, x, self._table, segments)
                outputs = [output.view(*leading, -1) for output in flat]
        selection.waiting = Waiting(given, version_of(given), dict(zip(self._numbers[1:], outputs[1:], strict=True)))
        return outputs[0]

    def _compute_fused(self, given: torch.Tensor, selection: Selection) -> list[torch.Tensor] | None:
        """Return the modules' outputs, base and delta in one product; None if that is not possible.

        All tokens use one delta. It is possible if the base's weights are plain.
        """
        tokens = given.numel() // given.shape[-1]
        (slot,) = selection.used
        if not can_fuse(self._table, slot, tokens):
            return None
        weights = []
        for site in self.sites:
            weight = site.plain_weight(given)
            if weight is None or self._forwards[id(site)][1]:
                return None
            weights.append(weight)
        x = given.reshape(tokens, -1).contiguous()
        return [y.view(*given.shape[:-1], -1) for y in fused_linear(x, weights, self._table, slot)]


def shareable(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call may be shared: it has one tensor, torch counts its changes, and no gradient is wanted."""
    if kwargs or len(args) != 1 or torch.is_grad_enabled():
        return False
    return isinstance(args[0], torch.Tensor) and not args[0].is_inference()
