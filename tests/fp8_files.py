"""Checkpoints of 8-bit floats with scales, in the forms of their savers, and what their weights mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from conftest import Raw, Tensors, raw

Floats = NDArray[np.float32]
Grid = Callable[[tuple[int, ...]], tuple[int, ...]]


def whole(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the same sizes: those of a matrix that is one block."""
    return shape


def each_row(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a row."""
    return (1, shape[1])


def no_sizes(_: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a number."""
    return ()


@dataclass(frozen=True)
class Form:
    """How a saver keeps 8-bit floats.

    Attributes:
        suffix: what the name of the scales has in the place of ``weight``.
        block: the sizes of the blocks of a matrix of this shape.
        dtype: of the scales.
        settings: the configuration's ``quantization_config``.
        shape: the shape of the scales, from the number of blocks in each dimension.
        extra: suffixes of scales of activations.
    """

    suffix: str
    block: Grid
    dtype: str
    settings: dict[str, Any]
    shape: Grid = whole
    extra: tuple[str, ...] = ()


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
FORMS = {
    "DeepSeek-V3": Form(
        "weight_scale_inv",
        lambda _: (128, 128),
        "F32",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ),
    "small blocks": Form(
        "weight_scale_inv", lambda _: (32, 48), "F32", {"quant_method": "fp8", "weight_block_size": [32, 48]}
    ),
    "transformers": Form(
        "weight_scale_inv", lambda _: (16, 16), "F32", {"quant_method": "fp8", "weight_block_size": [16, 16]}
    ),
    "powers of two": Form(
        "weight_scale_inv",
        lambda _: (1, 32),
        "F8_E8M0",
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    ),
    "MXFP8": Form(
        "weight_scale_inv",
        lambda _: (1, 32),
        "U8",
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    ),
    "llm-compressor": Form("weight_scale", each_row, "BF16", COMPRESSED, extra=("input_scale",)),
    "fbgemm": Form("weight_scale", each_row, "F32", {"quant_method": "fbgemm_fp8"}),
    "ModelOpt": Form("weight_scale", whole, "F32", MODELOPT, no_sizes, extra=("input_scale",)),
    "Mistral": Form("qscale_weight", whole, "BF16", {"quant_method": "fp8"}, no_sizes, ("qscale_act",)),
}


def quantize(values: Floats, form: Form) -> tuple[Raw, Raw, Raw]:
    """Return the codes and the scales of a matrix, and the BF16 values that they mean, computed by torch."""
    shape = values.shape
    block = form.block(shape)
    grid = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    scales = np.zeros(grid, np.float32)
    wide = np.zeros(shape, np.float32)
    for row in range(grid[0]):
        for column in range(grid[1]):
            where = tuple(
                slice(number * step, (number + 1) * step) for number, step in zip((row, column), block, strict=True)
            )
            scale = raw_scale(max(float(np.abs(values[where]).max()) / 448, 1e-9), form.dtype)
            scales[row, column] = wide[where] = scale
    codes = torch.tensor(values / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    meant = (codes.float() * torch.tensor(wide)).to(torch.bfloat16)
    held = raw_scales(scales, form.dtype)
    return (
        Raw("F8_E4M3", shape, codes.view(torch.uint8).numpy().tobytes()),
        Raw(form.dtype, form.shape(grid), held),
        Raw("BF16", shape, meant.view(torch.uint8).numpy().tobytes()),
    )


def raw_scale(value: float, dtype: str) -> float:
    """Round a scale to its dtype, a power of two upward."""
    if dtype in ("F8_E8M0", "U8"):
        return float(2.0 ** np.ceil(np.log2(value)))
    return float(raw(np.full(1, value, np.float32), dtype).floats().reshape(-1)[0])


def raw_scales(scales: Floats, dtype: str) -> bytes:
    """Return the bytes of scales that are rounded already."""
    if dtype in ("F8_E8M0", "U8"):
        return (np.log2(scales) + 127).astype(np.uint8).tobytes()
    return raw(scales, dtype).data


def is_projection(name: str) -> bool:
    """Tell whether savers quantize a tensor of this name."""
    return name.endswith("_proj.weight")


def fp8(tensors: Mapping[str, Raw], form: Form) -> tuple[Tensors, Tensors]:
    """Return a checkpoint's tensors with projections of 8-bit floats, and the same tensors as BF16."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in tensors.items():
        stored[name] = plain[name] = tensor
        if is_projection(name):
            codes, scales, meant = quantize(tensor.floats(), form)
            stem = name.removesuffix("weight")
            stored[name], stored[stem + form.suffix], plain[name] = codes, scales, meant
            stored.update({stem + extra: raw(np.full((), 0.5, np.float32), "F32") for extra in form.extra})
    return stored, plain


def with_settings(config: bytes, form: Form) -> bytes:
    """Return a ``config.json`` that says how weights were quantized."""
    return json.dumps({**json.loads(config), "quantization_config": form.settings}).encode()
