"""What the plugin puts into a worker of vLLM: its managers of adapters, and the rows of log-probabilities."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from deltafmt.vllm import seam
from deltafmt.vllm.install import wrap
from deltafmt.vllm.manager import managers
from deltafmt.vllm.options import stamp

_log = logging.getLogger("deltafmt")
# Tokens of the call that finds out which layers compute with the methods that deltas are added in.
_TOKENS = 8


def install_worker() -> None:
    """Replace the class of managers, and announce what rows the head is given for log-probabilities of prompts."""
    mixin = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    mixin.LRUCacheWorkerLoRAManager = managers()  # type: ignore[attr-defined]
    wrap(seam.name("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin"), "load_lora_model", _load)
    runner = seam.name("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    wrap(runner, "_get_prompt_logprobs_dict", _prompts)


def _load(own: Any, runner: Any, model: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    stamp(vllm_config)
    wrapped = own(runner, model, vllm_config, *args, **kwargs)
    # An engine that compiles runs the model once before it takes requests; the others may not.
    if runner.device.type == "cpu" and not vllm_config.compilation_config.mode:
        runner.model = wrapped
        with torch.inference_mode():
            hidden = runner._dummy_run(_TOKENS)[1]  # noqa: SLF001
            wrapped.compute_logits(hidden)
    return wrapped


def _prompts(own: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    manager = getattr(runner, "lora_manager", None)
    if manager is None:
        return own(runner, *args, **kwargs)
    with manager._adapter_manager.choice.prompts():  # noqa: SLF001
        return own(runner, *args, **kwargs)
