"""Tensors of tiny models by the names of real checkpoints, and the ways in which savers spell and lay them out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from conftest import Raw, Tensors, normal, nudge, raw
from deltafmt.methods import RTN

HIDDEN, INNER, VOCABULARY, LAYERS, EXPERTS = 64, 96, 160, 2, 3

# Close enough to tell a delta from a tensor stored whole, and values from those of another tensor.
FINE = RTN(8)


def language_model(prefix: str = "", seed: int = 0, *, head: bool = True) -> Tensors:
    """Return a decoder as Llama's files have it."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{start}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{start}mlp.down_proj.weight": (HIDDEN, INNER), f"{start}input_layernorm.weight": (HIDDEN,)}
    if head:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return {prefix + name: normal(seed + i, shape, scale=0.05) for i, (name, shape) in enumerate(shapes.items())}


def vision_tower(prefix: str = "vision_tower.") -> Tensors:
    """Return an encoder beside a language model, whose matrices have shapes of their own."""
    names = [f"{prefix}blocks.{layer}.attn.proj.weight" for layer in range(LAYERS)]
    return {name: normal(700 + i, (48, 48), scale=0.05) for i, name in enumerate(names)}


def experts(words: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), block: str = "mlp") -> Tensors:
    """Return a mixture of experts with a matrix of its own for each expert."""
    gate, up, down = words
    tensors: Tensors = {"model.embed_tokens.weight": normal(1, (VOCABULARY, HIDDEN), scale=0.05)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.{block}.experts."
        for number in range(EXPERTS):
            seed = 100 * layer + 10 * number
            tensors[f"{start}{number}.{gate}.weight"] = normal(seed + 1, (INNER, HIDDEN), scale=0.05)
            tensors[f"{start}{number}.{up}.weight"] = normal(seed + 2, (INNER, HIDDEN), scale=0.05)
            tensors[f"{start}{number}.{down}.weight"] = normal(seed + 3, (HIDDEN, INNER), scale=0.05)
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = normal(900 + layer, (HIDDEN, HIDDEN), scale=0.05)
    return tensors


def tuned(tensors: Tensors) -> Tensors:
    """Return the tensors after some training."""
    return {name: nudge(tensor, 5000 + i, scale=0.003) for i, (name, tensor) in enumerate(tensors.items())}


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """Return the tensors under other names."""
    return {rename(name): tensor for name, tensor in tensors.items()}


def joined(*tensors: Raw, stacked: bool = False) -> Raw:
    """Return tensors one behind the other, along their first dimension or along a new one."""
    first = tensors[0]
    shape = (len(tensors), *first.shape) if stacked else (sum(one.shape[0] for one in tensors), *first.shape[1:])
    return Raw(first.dtype, shape, b"".join(one.data for one in tensors))


def stacked(tensors: Tensors, words: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Tensors:
    """Return a mixture of experts with one tensor for all experts, as transformers 5 holds it."""
    gate, up, down = words
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for start in dict.fromkeys(name.partition(".experts.")[0] for name in tensors if ".experts." in name):
        parts = [
            [tensors[f"{start}.experts.{number}.{word}.weight"] for number in range(EXPERTS)]
            for word in (gate, up, down)
        ]
        both = [joined(a, b) for a, b in zip(parts[0], parts[1], strict=True)]
        out[f"{start}.experts.gate_up_proj"] = joined(*both, stacked=True)
        out[f"{start}.experts.down_proj"] = joined(*parts[2], stacked=True)
    return out


def fused(tensors: Tensors, order: str = "qkv") -> Tensors:
    """Return a decoder with q, k and v in one matrix, and gate and up in another, as Phi-3's files have it."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{one}_proj.")] for one in order]
            out[name.replace(".q_proj.", ".qkv_proj.")] = joined(*parts)
        elif ".gate_proj." in name:
            up = tensors[name.replace(".gate_proj.", ".up_proj.")]
            out[name.replace(".gate_proj.", ".gate_up_proj.")] = joined(tensor, up)
        elif not any(word in name for word in (".k_proj.", ".v_proj.", ".up_proj.")):
            out[name] = tensor
    return out


def by_head(tensors: Tensors) -> Tensors:
    """Return a fused decoder whose q, k and v rows alternate head by head."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if ".qkv_proj." in name:
            values = tensor.floats().reshape(3, 4, HIDDEN // 4, HIDDEN).transpose(1, 0, 2, 3)
            out[name] = raw(np.ascontiguousarray(values).reshape(3 * HIDDEN, HIDDEN), tensor.dtype)
    return out
