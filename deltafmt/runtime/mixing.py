"""Sums of several deltas with weights, in a row of a batch: ``{"math": 0.7, "style": 0.3}``.

The served modules are linear in their parameters: a matrix, an embedding, a bias, the weight of a norm. The output of a
sum of deltas is therefore the base's output and, for each delta, its weight times what the delta alone changes.
"""

from __future__ import annotations

from typing import Any

import torch

from deltafmt.errors import UsageError
from deltafmt.runtime.orders import Order
from deltafmt.runtime.per_row import per_row
from deltafmt.runtime.row_places import OUTPUT
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.sites import Site, first_input
from deltafmt.runtime.sites_other import EmbeddingSite, OtherSite


def mixed_output(site: Site, selection: Selection, args: Any, kwargs: Any, output: Any, *, changed: bool) -> Any:
    """Return a module's output for a batch in which some rows use sums of deltas.

    Args:
        site: the module's site.
        selection: the rows.
        args, kwargs: what the module was called with.
        output: what it gave: the base's output, with the products of single deltas where those were fused.
        changed: True if a row uses a single delta that changes the module.

    Raises:
        UsageError: the module is not linear in its parameters.
    """
    mixes = {mix: [t for t in terms if t[0] in site.slots] for mix, terms in selection.mixes.items()}
    mixes = {mix: terms for mix, terms in mixes.items() if terms}
    if not mixes:
        return site.after(selection, args, kwargs, output) if changed else None
    if isinstance(site, OtherSite) and not site.linear:
        raise UsageError(
            f"{site.name}, a {type(site.module).__name__}, is not linear in its parameters; a row takes one delta there"
        )
    base = given = output.clone()  # sites write to the output that they are given
    order = _order(site, selection, args, kwargs, output)
    if order is None:
        return per_row(
            site,
            site.name,
            selection,
            given,
            site.slots,
            lambda slot: site.after(selection.alone(slot), args, kwargs, given.clone()),
        )
    result = site.after(selection, args, kwargs, output) if changed else base.clone()
    result = result.contiguous()
    flat = result.view(-1, result.shape[-1])
    before = base.reshape(len(flat), -1).float()
    sums: dict[int, torch.Tensor] = {}
    for slot in sorted({slot for terms in mixes.values() for slot, _ in terms}):
        # Only rows of sums are taken of these outputs, and there ``base`` has no delta yet.
        found = site.after(selection.alone(slot), args, kwargs, given.clone())
        change = found.expand(base.shape).reshape(before.shape).float() - before
        for mix, terms in mixes.items():
            for weight in (weight for one, weight in terms if one == slot):
                sums[mix] = weight * change + sums[mix] if mix in sums else weight * change
    for mix, change in sums.items():
        mine = order.members(mix)
        flat[mine, : before.shape[1]] = (before[mine] + change[mine]).to(flat.dtype)
    return result


def _order(site: Site, selection: Selection, args: Any, kwargs: Any, output: torch.Tensor) -> Order | None:
    """Return the order of the deltas in a module's output; None for an embedding that depends on no row."""
    if isinstance(site, EmbeddingSite):
        return selection.order(site, OUTPUT, output, output.shape[:-1], site.name)
    if isinstance(site, OtherSite):
        return site.order(selection, output, output.shape[:-1], OUTPUT)
    given = first_input(args, kwargs)
    return site.order(selection, given, given.shape[:-1])
