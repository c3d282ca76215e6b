"""Tests of the situations that a page of the documentation lists: each line of its table names one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Pair, Raw, Tensors, normal, nudge, safetensors_bytes, write_folder
from deltafmt.methods import DeltaDQ

NEAR = DeltaDQ(2, 2, 8)  # nearly without loss, for comparing values


situation = pytest.mark.situation  # test_docs_checkpoints.py compares the texts with the page


def llama(layers: int = 2, width: int = 64) -> Tensors:
    """Return the tensors of a small model with names as llama's."""
    names = {"model.embed_tokens.weight": (128, width), "lm_head.weight": (128, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            names[f"model.layers.{layer}.{name}.weight"] = (128, width)
        names[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
    return {name: normal(number, shape) for number, (name, shape) in enumerate(names.items())}


def tuned(tensors: Mapping[str, Raw], seed: int = 100) -> Tensors:
    """Return a fine-tune of some tensors."""
    return {name: nudge(tensor, seed + number) for number, (name, tensor) in enumerate(tensors.items())}


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}


def config(**changes: Any) -> bytes:
    """Return a ``config.json``."""
    return json.dumps({**CONFIG, **changes}).encode()


def model_pair(folder: Path, b: Mapping[str, Raw] | None = None, **changes: Any) -> Pair:
    """Write a base and a fine-tune with configurations; ``changes`` are those of the fine-tune's."""
    a = llama()
    b = dict(tuned(a) if b is None else b)
    return Pair(
        write_folder(folder / "base", a, files={"config.json": config()}),
        write_folder(folder / "ft", b, files={"config.json": config(**changes)}),
        a,
        b,
    )


def put(folder: Path, name: str, tensors: Mapping[str, Raw], **files: bytes) -> Path:
    """Write a weight file of any name, and JSON files beside it, into a folder that may exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(safetensors_bytes(tensors))
    for stem, data in files.items():
        (folder / f"{stem}.json").write_bytes(data)
    return folder


def round_trip(base: Path, finetuned: Path, folder: Path, **options: Any) -> tuple[Any, Path]:
    """Pack nearly without loss, verify and unpack; return the result and the unpacked folder."""
    folder.mkdir(parents=True, exist_ok=True)
    result = deltafmt.pack(base, finetuned, folder / "d.deltafmt", method=NEAR, **options)
    deltafmt.verify(folder / "d.deltafmt", base)
    deltafmt.unpack(base, folder / "d.deltafmt", folder / "out")
    return result, folder / "out"


def files_of(folder: Path) -> set[str]:
    """Return the paths of all files of a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def near(found: Raw, wanted: Raw, base: Raw) -> bool:
    """Tell whether a tensor is the wanted one rather than the base's: its delta has a small error."""
    error = found.floats() - wanted.floats()
    delta = wanted.floats() - base.floats()
    return found.dtype == wanted.dtype and float((error**2).sum()) < 0.01 * float((delta**2).sum()) + 1e-12
