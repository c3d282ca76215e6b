"""Deltas served in a model of transformers, in whatever form the fine-tune was saved: a file, as in memory, wrapped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from tiny_checkpoints import FINE

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
if not transformers.__version__.startswith("5."):
    pytest.skip("transformers 4 saves what it holds", allow_module_level=True)

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160}


def model(kind: str) -> Any:
    """Return a tiny model with random weights that BF16 holds."""
    torch.manual_seed(0)
    if kind == "BERT":
        made = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))
    else:
        rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
        vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "num_key_value_heads": 2, "rope_scaling": rope}, vision_config=vision
        )
        made = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.05).bfloat16().float())
    return made.eval()


def saved(made: Any, folder: Path, form: str) -> Path:
    from safetensors.torch import load_file, save_file

    made.save_pretrained(folder)
    file = folder / "model.safetensors"
    if form == "in memory":
        state = {name: tensor.clone().contiguous() for name, tensor in made.state_dict().items()}
        save_file(state, file, metadata={"format": "pt"})
    elif form == "wrapped":
        state = {f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore:the model has not called")  # no images are given
@pytest.mark.parametrize("form", ["a file", "in memory", "wrapped"])
@pytest.mark.parametrize("kind", ["BERT", "Qwen2.5-VL"])
def test_every_form_is_served_and_merged(tmp_path: Path, kind: str, form: str) -> None:
    base = model(kind)
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    deltafmt.pack(tmp_path / "base", saved(tuned, tmp_path / "ft", form), tmp_path / "d.deltafmt", method=FINE)
    tokens = torch.arange(12).reshape(2, 6) + 5
    with torch.no_grad():
        wanted, before = tuned(input_ids=tokens).logits, base(input_ids=tokens).logits
    served = deltafmt.transformers.attach(base, {"d": tmp_path / "d.deltafmt"})
    assert served.deltas.unchecked == {"d": []}
    far = float((before - wanted).abs().max())
    with torch.no_grad(), served.delta("d"):
        assert float((served(input_ids=tokens).logits - wanted).abs().max()) < far / 20
    served.deltas.merge("d")
    with torch.no_grad():
        assert float((served(input_ids=tokens).logits - wanted).abs().max()) < far / 20
    served.deltas.unmerge()
    with torch.no_grad():
        assert torch.equal(served(input_ids=tokens).logits, before)
