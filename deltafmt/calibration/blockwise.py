"""A model as a chain of blocks, one of which is on the device at a time.

A block receives more than hidden states: masks, positions, rotary embeddings. These arguments are recorded in a run of
the model in which each block returns its hidden states unchanged. This works for every model that hands the hidden
states from block to block as they are; a run over one sequence finds out if a model does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltafmt.calibration.gatherer import Stop
from deltafmt.calibration.tokens import Tokens

Forward = Callable[..., Any]

_HOST = torch.device("cpu")


class UnchainedError(Exception):
    """A model's blocks cannot be run one after the other; the message says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a block beside the hidden states.

    Attributes:
        keyword: the name of the argument with the hidden states; empty if they are the first positional argument.
        args, kwargs: all other arguments.
    """

    keyword: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Chain:
    """The blocks of a model.

    Attributes:
        model: the model, in evaluation mode and on the host.
        blocks: the blocks in the order of their calls.
        device: the device on which a block runs.
        extras: for each block, the number of results (all None) that it returns beside the hidden states; -1 if it
            returns a bare tensor.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    device: torch.device
    extras: list[int] = field(default_factory=list)

    def trace(self, tokens: Tokens) -> torch.Tensor:
        """Run a batch through the whole model, with one block at a time on the device; learn the results' form.

        Returns:
            The hidden states after the last block, on the host.

        Raises:
            UnchainedError: the blocks do not hand on the hidden states as they are.
        """
        self.extras = []
        last: list[torch.Tensor] = []

        def stub(number: int, forward: Forward) -> Forward:
            def traced(*args: Any, **kwargs: Any) -> Any:
                states, call = split_call(args, kwargs)
                if number != len(self.extras) or (last and states is not last[-1]):
                    raise UnchainedError(f"block {number} is not given what the one before it returns")
                with placed(self.blocks[number], self.device):
                    result = _call(forward, states.to(self.device), call, self.device)
                self.extras.append(_extras(result, states))
                last[:] = [_states(result).to(states.device)]
                return self._result(number, last[0])

            return traced

        with _replaced(self.blocks, stub):
            self._run(tokens)
        if len(self.extras) != len(self.blocks):
            raise UnchainedError(f"{len(self.extras)} of {len(self.blocks)} blocks are called")
        return last[0]

    def record(self, tokens: Tokens) -> tuple[torch.Tensor, list[Call]]:
        """Return the hidden states that enter the first block, and the other arguments of every block."""
        first: list[torch.Tensor] = []
        calls: list[Call] = []

        def stub(number: int, _forward: Forward) -> Forward:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                states, call = split_call(args, kwargs)
                if number == 0:
                    first.append(states)
                calls.append(call)
                if number == len(self.blocks) - 1:
                    raise Stop
                return self._result(number, states)

            return recorded

        with _replaced(self.blocks, stub):
            self._run(tokens)
        return first[0], calls

    def step(self, number: int, states: torch.Tensor, call: Call) -> torch.Tensor:
        """Run a block, which is on the device, and return the hidden states that leave it."""
        return _states(_call(self.blocks[number].__call__, states, call, self.device))

    def finish(self, tokens: Tokens, states: torch.Tensor) -> Any:
        """Run the modules behind the blocks on hidden states that leave the last block; return what the model returns.

        The modules outside the blocks are on the device of the states.
        """

        def stub(number: int, _forward: Forward) -> Forward:
            def passed(*args: Any, **kwargs: Any) -> Any:
                through = split_call(args, kwargs)[0]
                return self._result(number, states if number == len(self.blocks) - 1 else through)

            return passed

        with _replaced(self.blocks, stub):
            return self._run(tokens, states.device)

    def _run(self, tokens: Tokens, device: torch.device = _HOST) -> Any:
        with contextlib.suppress(Stop):
            return run_model(self.model, tokens, device)
        return None

    def _result(self, number: int, states: torch.Tensor) -> Any:
        extras = self.extras[number]
        return states if extras < 0 else (states, *[None] * extras)


def run_model(model: nn.Module, tokens: Tokens, device: torch.device) -> Any:
    """Run a batch of sequences without padding through a model, and return what it returns."""
    ids = torch.from_numpy(tokens).to(device)
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs)


@contextlib.contextmanager
def placed(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a block to a device, and back to the host at the end."""
    block.to(device)
    try:
        yield
    finally:
        block.to("cpu")


@contextlib.contextmanager
def outside_placed(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move the parameters and buffers outside the blocks to a device, and back to the host at the end."""
    if device == _HOST:
        yield
        return
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]

    def move(to: torch.device) -> None:
        for module in outside:
            # Module.to would move the modules inside of it, too.
            module._apply(lambda tensor: tensor.to(to), recurse=False)  # type: ignore[no-untyped-call]  # noqa: SLF001

    move(device)
    try:
        yield
    finally:
        move(_HOST)


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and without its cache of keys and values."""
    config: Any = model.config
    configs: list[Any] = [one for one in (config, getattr(config, "text_config", None)) if hasattr(one, "use_cache")]
    before = [one.use_cache for one in configs]
    training = model.training
    model.eval()
    for one in configs:
        one.use_cache = False
    try:
        yield
    finally:
        for one, value in zip(configs, before, strict=True):
            one.use_cache = value
        model.train(training)


class Interner:
    """Keep one copy of equal tensors: batches of the same shape have the same masks and positions."""

    _RECENT = 8

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def call(self, call: Call) -> Call:
        """Return a call whose tensors are shared with equal tensors of earlier calls."""
        return Call(call.keyword, _mapped(call.args, self._shared), _mapped(call.kwargs, self._shared))

    def _shared(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self._known.setdefault((tensor.shape, tensor.dtype), [])
        for other in reversed(known):
            if other is tensor or torch.equal(other, tensor):
                return other
        known.append(tensor.detach())
        del known[: -self._RECENT]
        return known[-1]


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """Return the hidden states of a call, and its other arguments.

    Raises:
        UnchainedError: neither the first argument nor ``hidden_states`` is a tensor.
    """
    if args and isinstance(args[0], torch.Tensor):
        return args[0], Call("", args[1:], kwargs)
    states = kwargs.get("hidden_states")
    if not isinstance(states, torch.Tensor):
        raise UnchainedError("a block is given no hidden states")
    return states, Call("hidden_states", args, {key: value for key, value in kwargs.items() if key != "hidden_states"})


def _call(forward: Forward, states: torch.Tensor, call: Call, device: torch.device) -> Any:
    args, kwargs = (_mapped(part, lambda tensor: tensor.to(device)) for part in (call.args, call.kwargs))
    with torch.no_grad():
        return forward(*args, **kwargs, **{call.keyword: states}) if call.keyword else forward(states, *args, **kwargs)


def _states(result: Any) -> torch.Tensor:
    states: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return states


def _extras(result: Any, states: torch.Tensor) -> int:
    """Return the number of results behind the hidden states; -1 for a bare tensor."""
    parts = result if isinstance(result, tuple) else (result,)
    if not parts or not isinstance(parts[0], torch.Tensor) or parts[0].shape != states.shape:
        raise UnchainedError("a block returns no hidden states like those that it is given")
    if any(part is not None for part in parts[1:]):
        raise UnchainedError("a block returns more than hidden states")
    return len(parts) - 1 if isinstance(result, tuple) else -1


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a value with every tensor in its tuples, lists and maps changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return value


@contextlib.contextmanager
def _replaced(blocks: Sequence[nn.Module], stub: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Run other functions in the place of the blocks."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.__dict__["forward"] = stub(number, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward
