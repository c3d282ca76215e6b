"""Architectures in vLLM on the CPU: every layer of a small random model takes deltas, beside the base in one batch.

``make vllm`` runs these in an environment that has vLLM. An engine for each; log-probabilities of prompts and of
generated tokens are compared with those of transformers and the unpacked checkpoint.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make vllm runs these tests", allow_module_level=True)

import torch
import transformers

import deltafmt
from deltafmt.methods import DeltaDQ

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS: dict[str, Any] = {**SIZES, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA: dict[str, Any] = {**HEADS, "query_pre_attn_scalar": 32, "sliding_window": 64}
MOE: dict[str, Any] = {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}
OPT: dict[str, Any] = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**HEADS, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**HEADS, tie_word_embeddings=False),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "opt": lambda: transformers.OPTConfig(**OPT, vocab_size=200, max_position_embeddings=128, word_embed_proj_dim=64),
    "mixtral": lambda: transformers.MixtralConfig(**MOE),
}
# The first prompt has as many log-probabilities as the step has rows that are sampled, two for each prompt.
LENGTHS = (11, 7, 12, 20, 3)
TOKENS = 6


def make(family: str, folder: Path) -> None:
    """Write a base and a delta of all of its tensors, and unpack it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).float()
    for name in ("base", "tuned"):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / name)
    deltafmt.pack(folder / "base", folder / "tuned", folder / "x.deltafmt", method=DeltaDQ(2, 2, 8))
    deltafmt.unpack(folder / "base", folder / "x.deltafmt", folder / "restored")


def engine(model: Path, **more: Any) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 8,
        "max_model_len": 96,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 26,
    }
    return LLM(str(model), **settings | more)


def manager_of(llm: Any) -> Any:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.lora_manager._adapter_manager


def scores(llm: Any, path: Path, prompts: list[list[int]]) -> dict[str, list[tuple[list[int], torch.Tensor]]]:
    """Return each row's tokens and their log-probabilities, of the base and of the delta, in one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=1, prompt_logprobs=0
    )
    delta = LoRARequest("x", 1, str(path))
    given = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(2)]
    outputs = llm.generate(given, params, lora_request=[None, delta] * len(prompts), use_tqdm=False)
    rows = []
    for output in outputs:
        text = output.outputs[0]
        tokens = [*output.prompt_token_ids, *text.token_ids]
        found = [*output.prompt_logprobs[1:], *text.logprobs]
        rows.append((tokens, torch.tensor([one[token].logprob for one, token in zip(found, tokens[1:], strict=True)])))
    return {"base": rows[0::2], "restored": rows[1::2]}


def right(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities of tokens by a checkpoint, computed by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture
def forgotten() -> Any:
    """Forget the engine behind a test."""
    yield
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_family_takes_deltas(family: str, tmp_path: Path, forgotten: Any) -> None:
    make(family, tmp_path)
    # Without Triton, adapters of experts cannot be served, and vLLM need not prepare for them.
    more = {"lora_target_modules": ["o_proj"]} if family == "mixtral" else {}
    llm = engine(tmp_path / "base", **more)
    assert manager_of(llm).served.unused() == []
    assert not manager_of(llm).served.places.reasons
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 199, (length,), generator=generator).tolist() for length in LENGTHS]
    found = scores(llm, tmp_path / "x.deltafmt", prompts)
    for name, rows in found.items():
        for tokens, logprobs in rows:
            torch.testing.assert_close(logprobs, right(tmp_path / name, tokens), rtol=2e-4, atol=2e-4)
    tokens, logprobs = found["restored"][3]
    assert (logprobs - right(tmp_path / "base", tokens)).abs().max() > 0.1
