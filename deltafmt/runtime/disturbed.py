"""What callers do to served modules after deltas were attached: another forward or class, a hook before ours, no hooks.

Torch tells nobody of these. They are looked at when a block is first used and before every prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.runtime.sites import Site


class Placed:
    """The forwards and hooks of served modules, as they were when the deltas were attached."""

    def __init__(self) -> None:
        self._forwards: dict[int, tuple[Site, Callable[..., Any] | None, type[nn.Module]]] = {}

    def note(self, site: Site) -> None:
        """Take the forward and the class that a module has now for the right ones."""
        self._forwards[id(site)] = site, site.module.__dict__.get("forward"), type(site.module)

    def forget(self) -> None:
        """Forget all modules."""
        self._forwards.clear()

    def disturbed(self, hooks: Callable[[int], Iterable[object]]) -> bool:
        """Tell whether a module has another forward or class now, or its hook does not run first any more.

        Args:
            hooks: a function that returns the hooks of a site, by its id.
        """
        for key, (site, forward, kind) in self._forwards.items():
            module = site.module
            if module.__dict__.get("forward") != forward or type(module) is not kind:
                return True
            if any(isinstance(hook, RemovableHandle) and not _is_first(module, hook) for hook in hooks(key)):
                return True
        return False


def _is_first(module: nn.Module, hook: RemovableHandle) -> bool:
    """Tell whether a forward hook runs before all others; a hook before the forward counts wherever it stands."""
    first = next(iter(module._forward_hooks), None)  # noqa: SLF001 - torch has no other name for it
    return hook.id == first or hook.id in module._forward_pre_hooks  # noqa: SLF001
