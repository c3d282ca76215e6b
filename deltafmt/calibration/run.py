"""Calibration: a model and texts in, second moments of every linear module's inputs out, in the order of the model.

A block is brought to the device, run over all sequences while its linear modules' inputs are added up, and run again if
a weight was replaced, so that the blocks after it see what the replacement does. Hidden states wait on the host, or
in a file. Nothing is random; the same model, texts and options give the same numbers on the same machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from blake3 import blake3
from torch import nn

from deltafmt.calibration.blockwise import (
    Call,
    Chain,
    Interner,
    UnchainedError,
    placed,
    run_model,
    without_cache,
)
from deltafmt.calibration.callbacks import Moments, OnModule, OnProgress, Report
from deltafmt.calibration.gather import Gatherer, Stop
from deltafmt.calibration.hidden import HiddenStates
from deltafmt.calibration.load import load_model, model_key
from deltafmt.calibration.modules import (
    Linear,
    find_blocks,
    linear_modules,
    replace_weight,
)
from deltafmt.calibration.state import State
from deltafmt.calibration.text import read_documents
from deltafmt.calibration.tokens import Tokens, batches, cut, load_encoder
from deltafmt.errors import NonFiniteError, UsageError

# The usual calibration set: 128 sequences of 2048 tokens.
TOKENS = 128 * 2048
LENGTH = 2048
BATCH_TOKENS = 4096
# Bytes of moments that are added up at a time where a model is run as a whole.
WHOLE_BUDGET = 2**31


@dataclass(frozen=True, slots=True)
class Options:
    """How a calibration runs.

    Attributes:
        device: where the blocks run; a GPU if there is one.
        batch_tokens: tokens of a batch.
        minimum: fewest tokens that the texts must have; None for the widest module's number of columns, below which its
            moments are certain to be singular.
        double: add the moments up in float64.
        state: folder in which a killed run leaves what it needs to go on; None for none.
        key: what else identifies the job, such as the method's options, for a state to be used again.
    """

    device: torch.device | str | None = None
    batch_tokens: int = BATCH_TOKENS
    minimum: int | None = None
    double: bool = False
    state: str | os.PathLike[str] | None = None
    key: str = ""

    def where(self) -> torch.device:
        """Return the device."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def calibrate_folder(
    folder: str | os.PathLike[str],
    text: str | os.PathLike[str],
    on_module: OnModule,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    dtype: torch.dtype | None = None,
    options: Options | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Load a fine-tune with transformers and calibrate it with a text.

    Args:
        folder: the fine-tune.
        text: the calibration text, as :func:`deltafmt.calibration.text.read_documents` reads it.
        on_module: called for every linear module.
        tokenizer: a folder or ``tokenizer.json``, where the fine-tune's folder has none.
        tokens: how many to use; the first ones of the text.
        length: of the longest sequence.
        dtype: in which the model runs: that of its weights if not given, on the CPU float32.
        options: of :func:`calibrate`.
        on_progress: called after each block.

    Raises:
        UsageError: transformers is missing or cannot load the model, there is no tokenizer, the text is empty or too
            short, or the activations are not finite.
        StorageError: a file cannot be read or written.
        InvalidFileError: the text is not what its name says.
    """
    options = options or Options()
    documents = read_documents(Path(text))
    model = load_model(
        Path(folder),
        dtype or (torch.float32 if options.where().type == "cpu" else None),
    )
    encoder = load_encoder(Path(tokenizer or folder), model.config)
    limit = getattr(model.config, "max_position_embeddings", None)
    sequences = cut(
        documents,
        encoder,
        min(length, limit) if isinstance(limit, int) else length,
        tokens,
    )
    options = Options(**{**_as_dict(options), "key": f"{model_key(Path(folder))} {options.key}"})
    return calibrate(model, sequences, on_module, options=options, on_progress=on_progress)


def calibrate(
    model: Any,
    sequences: Sequence[Tokens],
    on_module: OnModule,
    *,
    options: Options | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Gather the moments of every linear module that the sequences reach.

    ``on_module(name, weight_name, moments)`` is called once for each, in the order in which the model calls them. The
    weight that it returns, if any, takes the place of the module's own, and what follows the block sees it. Modules of
    one block are handed out together: all see their block as it was. Where a model is no chain of blocks, it is run as
    a whole, on the device at once, and is not resumed.

    Args:
        model: a transformers model on the host. Weights that were replaced stay so.
        sequences: token numbers, one array for each.
        on_module: called for every linear module.
        options: device, batches and state.
        on_progress: called with the number of steps done and of all.

    Raises:
        UsageError: too few tokens, a token that the model lacks, or a replaced weight that does not fit.
        NonFiniteError: activations are not finite; names the module.
        StorageError: the state cannot be written.
    """
    options = options or Options()
    linears = linear_modules(model)
    count = sum(sequence.size for sequence in sequences)
    _check(model, linears, sequences, count, options.minimum)
    parts = batches(sequences, options.batch_tokens)
    name, blocks = find_blocks(model)
    progress = on_progress or (lambda _done, _total: None)
    with without_cache(model):
        if blocks and not getattr(model.config, "is_encoder_decoder", False):
            chain = Chain(model, blocks, options.where())
            order = _CallOrder(linears, blocks)
            with contextlib.suppress(UnchainedError), order:
                chain.trace(parts[-1][:1])
            if len(chain.extras) == len(blocks):
                report = Report(count, len(blocks))
                run = _Blockwise(chain, name, linears, parts, on_module, options, report, order)
                return run.run(progress)
        return _whole(model, linears, parts, on_module, options, Report(count, 0), progress)


class _CallOrder:
    """Notes which linear modules outside the blocks are called before them and which after, while it is entered."""

    def __init__(self, linears: dict[str, Linear], blocks: Sequence[nn.Module]) -> None:
        inside = {id(module) for block in blocks for module in block.modules()}
        self.outer = [linear for linear in linears.values() if id(linear.module) not in inside]
        self.before: list[Linear] = []
        self.after: list[Linear] = []
        self._blocks = blocks

    def __enter__(self) -> Self:
        entered: list[bool] = []

        def note(linear: Linear) -> Any:
            def hook(_module: Any, _args: Any) -> None:
                mine = self.after if entered else self.before
                if linear not in mine:
                    mine.append(linear)

            return hook

        first = self._blocks[0].register_forward_pre_hook(lambda _module, _args: entered.append(True))
        self._handles = [linear.module.register_forward_pre_hook(note(linear)) for linear in self.outer]
        self._handles.append(first)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(slots=True)
class _Blockwise:
    """One run over a chain of blocks."""

    chain: Chain
    blocks_name: str
    linears: dict[str, Linear]
    batches: list[Tokens]
    on_module: OnModule
    options: Options
    report: Report
    order: _CallOrder
    calls: list[list[Call]] = field(default_factory=list)

    def run(self, progress: OnProgress) -> Report:
        """Run what an earlier run has not."""
        count = len(self.chain.blocks)
        state = None if self.options.state is None else State(Path(self.options.state), self._key())
        done = state.next if state is not None else 0
        self.report.resumed = min(done, count)
        if done > count:
            return self.report
        states = self._enter(state)
        for number in range(self.report.resumed, count):
            states = self._block(number, states, state)
            progress(number + 1, count + 1)
        self._finish(states)
        if state is not None:
            state.advance(count + 1)
        progress(count + 1, count + 1)
        return self.report

    def _enter(self, state: State | None) -> HiddenStates:
        """Record what the blocks are given, and give the hidden states that enter the next one."""
        resumed = state is not None and state.started
        if self.order.before and not resumed:
            with Gatherer(self.order.before, double=self.options.double) as gatherer:
                for tokens in self.batches:
                    self.chain.record(tokens)
            self._hand_out(gatherer)
        interner = Interner()
        states: HiddenStates | None = None
        for batch, tokens in enumerate(self.batches):
            first, calls = self.chain.record(tokens)
            self.calls.append([interner.call(call) for call in calls])
            if states is None:
                path = None if state is None else state.hidden(self.report.resumed)
                states = HiddenStates(self._shapes(), first.shape[-1], first.dtype, path)
            if not resumed:
                states.write(batch, first)
        assert states is not None
        if state is not None and not resumed:
            state.advance(0)
        return states

    def _block(self, number: int, states: HiddenStates, state: State | None) -> HiddenStates:
        """Gather and hand out the moments of a block; return the hidden states that leave it."""
        chain = self.chain
        path = None if state is None else state.hidden(number + 1)
        after = HiddenStates(self._shapes(), states.width, states.dtype, path)
        prefix = f"{self.blocks_name}.{number}."
        inside = [linear for name, linear in self.linears.items() if name.startswith(prefix)]
        with placed(chain.blocks[number], chain.device):

            def step() -> None:
                for batch, calls in enumerate(self.calls):
                    after.write(
                        batch,
                        chain.step(number, states.read(batch, chain.device), calls[number]),
                    )

            with Gatherer(inside, double=self.options.double) as gatherer:
                step()
            if self._hand_out(gatherer):
                step()
        if not after.finite():
            raise NonFiniteError(f'the activations that leave "{self.blocks_name}.{number}" are not finite')
        if state is not None:
            state.advance(number + 1)
        return after

    def _finish(self, states: HiddenStates) -> None:
        """Gather and hand out the moments of what comes after the blocks."""
        after = self.order.after
        self.report.uncalled += [one.name for one in self.order.outer if one not in (*self.order.before, *after)]
        if not after:
            return
        with Gatherer(after, double=self.options.double, stop_at=after[-1].name) as gatherer:
            for batch, tokens in enumerate(self.batches):
                self.chain.finish(tokens, states.read(batch, torch.device("cpu")))
        self._hand_out(gatherer)

    def _hand_out(self, gatherer: Gatherer) -> bool:
        """Call back for every module; tell whether a weight was replaced."""
        self.report.uncalled += gatherer.uncalled
        replaced = [_give(gatherer.linears[name], gatherer.moments(name), self.on_module) for name in gatherer.called]
        self.report.modules += gatherer.called
        return any(replaced)

    def _shapes(self) -> list[tuple[int, int]]:
        return [(int(tokens.shape[0]), int(tokens.shape[1])) for tokens in self.batches]

    def _key(self) -> str:
        digest = blake3()
        for tokens in self.batches:
            digest.update(f"{tokens.shape} ".encode() + tokens.tobytes())
        for name, linear in self.linears.items():
            digest.update(f"{name} {tuple(linear.weight.shape)} {linear.weight.dtype} ".encode())
        digest.update(f"{self.options.double} {self.options.key}".encode())
        return digest.hexdigest()


def _whole(
    model: Any,
    linears: dict[str, Linear],
    parts: Sequence[Tokens],
    on_module: OnModule,
    options: Options,
    report: Report,
    progress: OnProgress,
) -> Report:
    """Run a whole model on the device, once for as many modules as the budget of moments allows."""
    device = options.where()
    with placed(model, device):
        with Gatherer(linears.values()) as gatherer:
            run_model(model, parts[-1][:1], device)
        order, report.uncalled = gatherer.called, gatherer.uncalled
        groups: list[list[str]] = []
        room = 0
        for name in order:
            size = linears[name].columns ** 2 * (8 if options.double else 4)
            if size > room:
                groups.append([])
                room = max(WHOLE_BUDGET, size)
            groups[-1].append(name)
            room -= size
        for done, group in enumerate(groups, 1):
            with Gatherer([linears[name] for name in group], double=options.double) as gatherer:
                for tokens in parts:
                    with contextlib.suppress(Stop):
                        run_model(model, tokens, device)
            for name in gatherer.called:
                _give(linears[name], gatherer.moments(name), on_module)
            report.modules += gatherer.called
            progress(done, len(groups))
    return report


def _give(linear: Linear, moments: Moments, on_module: OnModule) -> bool:
    new = on_module(linear.name, linear.weight_name, moments)
    if new is not None:
        replace_weight(linear, new)
    return new is not None


def _check(
    model: Any,
    linears: dict[str, Linear],
    sequences: Sequence[Tokens],
    count: int,
    minimum: int | None,
) -> None:
    if not linears:
        raise UsageError(f"{type(model).__name__} has no linear modules")
    widest = max(linears.values(), key=lambda linear: linear.columns)
    needed = widest.columns if minimum is None else minimum
    if count < max(needed, 1):
        reason = f'"{widest.name}" has {widest.columns} columns' if minimum is None else "as asked for"
        raise UsageError(
            f"the calibration text has {count} tokens where at least {max(needed, 1)} are needed: {reason}"
        )
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    largest = max(int(sequence.max()) for sequence in sequences)
    if largest >= rows:
        raise UsageError(f"the calibration text has token {largest} where the model has {rows}: not its tokenizer")


def _as_dict(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in Options.__slots__}
