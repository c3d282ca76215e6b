"""Norms of vLLM with the weights of every delta: small vectors that fine-tunes store whole.

A norm works on each row for itself. So the rows of a delta are normalized once more with the delta's weights, and
take the place of the base's. Rows of the base keep every bit. A table that positions choose rows of (``nn.Embedding``,
as in OPT) is served in the same way, where nothing is compiled.

Where the host knows the rows, the layer itself normalizes them again, with other weights. Compiled code and CUDA
graphs cannot choose rows: there all rows are normalized again, each with the weights of its slot, by the formula of
the layer's class, and an operation keeps the base's where nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deltafmt.runtime import operations
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.vllm.choice import Choice, Rows
from deltafmt.vllm.layers import ServedLayer
from deltafmt.vllm.parts import LayerParts

Formula = Callable[[Any, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def rms_norm(layer: Any, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalize rows by their root mean square, as vLLM's ``RMSNorm``: rounded, then multiplied."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)
    return (wide * scale).to(x.dtype) * values["weight"]


def gemma_rms_norm(layer: Any, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalize rows by their root mean square, as vLLM's ``GemmaRMSNorm``: the weight is less by one."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)
    return (wide * scale * (values["weight"].float() + 1)).to(x.dtype)


def layer_norm(layer: Any, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalize rows by mean and variance, with weights and biases of their own."""
    found = functional.layer_norm(x.float(), x.shape[-1:], eps=layer.eps) * values["weight"].float()
    if "bias" in values:
        found = found + values["bias"].float()
    return found.to(x.dtype)


# By the name of the layer's class.
FORMULAS: dict[str, Formula] = {"RMSNorm": rms_norm, "GemmaRMSNorm": gemma_rms_norm, "LayerNorm": layer_norm}


class NormLayer(ServedLayer):
    """A norm or a table of positions, whose weight and bias deltas replace.

    Args:
        name: its name in the model.
        layer: the layer, which gets another forward.
        choice: whose rows a step has.
        compiled: True if the engine compiles the model or captures graphs, so that a formula is needed.
    """

    def __init__(self, name: str, layer: Any, choice: Choice, *, compiled: bool = False) -> None:
        super().__init__(name, layer, choice)
        self.key = operations.new_key(self, choice.device)
        self._values: dict[int, dict[str, nn.Parameter]] = {}
        self._forward: Callable[..., Any] = layer.forward
        self._formula = FORMULAS.get(type(layer).__name__)
        # The values of every slot, those of the base first; and which slots have values.
        self._tables: dict[str, torch.Tensor] = {}
        self._compiled = compiled
        if compiled and self.can_compile:
            with torch.inference_mode(mode=False):
                for key, value in layer.named_parameters(recurse=False):
                    self._tables[key] = value.detach()[None].repeat(choice.slots + 1, 1)
                self._changed = torch.zeros(choice.slots + 1, dtype=torch.bool, device=choice.device)
        layer.forward = self

    @property
    def can_compile(self) -> bool:
        """True if the formula of the layer is known."""
        return self._formula is not None and getattr(self.layer, "variance_size_override", None) is None

    def put(self, slot: int, parts: LayerParts, tensors: Mapping[str, DeviceTensor]) -> None:  # noqa: ARG002 - of all
        """Fill a slot with the delta's values."""
        self.clear(slot)
        with torch.inference_mode(mode=False):
            self._values[slot] = {key: nn.Parameter(value, requires_grad=False) for key, value in parts.values.items()}
            if self._tables:
                for key, value in parts.values.items():
                    self._tables[key][slot + 1] = value
                self._changed[slot + 1] = True
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if slot not in self.slots:
            return
        self.slots.discard(slot)
        del self._values[slot]
        if self._tables:
            with torch.inference_mode(mode=False):
                for table in self._tables.values():
                    table[slot + 1] = table[0]
                self._changed[slot + 1] = False

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Normalize each row with the weights of its delta; the layer's forward."""
        args = (x,) if residual is None else (x, residual)
        if self.idle() or (self._compiled and not self._tables):
            return self._forward(*args, **kwargs)
        if self._tables:
            # The layer may write to what it is given.
            given = x.clone() if residual is None else x + residual
            found = self._forward(*args, **kwargs)
            output = found[0] if isinstance(found, tuple) else found
            if torch.compiler.is_compiling():
                operations.multiply_([output], given, self.key)
            else:
                self.multiply([output], given)
            return found
        flat = [each.flatten(0, 1) if each.dim() == 3 and each.shape[0] == 1 else each for each in args]
        segments = self.choice.segments(Rows.TOKENS, flat[0], self.name)
        if segments is None:
            return self._forward(*args, **kwargs)
        alone = next(iter(segments.lengths().items()), None)
        if alone is not None and alone[0] in self.slots and alone[1] == len(flat[0]):
            return self._with(alone[0], args, kwargs)
        # Copies, because the layer may write to what it is given.
        mine = {
            slot: (tokens, [each[tokens] for each in flat])
            for slot in segments.lengths()
            if slot in self.slots
            for tokens in (segments.members(slot),)
        }
        found = self._forward(*args, **kwargs)
        outputs = found if isinstance(found, tuple) else (found,)
        for slot, (tokens, of_slot) in mine.items():
            changed = self._with(slot, of_slot, kwargs)
            made = changed if isinstance(changed, tuple) else (changed,)
            for old, new in zip(outputs, made, strict=True):
                old.view(-1, *new.shape[1:])[tokens] = new
        return found

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Normalize the rows that deltas change, in place; what the custom operation does."""
        self.ran = True
        assert self._formula is not None
        one = given.dim() == 3 and given.shape[0] == 1
        x, y = (each.flatten(0, 1) if one else each for each in (given, outputs[0]))
        segments = self.choice.segments(Rows.TOKENS, x, self.name)
        if segments is None:
            return
        slots = segments.slots.long() + 1
        between = (1,) * (x.dim() - 2)
        values = {key: table[slots].view(len(x), *between, -1) for key, table in self._tables.items()}
        changed = self._changed[slots].view(len(x), *between, 1)
        y.copy_(torch.where(changed, self._formula(self.layer, x, values), y))

    def _with(self, slot: int, given: Sequence[torch.Tensor], kwargs: dict[str, Any]) -> Any:
        """Normalize rows with the weights of a slot."""
        kept = {key: self.layer._parameters[key] for key in self._values[slot]}  # noqa: SLF001
        try:
            self.layer._parameters.update(self._values[slot])  # noqa: SLF001
            return self._forward(*given, **kwargs)
        finally:
            self.layer._parameters.update(kept)  # noqa: SLF001
