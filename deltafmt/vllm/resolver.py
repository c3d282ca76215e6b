"""Deltas by name: ``model="math"`` is ``math.deltafmt`` in the folder that vLLM looks for LoRA adapters in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from deltafmt.vllm import seam
from deltafmt.vllm.names import SUFFIX

# The folder is that of vLLM's own resolver, so that deltas and adapters lie side by side.
FOLDER_VARIABLE: Final = "VLLM_LORA_RESOLVER_CACHE_DIR"
_NAME: Final = "deltafmt"


def find(folder: str, name: str) -> str | None:
    """Return the path of the delta of a name, or None.

    It is ``NAME.deltafmt``, or the only delta in the folder ``NAME``. A name never leads out of the folder.

    Args:
        folder: the folder.
        name: what a request asks for, such as ``math`` or ``team/math``.
    """
    if "\0" in name:
        return None
    root = Path(folder).resolve()
    wanted = root / name
    if not wanted.resolve().is_relative_to(root) or wanted.resolve() == root:
        return None
    file = wanted.with_name(wanted.name + SUFFIX)
    if file.is_file():
        return str(file) if file.resolve().is_relative_to(root) else None
    inside = sorted(wanted.glob(f"*{SUFFIX}")) if wanted.is_dir() else []
    return str(inside[0]) if len(inside) == 1 else None


def install_resolver() -> None:
    """Register the resolver, if a folder is named."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    registry = seam.name("vllm.lora.resolver", "LoRAResolverRegistry")
    base = seam.name("vllm.lora.resolver", "LoRAResolver")
    request = seam.name("vllm.lora.request", "LoRARequest")

    async def resolve_lora(_self: Any, base_model_name: str, lora_name: str) -> Any:  # noqa: ARG001 - vLLM's interface
        path = find(folder, lora_name)
        return None if path is None else request(lora_name=lora_name, lora_int_id=1, lora_path=path)

    registry.register_resolver(_NAME, type("DeltaResolver", (base,), {"resolve_lora": resolve_lora})())
