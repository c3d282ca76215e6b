"""Tiny random models of many architectures, for adapters: configurations, inputs and outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
_TIED = {**_DECODER, "tie_word_embeddings": True}
_EIGHT = {**_DECODER, "head_dim": 8}
_EXPERTS = {
    **_EIGHT,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
_DEEPSEEK = {
    **_DECODER,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
_GPT = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEO = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
_T5 |= {"decoder_start_token_id": 1, "eos_token_id": 2}
_BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_TEXT_BART = {**_BART, "max_position_embeddings": 64, "forced_eos_token_id": None}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
_WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 16, "patch_size": 8}
_MAMBA = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_JAMBA = {
    **_DECODER,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
_GEMMA3N = {
    **_EIGHT,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
_SWIN |= {"num_labels": 3}
_LLAVA = {
    "vision_config": {**_VISION, "projection_dim": 32, "model_type": "clip_vision_model"},
    "text_config": {**_EIGHT, "model_type": "llama"},
    "image_token_index": 95,
    "vision_feature_layer": -1,
}


class Family(NamedTuple):
    """An architecture.

    Attributes:
        cls: the class in transformers.
        options: the configuration.
        inputs: what it reads: text, images or sounds.
    """

    cls: str
    options: dict[str, Any]
    inputs: str = "text"


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": False}),
    "llama-tied": Family("LlamaForCausalLM", _TIED),
    "qwen2": Family("Qwen2ForCausalLM", _TIED),
    "qwen3": Family("Qwen3ForCausalLM", _EIGHT),
    "gemma": Family("GemmaForCausalLM", _EIGHT),
    "gemma2": Family("Gemma2ForCausalLM", _EIGHT),
    "gemma3": Family("Gemma3ForCausalLM", {**_EIGHT, "sliding_window": 16}),
    "mistral": Family("MistralForCausalLM", _DECODER),
    "phi": Family("PhiForCausalLM", _DECODER),
    "phi3": Family("Phi3ForCausalLM", _DECODER),
    "falcon": Family("FalconForCausalLM", _HEADS),
    "bloom": Family("BloomForCausalLM", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2": Family("GPT2LMHeadModel", _GPT),
    "opt": Family("OPTForCausalLM", {**_DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": Family("GPTNeoXForCausalLM", _HEADS),
    "gptj": Family("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": Family(
        "GPTNeoForCausalLM", {**_NEO, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    ),
    "codegen": Family("CodeGenForCausalLM", {**_GPT, "rotary_dim": 4}),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", _GPT),
    "mpt": Family("MptForCausalLM", {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "stablelm": Family("StableLmForCausalLM", _DECODER),
    "starcoder2": Family("Starcoder2ForCausalLM", _DECODER),
    "cohere": Family("CohereForCausalLM", _DECODER),
    "olmo": Family("OlmoForCausalLM", _DECODER),
    "olmo2": Family("Olmo2ForCausalLM", _DECODER),
    "granite": Family("GraniteForCausalLM", _DECODER),
    "nemotron": Family("NemotronForCausalLM", _DECODER),
    "glm": Family("GlmForCausalLM", _EIGHT),
    "mixtral": Family("MixtralForCausalLM", _EXPERTS),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _EXPERTS),
    "olmoe": Family("OlmoeForCausalLM", _EXPERTS),
    "gpt_oss": Family("GptOssForCausalLM", _EXPERTS),
    "granitemoe": Family("GraniteMoeForCausalLM", _EXPERTS),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _DEEPSEEK),
    "llama4": Family(
        "Llama4ForCausalLM",
        {**_EIGHT, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "mamba2": Family("Mamba2ForCausalLM", {**_MAMBA, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}),
    "bert": Family("BertForSequenceClassification", {**_HEADS, "num_labels": 3}),
    "bert-mlm": Family("BertForMaskedLM", _HEADS),
    "roberta": Family("RobertaForSequenceClassification", {**_HEADS, "num_labels": 3, "pad_token_id": 1}),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "deberta": Family(
        "DebertaV2ForSequenceClassification",
        {
            **_HEADS,
            "type_vocab_size": 0,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
        },
    ),
    "electra": Family("ElectraForTokenClassification", {**_HEADS, "embedding_size": 32}),
    "albert": Family("AlbertForMaskedLM", {**_HEADS, "embedding_size": 16}),
    "modernbert": Family("ModernBertForMaskedLM", {**_HEADS, "cls_token_id": 1, "sep_token_id": 2}),
    "t5": Family("T5ForConditionalGeneration", _T5),
    "mt5": Family("MT5ForConditionalGeneration", _T5),
    "umt5": Family("UMT5ForConditionalGeneration", _T5),
    "ctrl": Family(
        "CTRLLMHeadModel", {"vocab_size": 96, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ),
    "phimoe": Family("PhimoeForCausalLM", _EXPERTS),
    "jamba": Family("JambaForCausalLM", _JAMBA),
    "gemma3n": Family("Gemma3nForCausalLM", _GEMMA3N),
    "swin": Family("SwinForImageClassification", _SWIN, "images"),
    "bart": Family("BartForConditionalGeneration", _TEXT_BART),
    "pegasus": Family("PegasusForConditionalGeneration", _TEXT_BART),
    "marian": Family("MarianMTModel", _TEXT_BART),
    "m2m_100": Family("M2M100ForConditionalGeneration", _TEXT_BART),
    "whisper": Family("WhisperForConditionalGeneration", _WHISPER, "sounds"),
    "vit": Family("ViTForImageClassification", {**_VISION, "num_labels": 3}, "images"),
    "siglip": Family("SiglipVisionModel", _VISION, "images"),
    "dinov2": Family("Dinov2ForImageClassification", {**_VISION, "num_labels": 3}, "images"),
    "llava": Family("LlavaForConditionalGeneration", _LLAVA),
    "convnext": Family(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 3},
        "images",
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 3},
        "images",
    ),
}


def new_family(name: str) -> Any:
    """Return a random model whose every parameter differs from zero and one."""
    family = FAMILIES[name]
    cls = getattr(transformers, family.cls)
    torch.manual_seed(0)
    model = cls(cls.config_class(**family.options)).eval()
    shake(model, 0, 0.1)
    return model


def shake(model: torch.nn.Module, seed: int, scale: float, part: str = "") -> None:
    """Change every parameter whose name has ``part`` in it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = scale * torch.randn(parameter.shape, generator=generator)
            if part in name:
                parameter.add_(change)


def outputs(model: Any, name: str) -> torch.Tensor:
    """Return a model's logits, or its last hidden states, for inputs that are always the same."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    kind = FAMILIES[name].inputs
    if kind == "images":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        if name in ("convnext", "resnet"):
            inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    elif kind == "sounds":
        inputs = {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids}
    else:
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if getattr(found, "logits", None) is not None else found.last_hidden_state


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether outputs differ by no more than other orders of summation do."""
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())
