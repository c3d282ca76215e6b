"""What the plugin puts into a worker of vLLM: its managers of adapters, and the rows of log-probabilities."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from deltafmt.runtime.wrapping import wrap_method
from deltafmt.vllm import seam
from deltafmt.vllm.choice import Choice
from deltafmt.vllm.experts import backend
from deltafmt.vllm.manager import managers
from deltafmt.vllm.options import stamp

_log = logging.getLogger("deltafmt")
# Tokens of the call that finds out which layers compute with the methods that deltas are added in.
_TOKENS = 8


def install_worker() -> None:
    """Replace the class of managers, and announce what rows the head is given for log-probabilities of prompts."""
    mixin = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    mixin.LRUCacheWorkerLoRAManager = managers()  # type: ignore[attr-defined]
    wrap_method(seam.name("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin"), "load_lora_model", _load)
    runner = seam.name("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    wrap_method(runner, "_get_prompt_logprobs_dict", _prompts)
    wrap_method(runner, "reload_weights", _replaced)
    worker = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    if hasattr(worker, "update_weights"):  # trainers send weights so; not every version has it
        wrap_method(worker, "update_weights", _replaced)
    wrapper = seam.name("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU")
    for name in ("add_lora_embedding", "add_lora_linear", "add_lora_logits"):
        wrap_method(wrapper, name, _products)
    for module in ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.punica_wrapper.punica_cpu"):
        for name in ("bgmv_expand", "bgmv_expand_slice"):
            wrap_method(importlib.import_module(module), name, expanded)
    experts = importlib.import_module("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method")
    wrap_method(experts, "select_unquantized_moe_backend", backend)


def expanded(
    own: Any,
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Multiply with the second factors of adapters on the CPU; rows without an adapter, of index -1, add nothing.

    vLLM takes -1 for the last slot, so rows of the base get the adapter that has it once all slots are taken.
    """
    kept = torch.where((indices >= 0)[:, None], inputs, torch.zeros((), dtype=inputs.dtype))
    return own(kept, weights, output, indices, *args, **kwargs)


def _products(own: Any, wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Multiply with factors of adapters on the CPU; nothing is computed in a step without adapters.

    vLLM multiplies there for every row. The rows of the base would pay for that, and for :func:`expanded`, too.
    """
    idle = getattr(wrapper, "deltafmt_idle", False) and not torch.compiler.is_compiling()
    return None if idle else own(wrapper, *args, **kwargs)


def _load(own: Any, runner: Any, model: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    stamp(vllm_config)
    wrapped = own(runner, model, vllm_config, *args, **kwargs)
    if not isinstance(runner, seam.name("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")):
        # Its log-probabilities of prompts go another way, where the head's rows would be taken for other requests'.
        models = runner.lora_manager._adapter_manager  # noqa: SLF001
        models.base, models.refusal = None, "it runs vLLM's model runner V2; set VLLM_USE_V2_MODEL_RUNNER=0"
        return wrapped
    # An engine that compiles runs the model once before it takes requests; the others may not.
    if runner.device.type == "cpu" and not vllm_config.compilation_config.mode:
        runner.model = wrapped
        try:
            with torch.inference_mode():
                hidden = runner._dummy_run(_TOKENS)[1]  # noqa: SLF001
                if vllm_config.model_config.runner_type != "pooling":
                    wrapped.compute_logits(hidden)
        except Exception as error:  # noqa: BLE001 - what has not run is refused when a delta changes it
            _log.warning("the model could not be run at start-up to see what deltas can change: %s", error)
    return wrapped


def _replaced(own: Any, holder: Any, *args: Any, **kwargs: Any) -> Any:
    """Give the engine other weights; deltas are of those that it started with."""
    manager = getattr(getattr(holder, "model_runner", holder), "lora_manager", None)
    if manager is not None and hasattr(manager._adapter_manager, "served"):  # noqa: SLF001
        manager._adapter_manager.served.weights_changed = True  # noqa: SLF001
    return own(holder, *args, **kwargs)


def _prompts(own: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    manager = getattr(runner, "lora_manager", None)
    if manager is None:
        return own(runner, *args, **kwargs)
    models = manager._adapter_manager  # noqa: SLF001
    choice: Choice = models.choice
    with choice.prompts(), _prompt_rows(choice, models.punica_wrapper_mapping.values()):
        return own(runner, *args, **kwargs)


@contextlib.contextmanager
def _prompt_rows(choice: Choice, wrappers: Iterable[Any]) -> Iterator[None]:
    """Tell vLLM's own products with LoRA factors, too, which tokens a head is given.

    On the CPU they would take the rows that are sampled, fail where their number is another, and end the engine.
    """
    if choice.device.type != "cpu":
        yield
        return
    held = [(wrapper, list(wrapper.indices_len), wrapper._sampler_indices) for wrapper in wrappers]  # noqa: SLF001

    def announce(first: int, count: int) -> None:
        for wrapper, lengths, _ in held:
            wrapper._sampler_indices = wrapper._token_lora_indices[first:]  # noqa: SLF001
            wrapper.indices_len[:] = [lengths[0], count, *lengths[2:]]

    choice.announce = announce
    try:
        yield
    finally:
        choice.announce = None
        for wrapper, lengths, indices in held:
            wrapper.indices_len[:] = lengths
            wrapper._sampler_indices = indices  # noqa: SLF001
