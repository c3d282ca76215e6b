"""Whether a checkpoint is quantized, and by what: a delta of codes is no delta of weights."""

from __future__ import annotations

import re
from typing import Final

from deltafmt.checkpoint.folder import Checkpoint

_SMALL_FLOATS: Final = {"F8": "FP8", "F4": "FP4", "F6": "FP6"}
_CODES: Final = re.compile(
    r"\.(qweight|qzeros|weight_packed|absmax|quant_map|quant_state\.[\w.]+|weight_scale_inv|g_idx|SCB)$|_(blocks|scales)$"
)


# What quantizers store beside the codes of a weight; no model without quantization has a tensor of these names.
SCALES: Final = re.compile(
    r"[._](weight_scale(_inv|_2)?|scale_inv|input_scale|output_scale|activation_scale|k_scale|v_scale|weight_shape|qzeros"
    r"|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format|zero_point|weight_zero_point)$"
    r"|\.quant_state\."
)


def quantization(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint is quantized with, such as ``fp8``, or an empty string if it is not quantized."""
    settings = checkpoint.config().get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    small = next((tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype[:2] in _SMALL_FLOATS), "")
    dtype = _SMALL_FLOATS.get(small[:2], "")
    if isinstance(method, str):
        return method if not dtype or dtype.lower() in method.lower() else f"{method}, {dtype}"
    if dtype:
        return dtype
    found = next((name for name in checkpoint.tensors if _CODES.search(name)), None)
    return f'it has codes such as "{found}"' if found is not None else ""
