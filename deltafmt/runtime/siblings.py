"""Linear modules that are given the same input (q, k and v; gate and up): one product for all of them.

Who they are is seen when a model first runs: modules that are called one after the other with the very same tensor.
From then on, the first of them computes the base's outputs of all, has the deltas added by one launch, and leaves the
others' outputs for when they are called. Where all tokens use one delta and the base's weights are plain, base and
delta are one product. On a GPU a module that shares its input with no other is a group of its own, for that product.
Should one then be called with anything but that same, unchanged tensor, it computes for itself as it did before. Torch
doesn't count changes of tensors made under ``torch.inference_mode``, so there nothing is shared; ``generate`` runs
under ``torch.no_grad``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltafmt.kernels.products import can_fuse, fused_linear, matmul_
from deltafmt.kernels.record import MAX_PARTS
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.selection import Selection, Waiting
from deltafmt.runtime.sites import LinearSite
from deltafmt.runtime.values import version_of

Active = Callable[[], Selection | None]


@dataclass(slots=True, eq=False)
class Run:
    """Modules that were called one after the other with the same tensor."""

    given: weakref.ref[torch.Tensor] | None = None
    version: int = 0
    sites: list[LinearSite] = field(default_factory=list)

    def observe(self, site: LinearSite, given: torch.Tensor) -> list[LinearSite]:
        """Note a call; return the run that it ends."""
        same = self.given is not None and self.given() is given and self.version == version_of(given)
        if same and site not in self.sites and len(self.sites) < MAX_PARTS:
            self.sites.append(site)
            return []
        ended, self.sites = self.sites, [site]
        self.given, self.version = weakref.ref(given), version_of(given)
        return ended


class Siblings:
    """A group of linear modules with one operand table.

    Args:
        sites: in the order in which they are called.
        slots: that the tables have.
        active: gives the selection of the calling thread.
    """

    def __init__(self, sites: list[LinearSite], slots: int, active: Active) -> None:
        self.sites = sites
        self._active = active
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
        """Follow a slot of the modules' own tables."""
        if any(slot in site.table.slots for site in self.sites):
            self._table.put(slot, [site.table.operands.operands(slot)[0] for site in self.sites])
            self._slots.add(slot)
        elif slot in self._slots:
            self._table.clear(slot)
            self._slots.discard(slot)

    def grow(self, slots: int) -> None:
        """Make room for a number of slots."""
        old, self._table = self._table, self._new_table(slots)
        for slot in self._slots:
            self._table.put(slot, old.operands(slot))

    def dissolve(self) -> None:
        """Give the modules their own forwards back."""
        for site in self.sites:
            forward, own = self._forwards[id(site)]
            if own:
                site.module.forward = forward
            else:
                site.module.__dict__.pop("forward", None)

    def _forward_of(self, site: LinearSite) -> Callable[..., Any]:
        forward = self._forwards[id(site)][0]

        def fused(*args: Any, **kwargs: Any) -> Any:
            selection = self._active()
            if selection is None or not self._serves(selection) or not shareable(args, kwargs):
                return forward(*args, **kwargs)
            output = self._take(site, args[0], selection)
            if output is None and site is self.sites[0]:
                output = self._compute(args[0], selection)
            if output is None:
                return forward(*args)
            selection.multiplied.add(id(site))
            return output

        return fused

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
        """Return the first module's output with its deltas, and leave those of the others."""
        first = self.sites[0]
        selection.check(given.shape[:-1], first.name)
        flat = self._compute_fused(given, selection)
        if flat is None:
            flat = [self._forwards[id(site)][0](given).reshape(-1, site.rows) for site in self.sites]
            x = given.to(flat[0].dtype).reshape(-1, given.shape[-1])
            matmul_(flat, x, self._table, selection.segments(len(x), first.name))
        shaped = [y.view(*given.shape[:-1], -1) for y in flat]
        others = {id(site): output for site, output in zip(self.sites[1:], shaped[1:], strict=True)}
        selection.waiting = Waiting(given, version_of(given), others)
        return shaped[0]

    def _compute_fused(self, given: torch.Tensor, selection: Selection) -> list[torch.Tensor] | None:
        """Return base and delta of all modules as one product, if one delta serves all tokens and the weights allow."""
        tokens = given.numel() // given.shape[-1]
        if not selection.uniform:
            return None
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
        return list(fused_linear(x, weights, self._table, slot))


def shareable(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a module is called with one tensor of which changes would be seen, and no gradient is wanted."""
    if kwargs or len(args) != 1 or torch.is_grad_enabled():
        return False
    return isinstance(args[0], torch.Tensor) and not args[0].is_inference()
