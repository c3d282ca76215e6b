"""Files of transformers against the names and layouts that it has in memory, by its own conversion mappings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from conftest import read_folder
from deltafmt.checkpoint import library_names
from deltafmt.errors import WrongBaseError
from tiny_checkpoints import FINE

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
if not transformers.__version__.startswith("5."):
    pytest.skip("transformers 4 saves what it holds", allow_module_level=True)

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {**TEXT, "num_local_experts": 3, "num_experts_per_tok": 2}


def model(kind: str) -> Any:
    """Return a tiny model with random weights."""
    made = {
        "ViT": lambda t: t.ViTForImageClassification(t.ViTConfig(**VISION)),
        "DINOv2": lambda t: t.Dinov2ForImageClassification(t.Dinov2Config(**VISION, use_swiglu_ffn=True)),
        "Mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**EXPERTS)),
        "PhiMoE": lambda t: t.PhimoeForCausalLM(t.PhimoeConfig(**EXPERTS)),
        "GraniteMoE": lambda t: t.GraniteMoeForCausalLM(t.GraniteMoeConfig(**EXPERTS)),
        "LLaVA": lambda t: t.LlavaForConditionalGeneration(
            t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION))
        ),
    }[kind](transformers)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    return made.to(torch.bfloat16)


def saved(made: Any, folder: Path, *, in_memory: bool) -> Path:
    """Save a model as transformers does, or under the names and in the layout that it has in memory."""
    from safetensors.torch import save_file

    made.save_pretrained(folder)
    if in_memory:
        shutil.rmtree(folder / "unused", ignore_errors=True)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        state = {name: tensor.clone().contiguous() for name, tensor in made.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.situation(
    "a family whose layers transformers renames in the middle of names: ViT, DINOv2, Segformer, PhiMoE"
)
@pytest.mark.parametrize("which", ["base", "finetuned"])
@pytest.mark.parametrize("kind", ["ViT", "DINOv2", "Mixtral", "PhiMoE", "GraniteMoE", "LLaVA"])
def test_a_family_in_its_two_forms(tmp_path: Path, kind: str, which: str) -> None:
    made = model(kind)
    base = saved(made, tmp_path / "base", in_memory=which == "base")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.002)
    finetuned = saved(made, tmp_path / "ft", in_memory=which == "finetuned")
    before, wanted = read_folder(base), read_folder(finetuned)
    assert before.keys() != wanted.keys()
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=FINE)
    assert set(result.kept.values()) <= {"no smaller when packed"}
    assert result.removed == []
    assert deltafmt.verify(tmp_path / "d.deltafmt", base).base_tensors
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(np.abs(found[name].floats() - wanted[name].floats()).max() < 0.002 for name in wanted)


def test_without_transformers_the_names_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_names.importlib.util, "find_spec", lambda _: None)
    made = model("ViT")
    base, finetuned = (saved(made, tmp_path / name, in_memory=name == "ft") for name in ("base", "ft"))
    with pytest.raises(WrongBaseError, match=r'"vit\.layers\.0.*"vit\.encoder\.layer\.0') as caught:
        deltafmt.pack(base, finetuned, tmp_path / "d")
    assert caught.value.remedy is not None
