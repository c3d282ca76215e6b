"""LoRA adapters for tests, written as PEFT writes them, and what they mean, computed in the slowest way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conftest import Raw, Tensors, normal, safetensors_bytes, write_folder

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "SEQ_2_SEQ_LM",
    "base_model_name_or_path": "somebody/tiny",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q"],
    "use_dora": False,
    "use_rslora": False,
}


def write_adapter(folder: Path, tensors: Mapping[str, Raw], files: Mapping[str, bytes] = {}, **config: Any) -> Path:
    """Write an adapter's folder; the tensors' names are without PEFT's prefix."""
    folder.mkdir(parents=True)
    full = {PREFIX + name: tensor for name, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(full, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def pair_of(module: str, rows: int, columns: int, rank: int = 4, dtype: str = "BF16", seed: int = 1) -> Tensors:
    """Return the factors of a linear module."""
    return {
        f"{module}.lora_A.weight": normal(seed, (rank, columns), dtype, 0.1),
        f"{module}.lora_B.weight": normal(seed + 1, (rows, rank), dtype, 0.1),
    }


def product(a: Raw, b: Raw, scaling: float) -> NDArray[np.float32]:
    """Return scaling * B A as the specification sums it: vector by vector in float32, B scaled and rounded first."""
    scaled = (b.floats().astype(np.float64) * scaling).astype(np.float32)
    total = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for column, row in zip(scaled.T, a.floats(), strict=True):
        total = total + np.outer(column, row).astype(np.float32)
    return total


@dataclass(frozen=True)
class Files:
    """A base and an adapter of it, as folders and as the tensors that were written."""

    base: Path
    adapter: Path
    tensors: Tensors
    factors: Tensors


BASE_FILES = {
    "config.json": b'{"model_type": "tiny"}\n',
    "generation_config.json": b"{}",
    "README.md": b"the base\n",
    "tokenizer.json": b'{"of": "the base"}',
    "vocab.json": b"{}",
}


def base_tensors(dtype: str = "BF16") -> Tensors:
    return {
        "model.embed_tokens.weight": normal(1, (40, 24), dtype),
        "model.layers.0.q.weight": normal(2, (48, 24), dtype),
        "model.layers.0.q.bias": normal(3, (48,), dtype),
        "model.layers.0.o.weight": normal(4, (24, 24), dtype),
        "model.layers.10.q.weight": normal(5, (48, 24), dtype),
        "model.norm.weight": normal(6, (24,), dtype),
        "lm_head.weight": normal(7, (40, 24), dtype),
    }


def small_files(folder: Path) -> Files:
    """Write a base and an adapter of two modules, rank 4 and a scaling of 2."""
    tensors = base_tensors()
    factors = {**pair_of("model.layers.0.q", 48, 24), **pair_of("model.layers.10.q", 48, 24, seed=5)}
    base = write_folder(folder / "base", tensors, files=BASE_FILES)
    return Files(base, write_adapter(folder / "adapter", factors), tensors, factors)
