"""The calibration of a chain of blocks, from the first block or from the block at which an earlier run was killed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from blake3 import blake3
from torch import nn

from deltafmt.calibration.blockwise import Call, Chain, Interner, placed
from deltafmt.calibration.callbacks import CalibrationResult, OnModule, OnProgress, OnStage
from deltafmt.calibration.gatherer import Gatherer, hand_out
from deltafmt.calibration.hidden import HiddenStates
from deltafmt.calibration.modules import Linear, replace_parameter
from deltafmt.calibration.run_options import RunOptions
from deltafmt.calibration.state import State
from deltafmt.calibration.tokens import Tokens
from deltafmt.errors import NonFiniteError, UsageError


class CallOrder:
    """Within a ``with`` block, note which linear modules outside the blocks are called before them and which after."""

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
class ChainRun:
    """One run over a chain of blocks.

    Attributes:
        chain: the model as a chain of blocks.
        blocks_name: the name of the list of blocks in the model, such as ``model.layers``.
        linears: the linear modules by name.
        batches: the token numbers of each batch, shape (sequences, tokens).
        on_module, on_stage: the caller's functions; see :mod:`deltafmt.calibration.callbacks`.
        options: device, batches and state.
        result: the result, which the run fills in.
        order: the linear modules outside the blocks.
        calls: the recorded arguments of every block, by batch.
        awaited: the names of the weights whose moments are still to be handed out.
    """

    chain: Chain
    blocks_name: str
    linears: dict[str, Linear]
    batches: list[Tokens]
    on_module: OnModule
    options: RunOptions
    result: CalibrationResult
    order: CallOrder
    on_stage: OnStage | None = None
    calls: list[list[Call]] = field(default_factory=list)
    awaited: set[str] = field(default_factory=set)

    def run(self, progress: OnProgress) -> CalibrationResult:
        """Run the blocks that no earlier run has finished."""
        count = len(self.chain.blocks)
        state = None if self.options.state is None else State(Path(self.options.state), self._key())
        done = state.next if state is not None else 0
        self.result.resumed = min(done, count)
        if done > count:
            return self.result
        before = [] if state is not None and state.started else self.order.before
        to_come = [*before, *self._inside(range(done, count)), *self.order.after]
        self.awaited = {linear.weight_name for linear in to_come if linear.own}
        states = self._enter(state)
        for number in range(self.result.resumed, count):
            states = self._block(number, states, state)
            progress(number + 1, count + 1)
        self._finish(states)
        if state is not None:
            state.advance(count + 1)
        progress(count + 1, count + 1)
        return self.result

    def _enter(self, state: State | None) -> HiddenStates:
        """Record the arguments of the blocks, and return the hidden states that enter the next one."""
        resumed = state is not None and state.started
        # The blocks that an earlier run has finished are not run again. The modules outside the blocks are, so their
        # parameters are replaced again.
        self._settle(self._outer())
        if self.order.before and not resumed:
            with Gatherer(self.order.before) as gatherer:
                for tokens in self.batches:
                    self.chain.record(tokens)
            self._hand_out(gatherer)
            self._settle(linear.weight_name for linear in self.order.before if linear.own)
        interner = Interner()
        states: HiddenStates | None = None
        for batch, tokens in enumerate(self.batches):
            first, calls = self.chain.record(tokens)
            self.calls.append([interner.call(call) for call in calls])
            if states is None:
                path = None if state is None else state.hidden(self.result.resumed)
                if resumed and path is not None and not path.exists():
                    raise UsageError(f"{path} is missing; remove {path.parent} to start anew")
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
        with placed(chain.blocks[number], chain.device):

            def step() -> None:
                for batch, calls in enumerate(self.calls):
                    after.write(batch, chain.step(number, states.read(batch, chain.device), calls[number]))

            with Gatherer(self._inside([number])) as gatherer:
                step()
            replaced = self._hand_out(gatherer)
            if self._settle(name for name in self._parameters() if name.startswith(self._prefix(number))) or replaced:
                step()
        if not after.finite():
            raise NonFiniteError(f'the activations that leave "{self.blocks_name}.{number}" are not finite')
        if state is not None:
            state.advance(number + 1)
        return after

    def _finish(self, states: HiddenStates) -> None:
        """Gather and hand out the moments of the modules behind the blocks."""
        after = self.order.after
        self.result.uncalled += [one.name for one in self.order.outer if one not in (*self.order.before, *after)]
        if not after:
            return
        with Gatherer(after, stop_at=after[-1].name) as gatherer:
            for batch, tokens in enumerate(self.batches):
                self.chain.finish(tokens, states.read(batch, torch.device("cpu")))
        self._hand_out(gatherer)

    def _hand_out(self, gatherer: Gatherer) -> bool:
        """Call ``on_module`` for every module that was called; return True if a weight was replaced."""
        self.result.uncalled += gatherer.uncalled
        self.result.modules += gatherer.called
        replaced = hand_out(gatherer, self.on_module)
        self.awaited -= {linear.weight_name for linear in gatherer.linears.values()}
        return replaced

    def _settle(self, names: Iterable[str]) -> bool:
        """Call ``on_stage`` and set the parameters that it returns; return True if there was one."""
        if self.on_stage is None:
            return False
        replaced = False
        parameters = self._parameters()
        for name, new in self.on_stage([name for name in names if name not in self.awaited], frozenset(self.awaited)):
            replace_parameter(parameters[name], name, new)
            replaced = True
        return replaced

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.chain.model.named_parameters())

    def _prefix(self, number: int) -> str:
        return f"{self.blocks_name}.{number}."

    def _inside(self, numbers: Iterable[int]) -> list[Linear]:
        """Return the linear modules of the blocks with these numbers."""
        prefixes = tuple(map(self._prefix, numbers))
        return [linear for name, linear in self.linears.items() if name.startswith(prefixes)]

    def _outer(self) -> list[str]:
        """Return the names of the parameters outside the blocks, except those of modules that are never called."""
        order = self.order
        idle = {one.weight_name for one in order.outer if one.own and one not in (*order.before, *order.after)}
        inside = tuple(map(self._prefix, range(len(self.chain.blocks))))
        return [name for name in self._parameters() if not name.startswith(inside) and name not in idle]

    def _shapes(self) -> list[tuple[int, int]]:
        return [(int(tokens.shape[0]), int(tokens.shape[1])) for tokens in self.batches]

    def _key(self) -> str:
        digest = blake3()
        for tokens in self.batches:
            digest.update(f"{tokens.shape} ".encode() + tokens.tobytes())
        for name, linear in self.linears.items():
            digest.update(f"{name} {tuple(linear.weight.shape)} {linear.weight.dtype} ".encode())
        digest.update(self.options.key.encode())
        return digest.hexdigest()
