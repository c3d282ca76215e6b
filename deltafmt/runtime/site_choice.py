"""Which kind of site serves a module."""

from __future__ import annotations

import torch

from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.runtime.binding import BoundModule, Role, weight_shape
from deltafmt.runtime.experts import ExpertsSite
from deltafmt.runtime.sites import LinearSite, Site, TransposedSite
from deltafmt.runtime.sites_other import EmbeddingSite, OtherSite, adds_up
from deltafmt.runtime.substituted import SubstitutedSite


def site_of(bound: BoundModule, device: torch.device, memory: RecordMemory) -> Site:
    """Return a new site for a module, with the records of its operands in a memory."""
    if bound.role is Role.EXPERTS:
        return ExpertsSite(bound.name, bound.module, device)
    shape = weight_shape(bound.serving, bound.role)
    if shape is None:
        made = OtherSite if adds_up(bound.module) else SubstitutedSite
        return made(bound.name, bound.module, device)
    rows, columns = shape
    if bound.role is Role.TRANSPOSED:
        return TransposedSite(bound.name, bound.module, device, columns, rows, memory)
    if bound.role is Role.EMBEDDING:
        return EmbeddingSite(bound.name, bound.module, device, rows, columns, memory)
    site = LinearSite(bound.name, bound.serving, device, rows, columns, memory)
    site.whole, site.summed_bias = bound.module, bound.summed_bias
    return site
