"""Synthetic base and fine-tune pairs of any size, in the shapes of a Llama, for speed and memory only.

Values come from one block of random numbers read at changing offsets, so that a gibibyte takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deltafmt.checkpoint.writer import CheckpointWriter, TensorSpec
from deltafmt.codecs.floats import narrow

BLOCK = 1 << 22


def llama_specs(nbytes: int, hidden: int = 4096, inner: int = 11008, vocabulary: int = 8192) -> list[TensorSpec]:
    """Return bf16 tensors of at least ``nbytes``: an embedding and as many layers as that takes."""
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (vocabulary, hidden))]
    layer = 0
    while sum(spec.nbytes for spec in specs) < nbytes:
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            specs.append(TensorSpec(f"{prefix}self_attn.{name}_proj.weight", "BF16", (hidden, hidden)))
        specs.append(TensorSpec(f"{prefix}mlp.gate_proj.weight", "BF16", (inner, hidden)))
        specs.append(TensorSpec(f"{prefix}mlp.up_proj.weight", "BF16", (inner, hidden)))
        specs.append(TensorSpec(f"{prefix}mlp.down_proj.weight", "BF16", (hidden, inner)))
        specs.append(TensorSpec(f"{prefix}input_layernorm.weight", "BF16", (hidden,)))
        layer += 1
    return specs


def write_pair(folder: Path, specs: list[TensorSpec], seed: int = 0) -> tuple[Path, Path]:
    """Write ``base`` and ``finetuned`` below a folder, unless they are there; return their paths."""
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(BLOCK, np.float32) * np.float32(0.02)
    change = rng.standard_normal(BLOCK, np.float32) * np.float32(0.001)
    sides = {"base": narrow(block, "BF16"), "finetuned": narrow(block + change, "BF16")}
    paths = []
    for side, values in sides.items():
        path = folder / side
        paths.append(path)
        if path.exists():
            continue
        doubled = np.concatenate([values, values])
        writer = CheckpointWriter(path, specs)
        for number, spec in enumerate(specs):
            for offset in range(0, spec.nbytes, 2 * BLOCK):
                start = (number * 1_000_003 + offset // 2 * 7) % BLOCK
                count = min(BLOCK, (spec.nbytes - offset) // 2)
                writer.write(spec.name, offset, memoryview(doubled[start : start + count]).cast("B"))
        writer.commit()
    return paths[0], paths[1]
