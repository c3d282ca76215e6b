"""What one delta changes in one layer of this process, ready to be put into a slot: terms, whole values, biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True, eq=False)
class LayerParts:
    """What a delta changes in a layer.

    Attributes:
        packed: by the layer's row at which they begin, the names of tensors whose packed terms kernels multiply with.
        whole: the layer's weight for the delta's rows, float32, where no kernel runs and the engine holds its own as it
            is.
        decoded: float32 matrices that are added to the layer's, by the row of it at which they begin, where no kernel
            runs and the engine has packed or quantized its own.
        bias: what is added to the layer's bias, float32; its columns are the layer's rows.
        values: whole values by the parameter's name, in the parameter's dtype: of norms.
        experts: decoded matrices by expert and by ``w1``, ``w2`` or ``w3``.
    """

    packed: dict[int, str] = field(default_factory=dict)
    whole: torch.Tensor | None = None
    decoded: dict[int, torch.Tensor] = field(default_factory=dict)
    bias: torch.Tensor | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
