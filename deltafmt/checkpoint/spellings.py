"""Spellings of one and the same name: wrappers of a training run in its middle, old words, names of experts.

Two names that have the same plain spelling belong to the same tensor of a model. The rules are those that hold for
every architecture; those of one architecture are transformers' (:mod:`deltafmt.checkpoint.library_names`).
"""

from __future__ import annotations

from typing import Final

# Modules that torch.compile, FSDP, activation checkpointing, DeepSpeed, Accelerate and PEFT put around others.
WRAPPERS: Final = frozenset(
    (
        *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_flat_param"),
        *("base_layer", "_module", "_wrapped_module", "_ddp_module"),
    )
)
# Beginnings that DistributedDataParallel and PEFT give to all names. In the middle of a name these may be modules.
LEADING: Final = (("base_model", "model"), ("module",))

# Parameters that old checkpoints of BERT's family call otherwise.
_OLD_WORDS: Final = {"gamma": "weight", "beta": "bias"}
# The matrices of an expert, as the files of Mixtral and of others call them.
_EXPERT_WORDS: Final = {
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "fc1": "gate_proj",
    "fc2": "down_proj",
    "fc3": "up_proj",
}


def plain_name(name: str) -> str:
    """Return the plain spelling of a tensor's name.

    For example, ``_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight`` becomes
    ``model.layers.0.mlp.up_proj.weight``.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    changed = True
    while changed:
        changed = False
        for leading in LEADING:
            if tuple(parts[: len(leading)]) == leading and len(parts) > len(leading) + 1:
                parts = parts[len(leading) :]
                changed = True
    if len(parts) > 1 and "LayerNorm" in parts[-2]:
        parts[-1] = _OLD_WORDS.get(parts[-1], parts[-1])
    for i, part in enumerate(parts):
        if part == "block_sparse_moe":
            parts[i] = "mlp"
        elif part in _EXPERT_WORDS and "experts" in parts[max(i - 2, 0) : i]:
            parts[i] = _EXPERT_WORDS[part]
    return ".".join(parts)


def is_layered(name: str) -> bool:
    """Tell whether a name has a number in it, as those of a model's layers have."""
    return any(part.isascii() and part.isdigit() for part in name.split("."))


def numberless(name: str) -> str:
    """Return a name with ``*`` in the place of every number: the pattern of a tensor in all layers."""
    return ".".join("*" if part.isascii() and part.isdigit() else part for part in name.split("."))
