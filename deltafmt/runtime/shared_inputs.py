"""Siblings: linear modules that receive the same input, as q, k and v do, or gate and up.

Those of usual architectures are known by their names. Others are found when a model first runs: modules that are called
one after the other with the very same tensor.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from deltafmt.kernels.record import MAX_PARTS
from deltafmt.runtime.sites import LinearSite
from deltafmt.runtime.values import version_of

# Names of modules of one parent that receive the same input.
_SHARED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)
# An attention that takes one of these may give another input to keys and values.
_OTHER_INPUTS = frozenset(("key_value_states", "encoder_hidden_states", "encoder_output", "memory"))


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


def known_siblings(sites: Iterable[LinearSite], parents: Mapping[str, nn.Module]) -> list[list[LinearSite]]:
    """Return the sites that receive the same input, as their names say, in the order of their calls.

    Args:
        sites: those to be sorted.
        parents: the modules of the model by name.
    """
    by_parent: dict[str, dict[str, LinearSite]] = {}
    for site in sites:
        parent, _, name = site.name.rpartition(".")
        by_parent.setdefault(parent, {})[name] = site
    found = []
    for parent, children in by_parent.items():
        module = parents.get(parent)
        if module is None or not _OTHER_INPUTS.isdisjoint(inspect.signature(type(module).forward).parameters):
            continue
        for names in _SHARED:
            group = [children[name] for name in names if name in children]
            if len(group) > 1 and len({site.columns for site in group}) == 1:
                found.append(group)
    return found
