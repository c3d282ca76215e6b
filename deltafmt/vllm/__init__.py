"""Deltas in vLLM: a plugin that serves delta files by name, beside LoRA adapters, in one batch.

vLLM loads it by itself where both are installed: ``pyproject.toml`` registers :func:`register` in the group
``vllm.general_plugins``. A delta is asked for as a LoRA adapter is::

    vllm serve BASE --enable-lora --lora-modules math=math.deltafmt
    LLM(BASE, enable_lora=True).generate(prompts, lora_request=LoRARequest("math", 1, "math.deltafmt"))

A path that ends in ``.deltafmt`` is a delta; every other path stays what it was. ``docs/vllm.md`` is the guide.

File by file, from the start of an engine to a step. A delta is an adapter without factors, so vLLM itself decides when
it is loaded and which slot it has:

- ``install.py`` wraps names of vLLM, all listed in ``seam.py``: those of the engine (``engine.py``), of a worker
  (``worker.py``), and of the look-up of names (``resolver.py``, ``names.py``).
- ``manager.py``: the worker's managers of adapters. At the start, ``served.py`` prepares the model:
  ``tensor_places.py`` finds the layer of each tensor of the checkpoint, and each layer gets a class of ``layers.py``,
  ``norms.py`` or ``experts.py``. ``arena.py`` takes memory for each slot.
- A request names a delta. ``engine.py`` has the worker load it before a step has the request, and gives it the key of
  the prefix cache. ``loading.py`` reads the file (``files.py`` keeps it open), checks it against the checkpoint
  (``base.py``), and makes what each layer needs (``parts.py``). Where no kernel runs, ``decoding.py`` makes the weights
  of a delta's rows.
- When vLLM gives the delta a slot, ``manager.py`` puts the parts into the layers' operand tables.
- Before each step, ``manager.py`` tells ``choice.py`` the slot of every token. In the step, a linear layer computes the
  base's output, asks ``choice.py`` for the segments, and adds the products in place:
  :func:`deltafmt.kernels.products.matmul_`.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Put deltas into vLLM; called by vLLM in each of its processes. Where its version is not supported, only warn."""
    from deltafmt.vllm.install import install

    install()
