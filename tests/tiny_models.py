"""Tiny random models of several architectures, their fine-tunes, and deltas between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deltafmt
from deltafmt.methods import RTN, BitDelta, DeltaDQ

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

Sequences = list[NDArray[np.int64]]

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ENCODER = {**DECODER, "num_labels": 3}
OPT = {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": True}
GEMMA = {**DECODER, "head_dim": 8, "sliding_window": 16}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}

T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
T5 |= {"decoder_start_token_id": 1, "eos_token_id": None}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8, "tie_word_embeddings": False}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "pad_token_id": 0, "eos_token_id": None}),
    "opt": ("OPTForCausalLM", OPT),
    "t5": ("T5ForConditionalGeneration", T5),
    "bert": ("BertForSequenceClassification", ENCODER),
    "bert-mlm": ("BertForMaskedLM", ENCODER),
}
CAUSAL = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "opt")
ARCHITECTURES = (*CAUSAL, "bert", "bert-mlm")


@dataclass(frozen=True)
class Tiny:
    """A base folder, two fine-tunes of it as deltas, and their unpacked folders."""

    kind: str
    base: Path
    deltas: dict[str, Path]
    unpacked: dict[str, Path]

    def load(self, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """Load a folder, the base's if none is given."""
        cls = getattr(transformers, KINDS[self.kind][0])
        return cls.from_pretrained(folder or self.base, dtype=dtype).eval()


def new_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random model whose every parameter differs from zero and one."""
    cls_name, options = KINDS[kind]
    cls = getattr(transformers, cls_name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**{**options, **changes})).eval()
    shake(model, seed, 0.1)
    return model


def shake(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Change every parameter a little, as a full fine-tune does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


METHODS = {"one": DeltaDQ(4, 16, 4), "two": DeltaDQ(3, 8, 3, index="fixed", share=1, scale_group=4)}
# The second has terms of another kind in its blocks, so that a batch mixes kinds in one module.
RULES = {"two": [("*.0.*", RTN(4, scale_group=8)), ("*.1.*", BitDelta("column"))]}


def make_tiny(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Tiny:
    """Write a base, two fine-tunes, their deltas and what these unpack to."""
    model = new_model(kind).to(dtype)
    model.save_pretrained(folder / "base")
    deltas, unpacked = {}, {}
    for number, (name, method) in enumerate(METHODS.items()):
        tuned = new_model(kind)
        shake(tuned, 10 + number, 0.05)
        tuned.to(dtype).save_pretrained(folder / name)
        deltas[name] = folder / f"{name}.deltafmt"
        unpacked[name] = folder / f"{name}-unpacked"
        rules = RULES.get(name, ())
        deltafmt.pack(folder / "base", folder / name, deltas[name], method=method, rules=rules, seed=number)
        deltafmt.unpack(folder / "base", deltas[name], unpacked[name])
    return Tiny(kind, folder / "base", deltas, unpacked)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random token numbers."""
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


_MADE: dict[str, Tiny] = {}


def made_once(request: pytest.FixtureRequest, folders: pytest.TempPathFactory) -> Tiny:
    """Return the models of the architecture that a test asks for by :func:`every`, Llama's if it asks for none."""
    kind = getattr(request, "param", "llama")
    if kind not in _MADE:
        _MADE[kind] = make_tiny(kind, folders.mktemp(kind))
    return _MADE[kind]


def every(kinds: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test for several architectures."""
    return pytest.mark.parametrize("tiny", list(kinds), indirect=True)


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return a model's logits."""
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether outputs differ by no more than another order of summation does."""
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


def generate(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Continue rows of equal length by eight tokens."""
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


def plainly(model: Any, texts: Sequences) -> dict[str, NDArray[np.float64]]:
    """Return the moments of a plain forward pass with hooks, a sequence at a time, in float64."""
    found: dict[str, NDArray[np.float64]] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double().numpy()
            found[name] = found.get(name, 0.0) + x.T @ x

        return hook

    kinds: tuple[Any, ...] = (torch.nn.Linear,)
    if hasattr(model, "transformer"):
        kinds += (type(model.transformer.h[0].mlp.c_fc),)
    handles = [m.register_forward_pre_hook(hook_for(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    with torch.no_grad():
        for tokens in texts:
            ids = torch.from_numpy(tokens)[None]
            extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            model(input_ids=ids, **extra)
    for handle in handles:
        handle.remove()
    return found
