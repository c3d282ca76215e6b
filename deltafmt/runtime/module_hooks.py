"""The hooks of a served module, as torch calls them around its forward."""

from __future__ import annotations

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
        self.key = new_key(self, served.standing.device)

    def before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run before the module's forward."""
        if torch.compiler.is_compiling():
            return None  # the ids of new rows, which would be changed here, are not served by compiled code
        return self._served.before(self._site, args, kwargs)

    def after(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Run after the module's forward."""
        if torch.compiler.is_compiling():
            if kwargs or len(args) != 1 or not isinstance(output, torch.Tensor) or torch.is_grad_enabled():
                return frames.untraced(self._served.after, (self._site, args, kwargs, output), {})
            return operations.output(args[0], output, self.key)
        return self._served.after(self._site, args, kwargs, output)

    def output(self, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return the output with the deltas that are served now, within compiled code."""
        return self._served.compiled_output(self._site, given, output)
