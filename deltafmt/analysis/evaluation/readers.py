"""Models that read batches of tokens and say what they predict: block by block, or whole where that cannot be.

One block is on the device at a time, as in a calibration. Hidden states wait on the host. A model's predictions for all
tokens take far more room than its hidden states (a number for each token of its vocabulary), so they are computed from
the hidden states a batch at a time, as often as they are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from deltafmt.calibration.blockwise import (
    Call,
    Chain,
    Interner,
    UnchainedError,
    outside_placed,
    placed,
    run_model,
    without_cache,
)
from deltafmt.calibration.hidden import HiddenStates
from deltafmt.calibration.modules import find_blocks
from deltafmt.calibration.tokens import Batch, Tokens
from deltafmt.errors import NonFiniteError, UsageError

HOST = torch.device("cpu")

# Called after each block of a model has read all batches.
Tick = Callable[[], None]


class Reader(Protocol):
    """A model that reads batches.

    Attributes:
        name: what messages call the model.
        steps: how often ``read`` calls its ``tick``.
    """

    name: str
    steps: int

    def read(self, batches: Sequence[Batch], tick: Tick) -> None:
        """Read batches, which ``logits`` then speaks of.

        Raises:
            NonFiniteError: activations are not finite.
        """

    def logits(self, number: int) -> torch.Tensor:
        """Return what the model predicts after every token of a batch: float32, shape (spans, tokens, vocabulary).

        Raises:
            NonFiniteError: a prediction is NaN or infinite.
        """

    def release(self) -> None:
        """Free what only ``read`` needs."""


def reader_of(model: Any, name: str, device: torch.device, sample: Tokens) -> Reader:
    """Return a reader of a causal language model.

    Args:
        model: a transformers model on the host.
        name: what messages call it.
        device: where it is run.
        sample: a batch of one sequence, with which the order of the blocks is found.

    Raises:
        UsageError: the model predicts no next tokens.
    """
    check_causal(model, name, sample)
    chain_name, blocks = find_blocks(model)
    if blocks:
        chain = Chain(model, blocks, device)
        with contextlib.suppress(UnchainedError), without_cache(model):
            chain.trace(sample)
        if len(chain.extras) == len(blocks):
            return ChainReader(chain, chain_name, name)
    return WholeReader(model, name, device)


def check_causal(model: Any, name: str, sample: Tokens) -> None:
    """Refuse a model that does not predict each token from the tokens before it.

    Raises:
        UsageError: names the model's class.
    """
    kind = type(model).__name__
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if encoder_decoder or not model.can_generate():
        raise UsageError(f"{name}: {kind} does not predict the next token; evaluate needs a causal language model")
    few = sample[:1, :4]
    other = few.copy()
    other[0, -1] = (other[0, -1] + 1) % int(model.get_input_embeddings().weight.shape[0])
    with without_cache(model):
        before, after = (_logits_of(run_model(model, tokens, HOST), name)[0] for tokens in (few, other))
    changed = (before - after).abs().amax(-1)
    # Where tokens are shared out among experts, others than the changed one are rounded differently. NaN is left to the
    # run itself, which names the block.
    if float(changed[:-1].max()) > 0.01 * float(changed[-1]):
        raise UsageError(f"{name}: {kind} sees later tokens; evaluate needs a causal language model")


class ChainReader:
    """A model that is a chain of blocks, one of which is on the device at a time."""

    def __init__(self, chain: Chain, blocks_name: str, name: str) -> None:
        self.name = name
        self.steps = len(chain.blocks)
        self._chain = chain
        self._blocks_name = blocks_name
        self._batches: Sequence[Batch] = ()
        self._states: HiddenStates | None = None

    def read(self, batches: Sequence[Batch], tick: Tick) -> None:
        """Run one block after the other over all batches."""
        chain = self._chain
        self._batches = batches
        shapes = [(int(batch.tokens.shape[0]), int(batch.tokens.shape[1])) for batch in batches]
        interner, calls = Interner(), list[list[Call]]()
        states: HiddenStates | None = None
        with without_cache(chain.model):
            for number, batch in enumerate(batches):
                first, recorded = chain.record(batch.tokens)
                calls.append([interner.call(call) for call in recorded])
                if states is None:
                    states = HiddenStates(shapes, first.shape[-1], first.dtype, None)
                states.write(number, first)
            assert states is not None
            for block in range(len(chain.blocks)):
                with placed(chain.blocks[block], chain.device):
                    for number in range(len(batches)):
                        # In place: a batch's hidden states are read before they are written.
                        out = chain.step(block, states.read(number, chain.device), calls[number][block])
                        states.write(number, out)
                if not states.finite():
                    where = f'the activations that leave "{self._blocks_name}.{block}" are not finite'
                    raise NonFiniteError(f"{self.name}: {where}")
                tick()
        self._states = states

    def logits(self, number: int) -> torch.Tensor:
        """Run the modules behind the blocks over the hidden states of a batch."""
        chain, states = self._chain, self._states
        assert states is not None
        with without_cache(chain.model), outside_placed(chain.model, chain.blocks, chain.device):
            output = chain.finish(self._batches[number].tokens, states.read(number, chain.device))
            return _finite(_logits_of(output, self.name), self.name)

    def release(self) -> None:
        """Free the blocks' weights: predictions follow from the hidden states that leave the last one."""
        for block in self._chain.blocks:
            block.to("meta")


class WholeReader:
    """A model that is not a chain of blocks: all of it is on the device, and reads a batch whenever it is asked."""

    def __init__(self, model: nn.Module, name: str, device: torch.device) -> None:
        self.name = name
        self.steps = 1
        self._model = model
        self._device = device
        self._batches: Sequence[Batch] = ()

    def read(self, batches: Sequence[Batch], tick: Tick) -> None:
        """Keep the batches."""
        self._batches = batches
        tick()

    def logits(self, number: int) -> torch.Tensor:
        """Run the model over a batch."""
        with without_cache(self._model), placed(self._model, self._device):
            output = run_model(self._model, self._batches[number].tokens, self._device)
            return _finite(_logits_of(output, self.name), self.name)

    def release(self) -> None:
        """Keep the model, which every prediction needs."""


def _logits_of(output: Any, name: str) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        raise UsageError(f"{name}: the model returns no predictions of tokens; evaluate needs a causal language model")
    return logits.float()


def _finite(logits: torch.Tensor, name: str) -> torch.Tensor:
    # Some models give tokens that they never say minus infinity.
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise NonFiniteError(f"{name}: the model's predictions are not finite")
    return logits
