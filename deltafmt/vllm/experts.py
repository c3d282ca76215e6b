"""Experts of vLLM with the matrices of every delta, on the CPU.

The engine's kernels compute all experts of a token in one call, so nothing can be added between their products. The
tokens of a delta are computed once more, with the experts of the fine-tune, and take the place of the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.nn import functional

from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.vllm import seam
from deltafmt.vllm.choice import Rows
from deltafmt.vllm.layers import ServedLayer
from deltafmt.vllm.parts import LayerParts

# By the name of the activation that stands between an expert's products.
ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
}


def backend(own: Any, moe_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Choose the kernels of experts; where there is no Triton, as on the CPU, those of a model without LoRA.

    vLLM takes Triton's wherever LoRA is on, and the first step then ends the engine.
    """
    if moe_config.is_lora_enabled and not seam.name("vllm.triton_utils", "HAS_TRITON"):
        moe_config = copy.copy(moe_config)
        moe_config.is_lora_enabled = False
    return own(moe_config, *args, **kwargs)


def refusal(layer: Any, device: torch.device) -> str:
    """Return why the experts of a layer cannot be computed once more; empty if they can."""
    method = layer.quant_method
    if device.type != "cpu":
        return "experts are served on the CPU alone"
    if method.is_monolithic or layer.apply_router_weight_on_input or layer.moe_config.has_bias:
        return "its kernels choose the experts themselves, or weigh or shift what these are given"
    if layer.local_num_experts != layer.global_num_experts:
        return "its experts are shared out over processes"
    if str(getattr(layer.activation, "value", layer.activation)) not in ACTIVATIONS:
        return f"the activation {layer.activation} of its experts is not known"
    return ""


class ExpertsLayer(ServedLayer):
    """A layer of experts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._activation = ACTIVATIONS[str(getattr(self.layer.activation, "value", self.layer.activation))]
        self._matrices: dict[int, dict[tuple[int, str], torch.Tensor]] = {}
        method = self.layer.quant_method
        self._apply: Callable[..., Any] = method.apply
        method.apply = self.apply

    def put(self, slot: int, parts: LayerParts, tensors: Mapping[str, DeviceTensor]) -> None:  # noqa: ARG002 - of all
        """Fill a slot with the delta's experts."""
        self.clear(slot)
        self._matrices[slot] = parts.experts
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.slots.discard(slot)
        self._matrices.pop(slot, None)

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the weighted sum of each token's experts; what the layer's method computes."""
        if self.idle():
            return self._apply(layer, x, topk_weights, topk_ids, *args, **kwargs)
        segments = self.choice.segments(Rows.TOKENS, x, self.name)
        if segments is None:
            return self._apply(layer, x, topk_weights, topk_ids, *args, **kwargs)
        # Copies, because the method may write to what it is given.
        mine = {
            slot: (tokens, x[tokens], topk_weights[tokens], topk_ids[tokens])
            for slot in segments.lengths()
            if slot in self.slots
            for tokens in (segments.members(slot),)
        }
        y = self._apply(layer, x, topk_weights, topk_ids, *args, **kwargs)
        for slot, (tokens, given, weights, ids) in mine.items():
            y[tokens] = self._experts(self._matrices[slot], given.float(), weights.float(), ids).to(y.dtype)
        return y

    def _experts(
        self,
        matrices: Mapping[tuple[int, str], torch.Tensor],
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sum of experts in float32: down(activation(gate x) up x)."""
        total = torch.zeros(len(x), len(matrices[0, "w2"]), dtype=torch.float32, device=x.device)
        for expert in sorted(set(ids.flatten().tolist())):
            rows, places = (ids == expert).nonzero(as_tuple=True)
            gate, up = (functional.linear(x[rows], matrices[expert, name]) for name in ("w1", "w3"))
            found = functional.linear(self._activation(gate) * up, matrices[expert, "w2"])
            total.index_add_(0, rows, found * weights[rows, places, None])
        return total
