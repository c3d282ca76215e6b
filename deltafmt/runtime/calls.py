"""The calls of a model: each is bound to one selection from its beginning to its end.

``model(...)`` and ``model.generate(...)`` take ``delta=``: a name for all rows, or one for each row. Without it, a call
belongs to the block that it is made in. Torch has no hook around a whole call that also ends with an interrupt, so the
model's own ``forward``, ``generate`` and ``generate_batch`` are wrapped, as accelerate wraps them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.errors import UsageError
from deltafmt.runtime import frames
from deltafmt.runtime.batch_inputs import named
from deltafmt.runtime.computed_by import BASE_ALONE, ComputedBy, check_caches, mark_caches
from deltafmt.runtime.continuous import UNNAMED, Continuous
from deltafmt.runtime.continuous import Server as ContinuousServer
from deltafmt.runtime.delta_holds import Attached, Held
from deltafmt.runtime.model_batch import batch_of, embedding_of, models_in
from deltafmt.runtime.module_hooks import Lookup
from deltafmt.runtime.outside_reads import InCall
from deltafmt.runtime.per_delta import group_of, merge
from deltafmt.runtime.row_places import Forms
from deltafmt.runtime.rows import Names
from deltafmt.runtime.scope import Block, Bound
from deltafmt.runtime.selection import Entry, Selection, rows_error
from deltafmt.runtime.served_modules import ServedModules
from deltafmt.runtime.uncopied import Uncopied, refuse_copy


class Server(ContinuousServer, Protocol):
    """What the calls of a model ask of its deltas."""

    forms: Forms
    served: ServedModules

    @property
    def merged(self) -> str | None:
        """The name of the delta that is merged into the base's weights."""

    def known(self, name: str) -> Attached:
        """Return the present version of a delta."""

    def use(self, names: Names, *, wait: float = 0) -> Block:
        """Return a block."""

    def vocabulary(self) -> int | None:
        """Return the rows of the base's output head."""


class _Part(Uncopied):
    """The forward of a model inside the model. A copy of that model would have it, too, and run this one."""

    def __init__(self, calls: Calls, module: nn.Module) -> None:
        self._calls, self._module, self._original = calls, module, module.forward
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._calls.part(self._module, self._original, args, kwargs)


class Calls:
    """The wrapped methods of one model.

    Args:
        model: the model.
        server: its deltas.
    """

    def __init__(self, model: nn.Module, server: Server) -> None:
        self._model = model
        self._name = type(model).__name__
        self._server = server
        self._scope = server.scope
        self._compiled = frames.CompiledParts(model)
        self._before: dict[str, object] = {}
        self._closed = False
        self._names: dict[tuple[int, str], tuple[str, ...]] = {}
        self._hooks: list[RemovableHandle] = []
        self._parts: list[tuple[nn.Module, object]] = []
        if next(model.children(), None) is not None:
            self._wrap("forward", functools.partial(self._forward, "forward"))
            for name in dir(type(model)):  # a tower's features, with the projection behind the tower
                if name.startswith("get_") and name.endswith("_features") and callable(getattr(model, name)):
                    self._wrap(name, functools.partial(self._forward, name))
            for module in models_in(model):
                if module is not model:
                    self._parts.append((module, module.__dict__.get("forward", UNNAMED)))
                    module.forward = _Part(self, module)
            embedding = embedding_of(model)
            if embedding is not None:
                server.served.lookup = Lookup(embedding, self._enter_lookup, self._leave_lookup)
        else:  # the model is itself a served module, whose hooks run outside of its forward
            self._hooks.append(model.register_forward_pre_hook(self._enter_leaf, with_kwargs=True))
        continuous = Continuous(self._name, server, lambda: self._closed)
        for name, wrapped in (
            ("generate", self._generate),
            ("generate_batch", continuous.generate_batch),
            ("init_continuous_batching", continuous.init),
        ):
            if callable(getattr(model, name, None)):
                self._wrap(name, wrapped)
        for name in ("__deepcopy__", "__reduce_ex__"):
            self._set(name, refuse_copy)

    def close(self) -> None:
        """Give the model its own methods back."""
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        for module, value in [
            *((module, ("forward", value)) for module, value in self._parts),
            *((self._model, item) for item in self._before.items()),
        ]:
            key, before = value
            if before is UNNAMED:
                module.__dict__.pop(key, None)
            else:
                module.__dict__[key] = before

    def _set(self, name: str, value: object) -> None:
        self._before[name] = self._model.__dict__.get(name, UNNAMED)
        self._model.__dict__[name] = value

    def _wrap(self, name: str, method: Callable[..., Any]) -> None:
        original = getattr(self._model, name)

        @frames.outside
        @functools.wraps(original)
        def wrapped(*args: Any, delta: Any = UNNAMED, **kwargs: Any) -> Any:
            if self._closed:
                return original(*args, **kwargs)
            compiler = frames.suspend()
            try:
                run = original if compiler is None else frames.compiled(original, compiler)
                return method(run, delta, args, kwargs)
            finally:
                frames.resume(compiler)

        self._set(name, wrapped)

    def _within(self, delta: Any, call: Callable[[Block | None], Any]) -> Any:
        """Run a call in the block that it names, or else in the block that it is made in."""
        if delta is UNNAMED:
            return call(self._scope.here())
        block = self._server.use(delta)
        block.open()
        try:
            return call(block)
        finally:
            block.close()

    def _forward(self, name: str, original: Callable[..., Any], delta: Any, args: Any, kwargs: Any) -> Any:
        call = self._scope.call
        if call.bound and delta is UNNAMED:
            return self._run(name, original, args, kwargs, batch_of(args, kwargs))

        def once(block: Block | None) -> Any:
            frames.refuse_recording(block is not None)
            batch = None
            if block is not None or self._server.served.compiled_state.used or frames.plain(original) is not original:
                batch = batch_of(args, kwargs)
            if block is not None:
                self._server.check_model(closely=batch is None or batch[1] > batch[0])
            with Bound(self._scope, block) as bound:
                output = self._run(name, original, args, kwargs, batch)
                if bound.selection is not None:
                    self._server.reads.warn(bound.selection)
                return output

        return self._within(delta, once)

    def _run(
        self, name: str, original: Callable[..., Any], args: Any, kwargs: Any, batch: tuple[int, int] | None
    ) -> Any:
        """Run the model's forward with the selection that the call is bound to, and mark the caches that it fills."""
        by, given = self._computed_by(self._scope.call.block), self._given(self._model, name, original, args, kwargs)
        if by is not None:
            check_caches(given, by, self._name)
        output = self._run_bound(name, original, args, kwargs, given, batch)
        if by is not None:
            mark_caches(output, by)
        return output

    def _computed_by(self, block: Block | None) -> ComputedBy | None:
        """Return what a call in a block serves; None for a batch of several requests, which has its own cache."""
        if block is not None:
            return held_of(block).computed_by
        if self._scope.call.selection is not None:
            return None
        merged = self._server.merged
        if merged is None:
            return BASE_ALONE
        return ComputedBy.of((((self._server.known(merged).identity, 1.0),),), f'"{merged}"')

    def _run_bound(
        self,
        name: str,
        original: Callable[..., Any],
        args: Any,
        kwargs: Any,
        given: dict[str, Any],
        batch: tuple[int, int] | None,
    ) -> Any:
        call = self._scope.call
        selection, block = call.selection, call.block
        if selection is None:
            return self._run_compiled(original, args, kwargs, batch, None)
        if kwargs.get("labels") is not None and block is not None:
            held_of(block).check_loss(self._server.vocabulary())
        with self._entry(selection, self._model, name, given):
            if not selection.touched:
                return self._run_compiled(original, args, kwargs, batch, None)
            kind = (name, tuple(kwargs), batch is not None and batch[0] == batch[1], selection.uniform)
            around = self._server.reads.around(selection, kind)
            if around is None:
                return self._run_compiled(original, args, kwargs, batch, selection)
            group = group_of(selection)
            before = group.alive()
            with frames.uncompiled(), around:
                output = merge(frames.plain(original)(*args, **kwargs))
            group.refuse_kept(before)
            return output

    def _run_compiled(
        self, original: Callable[..., Any], args: Any, kwargs: Any, batch: tuple[int, int] | None, selection: Any
    ) -> Any:
        """Run the model's forward, parts of which may be compiled, or as it is where compiled code cannot serve it."""
        served, plain = self._server.served, frames.plain(original)
        walk = None if selection is None else selection.walk
        if walk is not None and walk.follower is not None:
            with frames.uncompiled():  # what is compiled cannot be followed
                return plain(*args, **kwargs)
        if original is plain and not served.compiled_state.used:
            if not self._compiled.found():
                return original(*args, **kwargs)
            served.compiled_state.used = True
            batch = batch_of(args, kwargs)
        if batch is None or not served.compiles(selection, batch[1]):
            with frames.uncompiled():
                return plain(*args, **kwargs)
        served.ready(selection, batch[0])
        try:
            return original(*args, **kwargs)
        finally:
            served.compiled_state.end()

    def part(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a model inside the model, which may be called by itself."""
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)  # the model itself has noted the rows
        if "delta" in kwargs:
            raise UsageError(
                f"{type(module).__name__} is a part of {self._name}, which takes delta=; call {self._name}, or open a "
                "block"
            )
        call, selection = self._scope.call, self._scope.active()
        if selection.entered if selection is not None else call.bound:
            return original(*args, **kwargs)
        by = self._computed_by(call.block if call.bound or selection is None else self._scope.here())
        given = self._given(module, "forward", original, args, kwargs)
        if by is not None:
            check_caches(given, by, type(module).__name__)
        if selection is None:
            output = original(*args, **kwargs)
        else:
            with InCall(), self._entry(selection, module, "forward", given):
                output = original(*args, **kwargs)
        if by is not None:
            mark_caches(output, by)
        return output

    def _given(
        self, module: nn.Module, name: str, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        names = self._names.get((id(module), name))
        if names is None:
            names = self._names[id(module), name] = tuple(inspect.signature(frames.plain(original)).parameters)
        return named(names, args, kwargs)

    def _entry(self, selection: Selection, module: nn.Module, name: str, given: dict[str, Any]) -> Entry:
        config = getattr(module, "config", None)
        # What is computed per delta, and so where rows are asked for, depends on the modules that the deltas change.
        changed = selection.memo("changed", lambda: self._server.served.changed_by(selection))
        entry = (id(module), name, changed)
        return Entry(self._server.forms, selection, entry, given, config, module)

    def _enter_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the rows of a model that is itself a served module."""
        selection = self._scope.active()
        if selection is not None:
            given = {str(number): value for number, value in enumerate((*args, *kwargs.values()))}
            walk = selection.begin(self._server.forms, "leaf", given, None, type(module).__name__)
            selection.walk = None if walk is None else walk.of_leaf()

    def _enter_lookup(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the rows of the ids that the caller looks up, for a call with ``inputs_embeds``."""
        selection = self._scope.active()
        ids = (*args, *kwargs.values())[0]
        if selection is not None and not selection.entered and ids.dim() == 2:
            self._enter_leaf(module, args, kwargs)

    def _leave_lookup(self) -> None:
        selection = self._scope.active()
        if selection is not None and not selection.entered:
            selection.walk = None

    def _generate(self, original: Callable[..., Any], delta: Any, args: Any, kwargs: Any) -> Any:
        if self._scope.call.bound and delta is UNNAMED:
            return original(*args, **kwargs)

        def once(block: Block | None) -> Any:
            if block is None:
                with Bound(self._scope, None):
                    return original(*args, **kwargs)
            self._server.check_model(closely=True)
            names, batch = held_of(block).rows, batch_of(args, kwargs)
            if names and batch is not None and batch[0] != names:
                raise rows_error(f"{self._name}.generate", batch[0], names)
            with Bound(self._scope, block) as bound:
                selection = bound.selection
                assert selection is not None
                before, selection.copies = selection.copies, self._copies(kwargs)
                try:
                    output = original(*args, **kwargs)
                finally:
                    selection.copies = before
                self._server.reads.warn(selection)
                return output

        return self._within(delta, once)

    def _copies(self, kwargs: Mapping[str, Any]) -> frozenset[int]:
        """Return how many rows ``generate`` may make of each row that it is given: beams, samples, or both."""
        configs = (kwargs.get("generation_config"), getattr(self._model, "generation_config", None))

        def setting(name: str) -> int:
            values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((int(value) for value in values if isinstance(value, int)), 1)

        beams, samples = setting("num_beams"), setting("num_return_sequences")
        return frozenset((1, beams, samples, beams * samples))


def held_of(block: Block) -> Held:
    """Return what a block holds."""
    held = block.hold
    assert isinstance(held, Held)
    return held
