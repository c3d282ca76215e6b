"""A model that reads images in vLLM on the CPU: its text takes deltas, its eyes refuse them.

``make vllm`` leaves torchvision out, without which vLLM reads no images; install one that fits torch to run this.
"""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("torchvision") is None:
    pytest.skip("vLLM and torchvision are not both installed", allow_module_level=True)

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

import deltafmt
from deltafmt.methods import DeltaDQ
from test_vllm_families import HEADS, LENGTHS, TOKENS, engine, forgotten, manager_of

__all__ = ["forgotten"]
pytestmark = pytest.mark.filterwarnings("ignore")
IMAGE = 199


def make(folder: Path) -> None:
    """Write a small LLaVA, a delta of its text, another one of its eyes, and unpack the first."""
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<image>": IMAGE} | {f"w{n}": n for n in range(IMAGE)}, "w3")),
        bos_token="w0",
        eos_token="w1",
        pad_token="w2",
    )
    size = {"height": 28, "width": 28}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    eyes = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(**HEADS)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=eyes,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )
    for name in ("base", "text", "eyes"):
        for key, parameter in model.float().named_parameters():
            if name == "base" or (name == "text") == ("language" in key or "lm_head" in key):
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        # The names of the public checkpoints, which vLLM reads.
        file = folder / name / "model.safetensors"
        tensors = {
            key.replace("vision_tower.", "vision_tower.vision_model."): one for key, one in load_file(file).items()
        }
        save_file({key.replace("vision_model.vision_model", "vision_model"): one for key, one in tensors.items()}, file)
        if name != "base":
            deltafmt.pack(folder / "base", folder / name, folder / f"{name}.deltafmt", method=DeltaDQ(2, 2, 8))
    deltafmt.unpack(folder / "base", folder / "text.deltafmt", folder / "restored")


def generate(llm: Any, requests: list[Any]) -> list[list[int]]:
    """Return the tokens of prompts, every other one with an image; each prompt is given with every request."""
    from PIL import Image
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(1)
    prompts: list[Any] = []
    for number, length in enumerate(LENGTHS):
        prompt: dict[str, Any] = {"prompt_token_ids": torch.randint(3, 199, (length,), generator=generator).tolist()}
        if number % 2 == 0:
            pixels = np.random.default_rng(number).integers(0, 255, (28, 28, 3), dtype=np.uint8)
            prompt = {"prompt_token_ids": [IMAGE, *prompt["prompt_token_ids"]]}
            prompt["multi_modal_data"] = {"image": Image.fromarray(pixels)}
        prompts.extend(prompt for _ in requests)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, lora_request=requests * len(LENGTHS), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_text_beside_images_takes_deltas_and_eyes_refuse_them(tmp_path: Path, forgotten: Any) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    make(tmp_path)
    options: dict[str, Any] = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}
    llm = engine(tmp_path / "base", **options)
    assert all(line.startswith(("vision_tower.", "multi_modal_projector.")) for line in manager_of(llm).served.unused())
    found = generate(llm, [None, LoRARequest("text", 1, str(tmp_path / "text.deltafmt"))])
    with pytest.raises(Exception, match="it is a part of the model that reads images or sound"):
        generate(llm, [LoRARequest("eyes", 2, str(tmp_path / "eyes.deltafmt"))])
    for place, name in enumerate(("base", "restored")):
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        llm = engine(tmp_path / name, **options)
        assert found[place::2] == generate(llm, [None]), name
    assert found[0::2] != found[1::2]
