"""Pipelines and models of diffusers itself: saved, packed, verified, unpacked and loaded again, with equal outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import deltafmt
from deltafmt.methods import RTN
from lora_models import shake


def unet() -> Any:
    """Return a UNet with convolutions, cross attention and group norms."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def vae() -> Any:
    """Return the autoencoder of a pipeline."""
    return diffusers.AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
    )


def flux() -> Any:
    """Return a transformer of the Flux family."""
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def sd3() -> Any:
    """Return a transformer of the Stable Diffusion 3 family."""
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )


def text_encoder() -> Any:
    """Return the text encoder of a pipeline."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 8,
    }
    return CLIPTextModel(CLIPTextConfig(**sizes, eos_token_id=1))


def pipeline(folder: Path) -> Any:
    """Return a Stable Diffusion pipeline with random weights; its tokenizer is written into the folder."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16),
        unet=unet(),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def files_of(folder: Path) -> set[str]:
    """Return the names of all files of a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("build", [unet, vae, flux, sd3])
def test_a_model_of_diffusers_survives(tmp_path: Path, build: Any) -> None:
    model = build()
    model.save_pretrained(tmp_path / "base")
    shake(model, 1, 0.01)
    model.save_pretrained(tmp_path / "ft")
    for method, rules in ((None, [("*", None)]), (RTN(8), [])):
        out = tmp_path / "delta.deltafmt"
        deltafmt.pack(tmp_path / "base", tmp_path / "ft", out, method=method, rules=rules, force=True)
        deltafmt.verify(out, tmp_path / "base")
        deltafmt.unpack(tmp_path / "base", out, tmp_path / "out", force=True)
        found = type(model).from_pretrained(tmp_path / "out").state_dict()
        wanted = model.state_dict()
        assert found.keys() == wanted.keys()
        assert files_of(tmp_path / "out") == files_of(tmp_path / "ft")
        for name, value in wanted.items():
            if method is None:
                assert torch.equal(found[name], value), name
            else:
                # An 8-bit grid over a row of the delta has steps of a hundredth of its spread.
                assert torch.allclose(found[name], value, atol=0.001), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in a scheduler of diffusers
def test_a_pipeline_survives_with_every_file(tmp_path: Path) -> None:
    whole = pipeline(tmp_path / "tokens")
    whole.save_pretrained(tmp_path / "base")
    for number, part in enumerate((whole.unet, whole.vae, whole.text_encoder)):
        shake(part, number, 0.01)
    whole.save_pretrained(tmp_path / "ft")
    delta = tmp_path / "delta.deltafmt"
    deltafmt.pack(tmp_path / "base", tmp_path / "ft", delta, method=None, rules=[("*", None)])
    deltafmt.verify(delta, tmp_path / "base")
    deltafmt.unpack(tmp_path / "base", delta, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "ft")
    images = []
    for folder in ("ft", "out"):
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / folder, safety_checker=None)
        loaded.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        image = loaded("a b", num_inference_steps=2, generator=noise, output_type="pt", height=16, width=16)
        images.append(image.images)
    assert torch.equal(images[0], images[1])
