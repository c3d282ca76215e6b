"""The calls of a model: each is bound to one selection from its beginning to its end.

``model(...)`` and ``model.generate(...)`` take ``delta=``: a name for all rows, or one for each row. Without it, a call
belongs to the block that it is made in. Torch has no hook around a whole call that also ends with an interrupt, so the
model's own ``forward``, ``generate`` and ``generate_batch`` are wrapped, as accelerate wraps them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltafmt.errors import UsageError
from deltafmt.runtime import frames
from deltafmt.runtime.continuous import UNNAMED, Continuous
from deltafmt.runtime.continuous import Server as ContinuousServer
from deltafmt.runtime.held import Held
from deltafmt.runtime.model_batch import batch_of, models_in
from deltafmt.runtime.rows import Names
from deltafmt.runtime.scope import Block, Bound
from deltafmt.runtime.selection import rows_error
from deltafmt.runtime.served_modules import ServedModules
from deltafmt.runtime.uncopied import refuse_copy


class Server(ContinuousServer, Protocol):
    """What the calls of a model ask of its deltas."""

    served: ServedModules

    def use(self, names: Names, *, wait: float = 0) -> Block:
        """Return a block."""

    def vocabulary(self) -> int | None:
        """Return the rows of the base's output head."""


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
        self._before: dict[str, object] = {}
        self._closed = False
        has_parts = next(model.children(), None) is not None
        if has_parts:  # otherwise the model is itself a served module, and its hooks run outside of its forward
            self._wrap("forward", self._forward)
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            for module in models_in(model)
            if module is not model or not has_parts
        ]
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
        for name, value in self._before.items():
            if value is UNNAMED:
                self._model.__dict__.pop(name, None)
            else:
                self._model.__dict__[name] = value

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

    def _forward(self, original: Callable[..., Any], delta: Any, args: Any, kwargs: Any) -> Any:
        call = self._scope.call
        if call.bound and delta is UNNAMED:
            return self._run(original, args, kwargs, batch_of(args, kwargs))

        def once(block: Block | None) -> Any:
            batch = None
            if block is not None or self._server.served.standing.used or frames.plain(original) is not original:
                batch = batch_of(args, kwargs)
            if block is not None:
                self._server.check_model(closely=batch is None or batch[1] > batch[0])
            with Bound(self._scope, block) as bound:
                output = self._run(original, args, kwargs, batch)
                if bound.selection is not None:
                    self._server.reads.warn(bound.selection)
                return output

        return self._within(delta, once)

    def _run(self, original: Callable[..., Any], args: Any, kwargs: Any, batch: tuple[int, int] | None) -> Any:
        """Run the model's forward with the selection that the call is bound to."""
        call = self._scope.call
        selection, block = call.selection, call.block
        if selection is None:
            return self._run_compiled(original, args, kwargs, batch, None)
        if batch is not None:
            selection.enter(*batch, self._name, root=True)
        if kwargs.get("labels") is not None and block is not None:
            held_of(block).check_loss(self._server.vocabulary())
        if not selection.touched:
            return self._run_compiled(original, args, kwargs, batch, None)
        kind = (tuple(kwargs), batch is not None and batch[0] == batch[1], selection.uniform)
        around = self._server.reads.around(selection, kind)
        if around is None:
            return self._run_compiled(original, args, kwargs, batch, selection)
        with frames.uncompiled(), around:
            return frames.plain(original)(*args, **kwargs)

    def _run_compiled(
        self, original: Callable[..., Any], args: Any, kwargs: Any, batch: tuple[int, int] | None, selection: Any
    ) -> Any:
        """Run the model's forward, parts of which may be compiled, or as it is where compiled code cannot serve it."""
        served, plain = self._server.served, frames.plain(original)
        if original is plain and not served.standing.used:
            return original(*args, **kwargs)
        if batch is None or not served.compiles(selection, batch[1]):
            with frames.uncompiled():
                return plain(*args, **kwargs)
        served.ready(selection, batch[0])
        try:
            return original(*args, **kwargs)
        finally:
            served.standing.end()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the rows of a model inside the model."""
        if torch.compiler.is_compiling():
            return  # the model itself has noted the rows
        name = type(module).__name__
        if "delta" in kwargs:
            raise UsageError(
                f"{name} is a part of {self._name}, which takes delta=; call {self._name}, or open a block"
            )
        selection = self._scope.active()
        batch = batch_of(args, kwargs)
        if selection is not None and batch is not None:
            selection.enter(*batch, name, root=not self._scope.call.bound)

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
                before, selection.copies = selection.copies, frozenset((1, self._copies(kwargs)))
                try:
                    output = original(*args, **kwargs)
                finally:
                    selection.copies = before
                self._server.reads.warn(selection)
                return output

        return self._within(delta, once)

    def _copies(self, kwargs: Mapping[str, Any]) -> int:
        """Return how many rows ``generate`` makes of each row that it is given: beams, or samples."""
        configs = (kwargs.get("generation_config"), getattr(self._model, "generation_config", None))

        def setting(name: str) -> int:
            values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((int(value) for value in values if isinstance(value, int)), 1)

        return max(setting("num_beams"), setting("num_return_sequences"))


def held_of(block: Block) -> Held:
    """Return what a block holds."""
    held = block.hold
    assert isinstance(held, Held)
    return held
