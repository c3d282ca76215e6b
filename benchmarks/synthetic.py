"""Synthetic base and fine-tune pairs of any size, in the shapes of a Llama, for speed and memory only.

Values come from one block of random numbers read at changing offsets, so that a gibibyte takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.terms.floats import narrow

BLOCK = 1 << 22


def llama_specs(nbytes: int, hidden: int = 4096, inner: int = 11008, vocabulary: int = 8192) -> list[TensorSpec]:
    """Return bf16 tensors of at least ``nbytes``: an embedding and as many layers as that takes."""
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (vocabulary, hidden))]
    layer = 0
    while sum(spec.nbytes for spec in specs) < nbytes:
        prefix = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
        }
        specs += [TensorSpec(f"{prefix}{name}.weight", "BF16", shape) for name, shape in shapes.items()]
        layer += 1
    return specs


def write_pair(
    folder: Path, specs: list[TensorSpec], seed: int = 0, change_seed: int | None = None
) -> tuple[Path, Path]:
    """Write ``base`` and ``finetuned`` below a folder, unless they are there; return their paths.

    Pairs of one ``seed`` have the same base. With a ``change_seed``, the fine-tune is another one of it.
    """
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(BLOCK, np.float32) * np.float32(0.02)
    rng = rng if change_seed is None else np.random.default_rng(change_seed)
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
