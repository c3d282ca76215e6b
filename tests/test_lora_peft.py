"""Adapters that PEFT trained, and adapters that PEFT loads; skipped where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltafmt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tiny_models import close, ids, logits, new_model

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"up_proj": 7, "layers.1.*.down_proj": 2},
            "alpha_pattern": {"up_proj": 3},
            "use_rslora": True,
        },
    ),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "biases of its modules": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "transposed squares": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "more vectors than columns": ("opt", {"target_modules": ["q_proj", "fc1"], "r": 40}),
    "a new head": ("bert", {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("case", CASES)
def test_import_merges_and_export_loads_as_peft_does(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    model = new_model(kind)
    cls = type(model)
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "adapter")
    tokens = ids(2, 9)
    expected = logits(tuned.eval(), tokens)

    delta = deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "d.deltafmt").path
    deltafmt.unpack(tmp_path / "base", delta, tmp_path / "merged")
    assert close(logits(cls.from_pretrained(tmp_path / "merged").eval(), tokens), expected)

    deltafmt.export_lora(delta, tmp_path / "exported")
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "exported")
    assert close(logits(loaded.eval(), tokens), expected)
    assert not close(logits(cls.from_pretrained(tmp_path / "base").eval(), tokens), expected)


def test_singular_vectors_load_as_an_adapter(tmp_path: Path) -> None:
    """What a method of low rank packed computes the same, attached and as an adapter."""
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "tuned")
    delta = tmp_path / "d.deltafmt"
    method = deltafmt.methods.DeltaCoMe("2@8+6@4", scale_group=8)
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", delta, method=method)
    deltafmt.export_lora(delta, tmp_path / "exported", base=tmp_path / "base")
    cls, tokens = type(model), ids(2, 9)
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "exported")
    attached = deltafmt.transformers.attach(cls.from_pretrained(tmp_path / "base").eval(), {"a": delta})
    with attached.delta("a"):
        expected = logits(attached, tokens)
    assert close(logits(loaded.eval(), tokens), expected)
