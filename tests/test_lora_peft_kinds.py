"""Adapters as PEFT writes them now, compared with what PEFT computes; skipped where PEFT is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import deltafmt
import deltafmt.transformers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from deltafmt.checkpoint.parameter_names import Piece
from deltafmt.pipeline.model_layout import model_layout
from lora_models import new_family, outputs, same, shake

pytestmark = pytest.mark.filterwarnings("ignore")


class Case(NamedTuple):
    """An adapter.

    Attributes:
        family: the architecture.
        options: what the adapter's configuration says.
        resize: the vocabulary's new size, if it is resized.
        exports: False if the imported delta cannot be exported.
    """

    family: str
    options: dict[str, Any]
    resize: int = 0
    exports: bool = True


Q = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, Case] = {
    "dora": Case("llama", {"target_modules": "all-linear", "use_dora": True}, exports=False),
    "dora and plain modules": Case(
        "llama", {"target_modules": Q, "use_dora": True, "modules_to_save": ["norm"]}, exports=False
    ),
    "dora of transposed modules": Case(
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}, exports=False
    ),
    "dora of an embedding": Case("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, exports=False),
    "a bias of b": Case("phi", {"target_modules": Q, "lora_bias": True}),
    "a bias of b and other biases": Case("phi", {"target_modules": Q, "lora_bias": True, "bias": "lora_only"}),
    "trained rows": Case("llama", {"target_modules": Q, "trainable_token_indices": [5, 90, 91]}),
    "trained rows of a tied base": Case("llama-tied", {"target_modules": Q, "trainable_token_indices": [5, 90, 91]}),
    "trained rows by name": Case(
        "llama", {"target_modules": Q, "trainable_token_indices": {"lm_head": [3], "embed_tokens": [4]}}
    ),
    "a larger vocabulary that is not trained": Case("llama", {"target_modules": Q}, 100, exports=False),
    "saved ends of a larger vocabulary": Case(
        "llama", {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]}, 100, exports=False
    ),
    "factors of a larger vocabulary": Case(
        "llama", {"target_modules": [*Q, "embed_tokens", "lm_head"]}, 100, exports=False
    ),
    "a larger vocabulary of a tied base": Case(
        "llama-tied", {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]}, 100, exports=False
    ),
    "trained rows of a larger vocabulary": Case(
        "llama", {"target_modules": Q, "trainable_token_indices": [97, 98]}, 100, exports=False
    ),
    "the head of a tied base": Case("llama-tied", {"target_modules": [*Q, "lm_head"]}),
    "the embedding of a tied base": Case("llama-tied", {"target_modules": [*Q, "embed_tokens"]}),
    "both ends of a tied base": Case("llama-tied", {"target_modules": [*Q, "embed_tokens", "lm_head"]}),
    "both ends, kept tied": Case("llama-tied", {"target_modules": [*Q, "embed_tokens"], "ensure_weight_tying": True}),
    "a saved head of a tied base": Case("llama-tied", {"target_modules": Q, "modules_to_save": ["lm_head"]}),
    "a saved embedding of a tied base": Case("llama-tied", {"target_modules": Q, "modules_to_save": ["embed_tokens"]}),
    "saved ends, kept tied": Case(
        "llama-tied", {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "a tied head by another name": Case(
        "gpt_neox", {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}
    ),
    "the head of a tied gpt2": Case("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "the head of a tied bert": Case("bert-mlm", {"target_modules": ["query", "decoder"]}),
    "the embedding of a tied bert": Case("bert-mlm", {"target_modules": ["query", "word_embeddings"]}),
    "experts": Case(
        "qwen3_moe", {"target_modules": Q, "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}}
    ),
    "experts alone": Case("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts by older names": Case("mixtral", {"target_modules": [*Q, "gate", "w1", "w2", "w3"]}),
    "transposed experts": Case("gpt_oss", {"target_modules": Q, "target_parameters": EXPERTS}),
    "routers": Case(
        "qwen2_moe", {"target_modules": Q, "target_parameters": ["mlp.gate.weight"], "rank_pattern": {"gate.weight": 2}}
    ),
    "convolutions": Case("vit", {"target_modules": ["projection", "q_proj"]}, exports=False),
    "a part of a multimodal model": Case("llava", {"target_modules": r".*language_model.*q_proj|.*linear_1|lm_head"}),
    "patterns": Case(
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {r"layers\.(0|7)\..*attn.*": 5, ".*mlp.*": 2},
        },
    ),
    "one layer": Case("llama", {"target_modules": Q, "layers_to_transform": [1], "init_lora_weights": "orthogonal"}),
    "a saved classifier": Case("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


def trained(case: Case, folder: Path) -> tuple[Any, Any]:
    """Write a base and an adapter; return PEFT's model and the class of the base."""
    model = new_family(case.family)
    cls = type(model)
    model.save_pretrained(folder / "base")
    model = cls.from_pretrained(folder / "base").eval()
    if case.resize:
        model.resize_token_embeddings(case.resize, mean_resizing=False)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **case.options})).eval()
    for seed, part in enumerate(("lora_", "modules_to_save", "trainable_tokens")):
        shake(tuned, seed + 1, 0.2, part)
    tuned.save_pretrained(folder / "adapter")
    return tuned, cls


@pytest.mark.parametrize("name", CASES)
def test_what_is_imported_is_what_peft_computes(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    tuned, cls = trained(case, tmp_path)
    expected = outputs(tuned.base_model.model, case.family)
    delta = deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "d.deltafmt").path
    deltafmt.verify(delta, tmp_path / "base")
    deltafmt.unpack(tmp_path / "base", delta, tmp_path / "merged")
    merged = cls.from_pretrained(tmp_path / "merged").eval()
    assert same(outputs(merged, case.family), expected)
    assert not same(outputs(cls.from_pretrained(tmp_path / "base").eval(), case.family)[..., :1], expected[..., :1])
    if not case.exports:
        return
    deltafmt.export_lora(delta, tmp_path / "again", base=tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "again").eval()
    assert same(outputs(loaded.base_model.model, case.family), expected)
    assert same(outputs(loaded.merge_and_unload().eval(), case.family), expected)


# Adapters whose tensors attach does not find, or does not serve, in the model.
NOT_SERVED = ("another name", "experts", "routers", "convolutions", "multimodal")


@pytest.mark.parametrize("name", [name for name in CASES if not any(word in name for word in NOT_SERVED)])
def test_what_is_served_is_what_peft_computes(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    tuned, cls = trained(case, tmp_path)
    expected = outputs(tuned.base_model.model, case.family)
    delta = deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "d.deltafmt").path
    attached = deltafmt.transformers.attach(cls.from_pretrained(tmp_path / "base").eval(), {"a": delta})
    with attached.delta("a"):
        assert same(outputs(attached, case.family), expected)


@pytest.mark.parametrize("name", ["the embedding of a tied base", "experts", "a part of a multimodal model"])
def test_without_transformers_a_table_stands_in(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing adapters of the well-known families takes no transformers, and gives the same."""
    case = CASES[name]
    trained(case, tmp_path)
    wanted = deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "1.deltafmt")
    monkeypatch.setattr("deltafmt.pipeline.model_layout._installed", lambda _: False)
    found = deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "2.deltafmt")
    assert found.content_id == wanted.content_id


def test_a_tie_of_more_than_two_is_refused(tmp_path: Path) -> None:
    """T5 ties three tables and a head; a checkpoint cannot say that one of them differs."""
    trained(Case("t5", {"target_modules": ["q", "lm_head"]}), tmp_path)
    with pytest.raises(deltafmt.errors.UnsupportedError, match=r"the base ties .*serve this adapter with PEFT"):
        deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "d.deltafmt")


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"layer_types": ["x"] * 10**4}, {"architectures": [7]}],
)
def test_configurations_that_no_model_has_are_not_made(change: dict[str, Any]) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, **change}
    layout = model_layout({"text_config": config, **config}, {"q.weight": (4, 4)})
    assert not layout.known
    assert layout.pieces["q.weight"] == (Piece("q.weight"),)


def test_making_a_layout_draws_no_random_numbers(tmp_path: Path) -> None:
    trained(CASES["the head of a tied base"], tmp_path)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "d.deltafmt")
    assert torch.equal(torch.rand(3), wanted)
