"""Adapters of many architectures, to and from PEFT; skipped where PEFT is missing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import SVD

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from lora_models import FAMILIES, new_family, outputs, same, shake

pytestmark = pytest.mark.filterwarnings("ignore")

# PEFT itself gives these no factors for all of their linear modules.
_NOT_ALL_LINEAR = ("jamba", "llama4", "mamba2", "phimoe")
_NO_EXPORT = ("umt5",)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in _NO_EXPORT])
def test_an_exported_adapter_is_the_model_that_unpack_writes(tmp_path: Path, name: str) -> None:
    """A full fine-tune as an adapter: PEFT computes the same, as it is loaded and as it is merged, and lacks none."""
    model = new_family(name)
    cls = type(model)
    model.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(model)
    shake(tuned, 3, 0.05)
    tuned.save_pretrained(tmp_path / "tuned")
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", delta, method=SVD(4))
    deltafmt.unpack(tmp_path / "base", delta, tmp_path / "merged")
    expected = outputs(cls.from_pretrained(tmp_path / "merged").eval(), name)
    deltafmt.export_lora(delta, tmp_path / "adapter", base=tmp_path / "base")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert not [str(warning.message) for warning in said if "adapter keys" in str(warning.message)]
    assert same(outputs(loaded.base_model.model, name), expected)
    assert same(outputs(loaded.merge_and_unload().eval(), name), expected)
    assert not same(outputs(model, name), expected)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in _NOT_ALL_LINEAR])
def test_an_imported_adapter_is_what_peft_computes(tmp_path: Path, name: str) -> None:
    model = new_family(name)
    cls = type(model)
    model.save_pretrained(tmp_path / "base")
    expected_base = outputs(model, name)
    loaded = cls.from_pretrained(tmp_path / "base").eval()
    tuned = peft.get_peft_model(loaded, peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")).eval()
    shake(tuned, 1, 0.2, "lora_")
    tuned.save_pretrained(tmp_path / "adapter")
    expected = outputs(tuned.base_model.model, name)
    delta = deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "d.deltafmt").path
    deltafmt.unpack(tmp_path / "base", delta, tmp_path / "merged")
    assert same(outputs(cls.from_pretrained(tmp_path / "merged").eval(), name), expected)
    assert not same(expected_base, expected)


@pytest.mark.parametrize("copies", ["base", "both"])
def test_a_tied_head_that_is_stored_as_well(tmp_path: Path, copies: str) -> None:
    """Older checkpoints hold the head beside the embedding that it is tied to."""
    from safetensors.torch import load_file, save_file

    model = new_family("llama-tied")
    tuned = copy.deepcopy(model)
    shake(tuned, 3, 0.05)
    for folder, one in (("base", model), ("tuned", tuned)):
        one.save_pretrained(tmp_path / folder)
        if copies == "both" or folder == "base":
            file = tmp_path / folder / "model.safetensors"
            tensors = load_file(file)
            save_file(
                {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"}
            )
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", delta, method=SVD(4))
    deltafmt.unpack(tmp_path / "base", delta, tmp_path / "merged")
    expected = outputs(type(model).from_pretrained(tmp_path / "merged").eval(), "llama-tied")
    result = deltafmt.export_lora(delta, tmp_path / "adapter", base=tmp_path / "base")
    assert result.tied == "model.embed_tokens"
    base = type(model).from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert same(outputs(loaded.base_model.model, "llama-tied"), expected)
    assert same(outputs(loaded.merge_and_unload().eval(), "llama-tied"), expected)


def test_a_weight_that_is_read_without_a_call(tmp_path: Path) -> None:
    """PEFT computes without Mamba's dt_proj until it merges: import takes the merged model and says so."""
    model = new_family("jamba")
    cls = type(model)
    model.save_pretrained(tmp_path / "base")
    base = cls.from_pretrained(tmp_path / "base").eval()
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["dt_proj", "q_proj"])).eval()
    shake(tuned, 1, 0.3, "lora_")
    tuned.save_pretrained(tmp_path / "adapter")
    result = deltafmt.import_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "d.deltafmt")
    assert "dt_proj" in result.warnings[0]
    deltafmt.unpack(tmp_path / "base", result.path, tmp_path / "merged")
    expected = outputs(tuned.merge_and_unload(), "jamba")
    assert same(outputs(cls.from_pretrained(tmp_path / "merged").eval(), "jamba"), expected)
    exported = deltafmt.export_lora(result.path, tmp_path / "again", base=tmp_path / "base")
    assert [name.rpartition(".")[2] for name in exported.saved] == ["dt_proj"]
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "again").eval()
    assert same(outputs(loaded.base_model.model, "jamba"), expected)


def test_a_model_that_asks_for_its_ties_is_refused(tmp_path: Path) -> None:
    """UMT5 scales its output if its configuration ties the embeddings, which merge_and_unload changes."""
    model = new_family("umt5")
    model.save_pretrained(tmp_path / "base")
    shake(model, 3, 0.05)
    model.save_pretrained(tmp_path / "tuned")
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.deltafmt", method=SVD(4))
    with pytest.raises(UsageError, match=r"PEFT unties it when it merges.*use unpack"):
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out", base=tmp_path / "base")


def test_a_parameter_of_no_module_is_refused(tmp_path: Path) -> None:
    """CLIP has a scale of its own, which no module holds."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 96, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path / "base")
    shake(model, 3, 0.05)
    model.save_pretrained(tmp_path / "tuned")
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.deltafmt", method=SVD(4))
    with pytest.raises(UsageError, match=r'"logit_scale" is replaced and belongs to no module.*use unpack'):
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out", base=tmp_path / "base")


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """PEFT would load an adapter and leave such a tensor out without a word."""
    from safetensors.torch import load_file, save_file

    model = new_family("llama")
    for folder, scale in (("base", 0.0), ("tuned", 0.05)):
        shake(model, 3, scale)
        model.save_pretrained(tmp_path / folder)
        file = tmp_path / folder / "model.safetensors"
        save_file({**load_file(file), "extra.weight": model.lm_head.weight.detach() * 2}, file, {"format": "pt"})
    deltafmt.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.deltafmt", method=SVD(4))
    with pytest.raises(UsageError, match=r'"extra.weight" has no place of its own in the base\'s model'):
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "out", base=tmp_path / "base")
