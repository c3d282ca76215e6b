"""The hooks of a served module, as torch calls them around its forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltafmt.runtime import frames, operations
from deltafmt.runtime.operations import new_key
from deltafmt.runtime.sites import Site
from deltafmt.runtime.uncopied import Uncopied

if TYPE_CHECKING:
    from deltafmt.runtime.served_modules import ServedModules


class ModuleHooks(Uncopied):
    """The hooks of one module. A copy of the module would have them too, and compute with this one's weights."""

    def __init__(self, served: ServedModules, site: Site) -> None:
        self._served = served
        self._site = site
        self.key = new_key(self, served.compiled_state.device)

    def before(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Run before the module's forward; before another module's, to which a library took the hook, do nothing."""
        if torch.compiler.is_compiling() or module is not self._site.module:
            return None  # the ids of new rows, which would be changed here, are not served by compiled code
        return self._served.before(self._site, args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        """Run after the module's forward; after another module's, to which a library took the hook, do nothing."""
        if module is not self._site.module:
            return None
        if torch.compiler.is_compiling():
            if kwargs or len(args) != 1 or not isinstance(output, torch.Tensor) or torch.is_grad_enabled():
                return frames.untraced(self._served.after, (self._site, args, kwargs, output), {})
            return operations.output(args[0], output, self.key)
        return self._served.after(self._site, args, kwargs, output)

    def output(self, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return the output with the deltas that are served now, within compiled code."""
        return self._served.compiled_output(self._site, given, output)


@dataclass(frozen=True, slots=True)
class Lookup:
    """What is done around a caller's own call of the embedding, which gives a model its ``inputs_embeds``.

    Attributes:
        module: the embedding.
        enter: notes the rows of the ids, given the module, its arguments and its keyword arguments.
        leave: forgets them.
    """

    module: nn.Module
    enter: Callable[[nn.Module, Any, Any], None]
    leave: Callable[[], None]


class LookupHooks(ModuleHooks):
    """The hooks of the embedding that callers may call themselves; ``after`` is to run when the forward failed, too.

    The lookup has no hooks of its own: torch 2.11 guards compiled code by a hook's number in the order in which hooks
    were registered, and asks for the one with this number in their present order, which ``prepend`` changes.
    """

    def __init__(self, served: ServedModules, site: Site, lookup: Lookup) -> None:
        super().__init__(served, site)
        self._lookup = lookup

    def before(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Run before the module's forward."""
        if torch.compiler.is_compiling() or module is not self._site.module:
            return None
        self._lookup.enter(module, args, kwargs)
        try:
            return super().before(module, args, kwargs)
        except BaseException:
            self._lookup.leave()
            raise

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        """Run after the module's forward, whose output is None if it failed."""
        if torch.compiler.is_compiling() or module is not self._site.module:
            return super().after(module, args, kwargs, output)
        try:
            return None if output is None else super().after(module, args, kwargs, output)
        finally:
            self._lookup.leave()
