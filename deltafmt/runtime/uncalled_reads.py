"""Weights that a model reads without calling their module: a head that multiplies with the embedding, tied in code.

Hooks see calls of modules only. The first calls of a model that serve deltas therefore run in a torch mode that sees
every function of torch, and the parameters that it is given. A served parameter that is read outside of its own module
gets the fine-tune's values there: decoded whole and kept for the selection; in a mixed batch, per delta
(:mod:`deltafmt.runtime.per_delta`). A model that never does so runs without the mode from its second call on. Reads
outside of calls are refused (:mod:`deltafmt.runtime.outside_reads`).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from deltafmt.errors import UsageError
from deltafmt.runtime.binding import NEVER_CALLED
from deltafmt.runtime.changes import Watch
from deltafmt.runtime.cuts import WAY_OUT
from deltafmt.runtime.per_delta import group_of, merge_input
from deltafmt.runtime.selection import Selection
from deltafmt.runtime.served_modules import ServedModules
from deltafmt.runtime.shape_queries import FORM_ONLY, function_name, lends_form
from deltafmt.runtime.sites import Site

_Weights = dict[int, tuple["weakref.ref[torch.Tensor]", list[tuple[Site, str]]]]


class Reads:
    """The reads of one model's weights.

    Args:
        model: the model.
        served: its served modules.
        touches: a function that tells whether its caller's block serves a delta of one of some slots.
        watch: notices when a module is given another parameter.
    """

    def __init__(
        self, model: nn.Module, served: ServedModules, touches: Callable[[set[int]], bool], watch: Watch
    ) -> None:
        self._model = model
        self._served = served
        self._touches = touches
        self._watch = watch
        # The weights of the served modules, and the registrations that were counted when they were gathered.
        self._weights: tuple[int, _Weights] | None = None
        self._kinds: set[Hashable] = set()
        self._found: set[str] = set()
        self._warned = False

    def around(self, selection: Selection, kind: Hashable) -> contextlib.AbstractContextManager[object] | None:
        """Return what a call of the model must run in; None if it may run as it is.

        Args:
            selection: what the call serves.
            kind: what tells calls apart that may take other ways through the model.
        """
        if (kind in self._kinds and not self._found) or torch.compiler.is_compiling():
            return None
        self._kinds.add(kind)
        return _Mode(self, self._model, self._served, selection)

    def found(self, site: Site) -> None:
        """Note that a weight was read."""
        self._found.add(site.name)
        self._served.note_ran(site)

    def changed_weight(self, parameter: torch.Tensor) -> str | None:
        """Return the name of a weight that the deltas of the caller's block change; None for any other tensor.

        It is asked for every tensor that a block computes with, and walks no modules: another model that is called
        inside the block costs a look into a table for each of its weights.
        """
        for site, key in self._places(parameter):
            if self._touches(site.slots):
                return f"{site.name}.{key}"
        return None

    def computes_with(self, module: nn.Module, parameter: torch.Tensor) -> bool:
        """Tell whether a module adds the deltas to what it computes with a parameter."""
        if self._served.serves(module):
            family = [module, *self._served.siblings_of(module)]  # it may compute ahead for its siblings
            if any(one in (site.module, site.whole) for site, _ in self._places(parameter) for one in family):
                return True
        own = any(held is parameter for held in module.parameters(recurse=False))
        return own and any(module is one for one in self._model.modules())

    def _places(self, parameter: torch.Tensor) -> list[tuple[Site, str]]:
        """Return the sites that a parameter belongs to, each with its name there."""
        weights = self._weights
        if weights is None or weights[0] != self._watch.registrations:
            weights = self._weights = self._watch.registrations, self._gathered()
        found = weights[1].get(id(parameter))
        return [] if found is None or found[0]() is not parameter else found[1]

    def _gathered(self) -> _Weights:
        gathered: _Weights = {}
        for site in self._served.sites():
            for _, key, parameter in parameters_of(site):
                gathered.setdefault(id(parameter), (weakref.ref(parameter), []))[1].append((site, key))
        return gathered

    def forget(self) -> None:
        """Look again, because the model or its deltas have changed."""
        self._kinds.clear()
        self._weights = None

    def warn(self, selection: Selection) -> None:
        """Warn once of modules that the deltas change and that the model's first call has neither called nor read."""
        if self._warned or not selection.touched:
            return
        self._warned = True
        unused = set(self._served.unused())
        touched = (site for site in self._served.sites() if not site.slots.isdisjoint(selection.touched))
        idle = [site.name for site in touched if site.name in unused]
        if idle:
            shown = ", ".join(f'"{name}"' for name in idle[:3]) + (f" and {len(idle) - 3} others" if idle[3:] else "")
            warnings.warn(
                f"the model has not called {shown}, which deltas change; if it reads the weights there in a way of its "
                "own, it computes with the base's. model.deltas.unused() lists what no call has used yet",
                RuntimeWarning,
                stacklevel=4,
            )


def parameters_of(site: Site) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Yield the parameters that a site's module computes with: the module, the name for the site, and the parameter."""
    for module in {id(site.module): site.module, id(site.whole): site.whole}.values():
        for key, parameter in module.named_parameters(recurse=False):
            yield module, key, parameter
        for name, child in module.named_children():
            if type(child).__name__ in NEVER_CALLED:
                for key, parameter in child.named_parameters(recurse=False):
                    yield module, f"{name}.{key}", parameter


class _Mode(TorchFunctionMode):
    """A torch mode that gives reads of served parameters the fine-tune's values."""

    def __init__(self, reads: Reads, model: nn.Module, served: ServedModules, selection: Selection) -> None:
        super().__init__()
        self._reads = reads
        self._served = served
        self._selection = selection
        self._sites: dict[int, list[tuple[Site, str]]] = {}
        # A module that is tied to a served one, as an embedding is to the head, reads its own weight when it is called.
        self._owners: dict[int, list[nn.Module]] = {}
        for site in served.sites():
            for module, key, parameter in parameters_of(site):
                self._sites.setdefault(id(parameter), []).append((site, key))
                self._owners.setdefault(id(parameter), []).append(module)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in self._sites:
                    self._owners.setdefault(id(parameter), []).append(module)
        # The modules that are running, each time with the siblings whose outputs it may compute ahead.
        self._running: list[set[int]] = []
        self._thread = threading.get_ident()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Any:
        """Watch the modules and the functions."""
        owners = [owner for owners in self._owners.values() for owner in owners]
        # A served module may leave its parameter to a module inside; its siblings still compute while it runs.
        for module in {id(one): one for one in (*owners, *(site.module for site in self._served.sites()))}.values():
            # First, so that a norm's own hook is given each row's values.
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *details: object) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        super().__exit__(*details)  # type: ignore[no-untyped-call]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return None
        given = (*args, *kwargs.values())
        read = any(isinstance(value, nn.Parameter) and id(value) in self._sites for value in given)
        if read:  # a weight that is the input of another module, as a table of positions is of a norm
            args, kwargs = tuple(map(self._replaced, args)), {key: self._replaced(kwargs[key]) for key in kwargs}
        self._running.append({id(module), *map(id, self._served.siblings_of(module))})
        return merge_input(module, args, kwargs) or ((args, kwargs) if read else None)

    def _leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        # Without a module: an error came before it was noted, and ends the call.
        if threading.get_ident() == self._thread and self._running:
            self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name not in FORM_ONLY:
            args = tuple(
                value if lends_form(name, place) else self._replaced(value) for place, value in enumerate(args)
            )
            kwargs = {key: value if lends_form(name, key) else self._replaced(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._replaced(one) for one in value)
        sites = self._sites.get(id(value)) if isinstance(value, nn.Parameter) else None
        if sites is None:
            return value
        owners = self._owners.get(id(value), ())
        if any(id(owner) in running for running in self._running for owner in owners):
            return value
        for site, key in sites:
            self._reads.found(site)
            if site.slots.isdisjoint(self._selection.touched):
                continue
            if site.module is not site.whole:
                raise UsageError(
                    f'the model reads the {key} of "{site.name}" without calling it, and has it cut over processes; '
                    f"{WAY_OUT}"
                )
            return self._chosen(site, key)
        return value

    def _chosen(self, site: Site, key: str) -> torch.Tensor:
        """Return the values of the one delta that all rows use, or values per delta."""
        if self._selection.uniform:
            return site.selected(self._selection, self._selection.slots[0], key)
        group = group_of(self._selection)
        return group.of([site.selected(self._selection, slot, key) for slot in group.slots])
