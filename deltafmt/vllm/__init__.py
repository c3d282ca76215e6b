"""Deltas in vLLM: a plugin that serves delta files by name, beside LoRA adapters, in one batch.

vLLM loads it by itself where both are installed: ``pyproject.toml`` registers :func:`register` in the group
``vllm.general_plugins``. A delta is asked for as a LoRA adapter is::

    vllm serve BASE --enable-lora --lora-modules math=math.deltafmt
    LLM(BASE, enable_lora=True).generate(prompts, lora_request=LoRARequest("math", 1, "math.deltafmt"))

A path that ends in ``.deltafmt`` is a delta; every other path stays what it was. ``docs/vllm.md`` is the guide.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Put deltas into vLLM; called by vLLM in each of its processes. Where its version is not supported, only warn."""
    from deltafmt.vllm.install import install

    install()
