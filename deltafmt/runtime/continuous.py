"""Continuous batching: transformers packs the tokens of many requests into one row, and each request has its delta.

``model.generate_batch`` and the managers of ``model.init_continuous_batching`` run a loop in a thread of their own.
This module wraps the methods of one manager: a request is added with its delta, each step of the loop is bound to a
selection of the requests that are in it, and blocks of keys and values are shared only by requests of one delta.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from torch import nn

from deltafmt.errors import DeltafmtError, UsageError
from deltafmt.runtime.call_rows import mixed_error
from deltafmt.runtime.delta_holds import Held, PackedSelections
from deltafmt.runtime.intake import Intake, Request, Requests, Source, check_row
from deltafmt.runtime.packed import PackedSelection
from deltafmt.runtime.rows import Row, read_names
from deltafmt.runtime.scope import Bound, Scope
from deltafmt.runtime.selection import rows_error
from deltafmt.runtime.shared_prefixes import SharedPrefixes
from deltafmt.runtime.uncalled_reads import Reads
from deltafmt.runtime.wrapping import wrap_method

UNNAMED: Final = object()

# What a caller may ask of ContinuousBatchingConfig that this module does not do for requests with deltas.
_REFUSED = (
    "use_cuda_graph",
    "use_async_batching",
    "varlen_compile_config",
    "decode_compile_config",
    "default_compile_level",
    "q_padding_interval_size",
    "kv_padding_interval_size",
)

MakeRequest = Callable[[], Request]


class Server(Source, Protocol):
    """What continuous batching asks of the deltas of a model."""

    scope: Scope
    reads: Reads

    def check_model(self, *, closely: bool) -> None:
        """Refuse a model that is no longer the deltas' base."""


class Prompt(list[int]):
    """A prompt, with a function that makes its request."""

    request: MakeRequest


class Continuous:
    """The continuous batching of one model.

    Args:
        name: the model's class, for messages.
        server: its deltas.
        closed: a function that tells whether the deltas were detached.
    """

    def __init__(self, name: str, server: Server, closed: Callable[[], bool]) -> None:
        self.server = server
        self.closed = closed
        self._name = name
        self._scope = server.scope
        self._local = threading.local()

    def generate_batch(self, original: Callable[..., Any], delta: Any, args: Any, kwargs: Any) -> Any:
        """Run ``model.generate_batch`` with a delta for each prompt."""
        prompts = args[0] if args else kwargs["inputs"]
        requests = self.requests(len(prompts), delta, f"{self._name}.generate_batch")
        if requests is None:
            self._local.plain = True
            try:
                with Bound(self._scope, None, gradients=False):
                    return original(*args, **kwargs)
            finally:
                self._local.plain = False
        self.server.check_model(closely=True)
        named = [_prompt(ids, request) for ids, request in zip(prompts, requests, strict=True)]
        if args:
            return original(named, *args[1:], **kwargs)
        return original(**{**kwargs, "inputs": named})

    def requests(self, count: int, delta: Any, where: str) -> list[MakeRequest] | None:
        """Return a function for each of ``count`` prompts that makes its request; None if nothing names a delta.

        Raises:
            UsageError: a name is unknown, or the names are not as many as the prompts.
        """
        if delta is UNNAMED:
            call = self._scope.call
            block = call.block if call.bound else self._scope.here()
            if block is None:
                return None
            held = block.hold
            assert isinstance(held, Held)
            self._refuse_count(held.rows, count, where)
            makers = [functools.partial(_of_block, held, row) for row in range(max(held.rows, 1))]
            return [makers[row if held.rows else 0] for row in range(count)]
        if self.closed():
            raise UsageError(f"{where} names a delta, and the deltas were detached from the model")
        rows = read_names(delta)
        self._refuse_count(len(rows.rows) if rows.each else 0, count, where)
        for row in rows.rows:
            check_row(self.server, row)
        return [functools.partial(Request, row) for row in (rows.rows if rows.each else rows.rows * count)]

    @staticmethod
    def _refuse_count(names: int, count: int, where: str) -> None:
        if names not in (0, count):
            raise rows_error(where, count, names)

    def init(self, original: Callable[..., Any], delta: Any, args: Any, kwargs: Any) -> Any:
        """Return a manager whose requests take deltas."""
        if delta is not UNNAMED:
            raise UsageError(
                "a manager of continuous batching takes a delta for each request: manager.add_request(..., delta=...)"
            )
        plain = getattr(self._local, "plain", False)
        if not plain:
            _refuse_options(args, kwargs)
        manager = original(*args, **kwargs)
        found = manager.__dict__.get("_deltafmt")
        if found is None and manager.batch_processor is None:
            found = Manager(manager, self, plain=plain)
        if found is None or found.owner is not self or (found.plain and not plain):
            raise UsageError(
                "the manager of continuous batching that the model keeps was made for the base alone; call "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        return manager


class Manager:
    """What is wrapped of one manager of transformers.

    Args:
        manager: the manager.
        owner: the continuous batching of the manager's model.
        plain: the manager serves the base alone, as it would without deltas: with CUDA graphs, if it chose them.

    Attributes:
        owner, plain: as given.
    """

    def __init__(self, manager: Any, owner: Continuous, *, plain: bool) -> None:
        self.owner = owner
        self.plain = plain
        self._manager = manager
        self._server = owner.server
        self._scope = owner.server.scope
        self._local = threading.local()
        self._selections = PackedSelections()
        self._prefixes = SharedPrefixes(owner.server, self._request)
        self._requests = Requests(owner.server, owner.closed, manager.num_return_sequences)
        self._intake: Intake | None = None
        manager.__dict__["_deltafmt"] = self
        wrap_method(manager, "add_request", self._add_request)
        wrap_method(manager, "add_requests", self._add_requests)
        wrap_method(manager, "_create_batch_processor", self._create_batch_processor)
        if plain:
            return
        config = manager.continuous_batching_config
        config.use_cuda_graph, config.use_async_batching = (False, False), False
        config.varlen_compile_config = config.decode_compile_config = None
        fail = manager.output_router.fail_and_deliver
        self._intake = Intake(self._requests, self._take, fail, manager.input_queue.maxsize)
        manager.input_queue = self._intake
        wrap_method(manager, "cancel_request", self._cancel_request)
        wrap_method(manager, "_run_generation_loop", self._run_generation_loop)
        wrap_method(manager, "_fail_all_remaining_requests", self._fail_all)
        wrap_method(manager.output_router, "deliver", self._deliver)
        wrap_method(manager.output_router, "deliver_batch", self._deliver_batch)

    # What callers call

    def _add_request(self, original: Callable[..., Any], *args: Any, delta: Any = UNNAMED, **kwargs: Any) -> Any:
        prompt = args[0] if args else kwargs["input_ids"]
        if delta is UNNAMED and isinstance(prompt, Prompt):
            request = prompt.request
        else:
            # A list names rows, and a request is one row.
            found = self.owner.requests(1, delta, "add_request")
            if self.plain and found is not None:
                raise UsageError("the manager of continuous batching was made for the base alone")
            request = functools.partial(Request, None) if found is None else found[0]
        self._local.request = request
        try:
            return original(*args, **kwargs)
        finally:
            self._local.request = None

    def _add_requests(
        self, original: Callable[..., Any], inputs: Sequence[list[int]], *args: Any, delta: Any = UNNAMED, **kwargs: Any
    ) -> Any:
        if delta is not UNNAMED or not all(isinstance(prompt, Prompt) for prompt in inputs):
            requests = self.owner.requests(len(inputs), delta, "add_requests")
            if requests is not None:
                inputs = [_prompt(ids, request) for ids, request in zip(inputs, requests, strict=True)]
        return original(inputs, *args, **kwargs)

    def _cancel_request(self, original: Callable[..., Any], request_id: str) -> None:
        assert self._intake is not None
        if not self._intake.withdraw(request_id):
            original(request_id)
            self._requests.unsettled = True

    def _take(self) -> Request:
        make = getattr(self._local, "request", None)
        return Request(None) if make is None else make()

    # What the thread of the loop calls

    def _create_batch_processor(self, original: Callable[..., Any]) -> Any:
        processor = original()
        if "_deltafmt" in processor.__dict__:
            return processor
        processor.__dict__["_deltafmt"] = self
        if self.plain:
            wrap_method(processor, "_generation_step", self._plain_step)
            return processor
        wrap_method(processor, "prepare_next_batch", functools.partial(self._prepare, processor))
        wrap_method(processor, "has_pending_requests", self._has_pending)
        wrap_method(processor, "_generation_step", functools.partial(self._step, processor))
        # The tables of operands are written on the default stream of each thread, and so the model reads them there.
        processor.inputs_and_outputs.compute_stream = None
        processor.offloading_manager._compute_stream = None  # noqa: SLF001 - it copies the same keys and values
        self._prefixes.wrap(processor.cache)
        return processor

    def _run_generation_loop(self, original: Callable[..., Any]) -> None:
        try:
            original()
        finally:
            self._requests.settle(())

    def _fail_all(self, original: Callable[..., Any], *args: Any) -> None:
        assert self._intake is not None
        self._intake.failing = True
        try:
            original(*args)
        finally:
            self._intake.failing = False

    def _prepare(self, processor: Any, original: Callable[..., Any]) -> bool:
        found: bool = original()
        if self._requests.unsettled:
            scheduler = processor.scheduler
            self._requests.settle([*scheduler.active_requests, *scheduler.waiting_requests])
        return found

    def _has_pending(self, original: Callable[..., Any]) -> bool:
        assert self._intake is not None
        return original() or not self._intake.empty()

    def _deliver(self, original: Callable[..., Any], output: Any) -> None:
        if output.is_finished():
            self._requests.finished(output.request_id)
        original(output)

    def _deliver_batch(self, original: Callable[..., Any], outputs: Sequence[Any]) -> None:
        for output in outputs:
            if output.is_finished():
                self._requests.finished(output.request_id)
        original(outputs)

    def _plain_step(self, original: Callable[..., Any], model: nn.Module) -> None:
        with Bound(self._scope, None, gradients=False):
            original(model)

    def _step(self, processor: Any, original: Callable[..., Any], model: nn.Module) -> None:
        """Run one step; if its requests' deltas cannot be served together, fail these requests and no others."""
        batch = list(processor.inputs_and_outputs.requests_in_batch)
        try:
            self._serve(processor, original, model, batch)
        except DeltafmtError as error:
            self._selections = PackedSelections()
            scheduler = processor.scheduler
            for one in batch:
                processor._handle_request_error(error, one.state)  # noqa: SLF001 - what transformers itself calls
                scheduler.finish_request(one.state.request_id)
            failed = {one.state.request_id for one in batch}
            forks = scheduler._requests_to_fork  # noqa: SLF001 - no sample of a failed request is to follow
            forks[:] = [state for state in forks if state.request_id not in failed]
            processor.inputs_and_outputs.requests_in_batch = []
            self._requests.unsettled = True

    def _serve(self, processor: Any, original: Callable[..., Any], model: nn.Module, batch: Sequence[Any]) -> None:
        holds = [self._request(one.state.request_id).hold for one in batch]
        lengths = [one.query_length for one in batch]
        if any(hold is not None and hold.serves for hold in holds):
            self._server.check_model(closely=sum(lengths) > len(lengths))
        selection = self._selections.of(holds, lengths, self._scope.epoch)
        with Bound(self._scope, None, selection, gradients=False), contextlib.ExitStack() as stack:
            if isinstance(selection, PackedSelection) and processor.model_runner.supports_logits_to_keep(model):
                stack.enter_context(self._head(model, selection, batch, holds))
            original(model)
            if selection is not None:
                self._server.reads.warn(selection)

    @contextlib.contextmanager
    def _head(
        self, model: Any, selection: PackedSelection, batch: Sequence[Any], holds: Sequence[Held | None]
    ) -> Iterator[None]:
        """Give the output head a selection of its own: it is given one token of each request that predicts.

        These tokens come first, in the order of the requests. The others, which nobody reads, are the batch's first.
        """
        predicting = [hold for one, hold in zip(batch, holds, strict=True) if one.has_new_token]
        given = [*predicting, *[holds[0]] * (len(batch) - len(predicting))]
        if selection.tokens == len(batch) == len(predicting):
            yield
            return
        head = model.get_output_embeddings()
        if head is None:
            raise UsageError(f"{type(model).__name__} has no output head, and serves one delta at a time")
        mine = self._selections.of(given, [1] * len(given), self._scope.epoch)
        call = self._scope.call

        def enter(module: nn.Module, args: Any) -> None:
            if call.selection is selection:
                x = args[0]
                if x.numel() != len(given) * x.shape[-1]:
                    raise mixed_error(f"the head, a {type(module).__name__},", x.shape)
                call.selection = mine

        def leave(*_: object) -> None:
            if call.selection is mine:
                call.selection = selection

        hooks = (
            head.register_forward_pre_hook(enter),
            head.register_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _request(self, request_id: str) -> Request:
        request = self._requests.of(request_id)
        if request is None:
            raise UsageError(
                f'request "{request_id}" was not added by add_request, so nothing says which delta it uses'
            )
        return request


def _prompt(ids: Sequence[int], request: MakeRequest) -> Prompt:
    prompt = Prompt(ids)
    prompt.request = request
    return prompt


def _of_block(held: Held, row: int) -> Request:
    part = held.part(row)
    return Request(Row(), part)


def _refuse_options(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what a step cannot do whose deltas differ from the step before."""
    config = kwargs.get("continuous_batching_config", args[1] if len(args) > 1 else None)
    if config is None:
        given = kwargs.get("generation_config", args[0] if args else None)
        config = getattr(given, "continuous_batching_config", None)
    asked = [name for name in _REFUSED if getattr(config, name, None) not in (None, False, 0, (False, False))]
    if asked:
        raise UsageError(
            f"continuous batching with deltas runs without CUDA graphs, compilation and asynchronous batching; leave "
            f"out {asked[0]}"
        )
