"""Norms of vLLM with the weights of every delta: small vectors that fine-tunes store whole.

A norm works on each row for itself. So the rows of a delta are normalized once more with the delta's weights, and
take the place of the base's. Rows of the base keep every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltafmt.vllm.choice import Choice, Rows
from deltafmt.vllm.layers import ServedLayer
from deltafmt.vllm.parts import LayerParts


class NormLayer(ServedLayer):
    """A norm, whose weight and bias deltas replace."""

    def __init__(self, name: str, layer: Any, choice: Choice) -> None:
        super().__init__(name, layer, choice)
        self._values: dict[int, dict[str, nn.Parameter]] = {}
        self._forward: Callable[..., Any] = layer.forward
        layer.forward = self

    def put(self, slot: int, parts: LayerParts) -> None:
        """Fill a slot with the delta's values."""
        self.clear(slot)
        with torch.inference_mode(mode=False):
            self._values[slot] = {key: nn.Parameter(value, requires_grad=False) for key, value in parts.values.items()}
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.slots.discard(slot)
        self._values.pop(slot, None)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Normalize each row with the weights of its delta; the layer's forward."""
        args = (x,) if residual is None else (x, residual)
        if self.idle():
            return self._forward(*args, **kwargs)
        segments = self.choice.segments(
            Rows.TOKENS, x.view(-1, *x.shape[-1:]) if x.dim() == 3 and x.shape[0] == 1 else x, self.name
        )
        if segments is None:
            return self._forward(*args, **kwargs)
        # The layer may write to what it is given.
        flat = [each.flatten(0, 1) if each.dim() == 3 and each.shape[0] == 1 else each for each in args]
        mine = {
            slot: (tokens, [each[tokens] for each in flat])
            for slot in segments.lengths()
            if slot in self.slots
            for tokens in (segments.members(slot),)
        }
        found = self._forward(*args, **kwargs)
        outputs = found if isinstance(found, tuple) else (found,)
        for slot, (tokens, given) in mine.items():
            changed = self._with(slot, given, kwargs)
            made = changed if isinstance(changed, tuple) else (changed,)
            for output, new in zip(outputs, made, strict=True):
                output.view(-1, *new.shape[1:])[tokens] = new
        return found

    def _with(self, slot: int, given: list[torch.Tensor], kwargs: dict[str, Any]) -> Any:
        """Normalize rows with the weights of a slot."""
        kept = {key: self.layer._parameters[key] for key in self._values[slot]}  # noqa: SLF001
        try:
            self.layer._parameters.update(self._values[slot])  # noqa: SLF001
            return self._forward(*given, **kwargs)
        finally:
            self.layer._parameters.update(kept)  # noqa: SLF001
