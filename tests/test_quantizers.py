"""Quantizers are told by a configuration or by the names of tensors, and refused by name with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Cli, Raw, Tensors, normal, refused, write_folder
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.quantizers import quantizer_of
from deltafmt.errors import UnsupportedError
from situations import config, llama, situation, tuned

CODES = Raw("I32", (8, 64), bytes(2048))
BYTES = Raw("U8", (64, 32), bytes(2048))
INTEGERS = Raw("I8", (64, 32), bytes(2048))
SCALES = normal(1, (8, 64), "F16")

# What modules hold in the place of ``weight``, and what the quantizer is called.
BY_NAMES: list[tuple[dict[str, Raw], str]] = [
    ({"qweight": CODES, "qzeros": CODES, "scales": SCALES, "g_idx": Raw("I32", (64,), bytes(256))}, "GPTQ"),
    ({"qweight": CODES, "qzeros": CODES, "scales": SCALES}, "AWQ"),
    (
        {"weight": BYTES, "weight.absmax": normal(1, (32,), "F32"), "weight.quant_map": normal(2, (16,), "F32")},
        "4 bits",
    ),
    ({"weight": BYTES, "weight.quant_state.bitsandbytes__nf4": Raw("U8", (90,), bytes(90))}, "bitsandbytes (4 bits)"),
    ({"weight": INTEGERS, "SCB": normal(1, (64,), "F32")}, "bitsandbytes (8 bits)"),
    ({"W_q": BYTES, "scale": SCALES, "zero": SCALES}, "HQQ"),
    ({"codes": INTEGERS, "codebooks": SCALES, "scales": SCALES}, "AQLM"),
    ({"qweight": INTEGERS, "weight_scales": SCALES}, "EETQ"),
    ({"weight._data": INTEGERS, "weight._scale": SCALES}, "quanto"),
    ({"weight_qdata": INTEGERS, "weight_scale": SCALES}, "torchao"),
    ({"weight_packed": CODES, "weight_scale": SCALES, "weight_shape": Raw("I64", (2,), bytes(16))}, "packed integers"),
    ({"weight": INTEGERS, "weight_scale": SCALES}, "8-bit integers with scales"),
    ({"gate_up_proj_blocks": BYTES, "gate_up_proj_scales": BYTES}, "MXFP4"),
    ({"weight": BYTES, "weight_scale": Raw("F8_E4M3", (64, 2), bytes(128)), "weight_scale_2": SCALES}, "NVFP4"),
    ({"weight_packed": BYTES, "weight_global_scale": SCALES}, "NVFP4"),
    ({"indices": CODES, "centroids.weight": SCALES}, "VPTQ"),
    ({"dense_weights": CODES, "row_offsets": Raw("I32", (9,), bytes(36))}, "SpQR"),
    ({"weight": BYTES, "weight_scale": normal(1, (1,))}, "BitNet"),
    (
        {"weight": Raw("F8_E4M3FNUZ", (64, 32), bytes(2048)), "weight_scale": SCALES},
        "8-bit floats of dtype F8_E4M3FNUZ",
    ),
    ({"weight": Raw("F4", (64, 32), bytes(1024))}, "4-bit or 6-bit floats"),
]
BY_CONFIG: list[tuple[dict[str, Any], dict[str, Raw], str]] = [
    ({"quant_method": "gptq", "bits": 4}, {"qweight": CODES, "qzeros": CODES}, "GPTQ"),
    ({"quant_method": "awq"}, {"qweight": CODES, "qzeros": CODES}, "AWQ"),
    ({"quant_method": "auto-round"}, {"qweight": CODES, "qzeros": CODES}, "AutoRound"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"weight": BYTES}, "bitsandbytes (4 bits)"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weight": INTEGERS}, "bitsandbytes (8 bits)"),
    ({"quant_method": "hqq"}, {"W_q": BYTES}, "HQQ"),
    ({"quant_method": "aqlm"}, {"codes": INTEGERS}, "AQLM"),
    ({"quant_method": "eetq"}, {"weight": INTEGERS, "weight_scales": SCALES}, "EETQ"),
    ({"quant_method": "quanto"}, {"weight._data": INTEGERS}, "quanto"),
    ({"quant_method": "torchao"}, {"weight": INTEGERS}, "torchao"),
    ({"quant_method": "mxfp4"}, {"weight_blocks": BYTES}, "MXFP4"),
    ({"quant_method": "vptq"}, {"indices": CODES}, "VPTQ"),
    ({"quant_method": "spqr"}, {"dense_weights": CODES}, "SpQR"),
    ({"quant_method": "bitnet"}, {"weight": BYTES}, "BitNet"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"weight": BYTES, "weight_scale_2": SCALES}, "NVFP4"),
    (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"weight_packed": CODES, "weight_scale": SCALES},
        "compressed-tensors (pack-quantized)",
    ),
    (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"weight": INTEGERS, "weight_scale": SCALES},
        "compressed-tensors (int-quantized)",
    ),
    ({"quant_method": "of next year"}, {"weight": INTEGERS}, "of next year"),
]


def coded(parts: dict[str, Raw]) -> Tensors:
    """Return a model whose projections a quantizer holds as some tensors."""
    found: Tensors = {}
    for name, tensor in llama().items():
        if name.endswith("_proj.weight"):
            found.update({name.removesuffix("weight") + suffix: part for suffix, part in parts.items()})
        else:
            found[name] = tensor
    return found


def title(folder: Path, tensors: Tensors, **changes: Any) -> str:
    with Checkpoint(write_folder(folder, tensors, files={"config.json": config(**changes)})) as checkpoint:
        found = quantizer_of(checkpoint)
        return "" if found is None else found.title


@pytest.mark.parametrize(("parts", "name"), BY_NAMES, ids=[name for _, name in BY_NAMES])
def test_a_quantizer_is_told_by_its_tensors(tmp_path: Path, parts: dict[str, Raw], name: str) -> None:
    assert name in title(tmp_path / "base", coded(parts))


@pytest.mark.parametrize(("settings", "parts", "name"), BY_CONFIG, ids=[name for *_, name in BY_CONFIG])
def test_a_quantizer_is_told_by_its_configuration(
    tmp_path: Path, settings: dict[str, Any], parts: dict[str, Raw], name: str
) -> None:
    assert title(tmp_path / "base", coded(parts), quantization_config=settings) == name


@situation("a configuration that names a quantizer beside weights that are not quantized")
def test_a_configuration_alone_is_no_quantizer(tmp_path: Path) -> None:
    for method in ("bitsandbytes", "fp8", "gptq"):
        assert not title(tmp_path / method, llama(), quantization_config={"quant_method": method})
    tensors = {**llama(), "model.mask": Raw("U8", (4, 4), bytes(16)), "model.ids": Raw("I64", (1, 9), bytes(72))}
    assert not title(tmp_path / "buffers", tensors, quantization_config={"quant_method": "gptq"})
    settings = config(quantization_config={"quant_method": "bitsandbytes"})
    base = write_folder(tmp_path / "base", llama(), files={"config.json": settings})
    finetuned = write_folder(tmp_path / "ft", tuned(llama()), files={"config.json": settings})
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt")
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == settings


@situation("`--quantized exact`: codes of another quantizer")
def test_codes_come_back_bit_for_bit(tmp_path: Path, cli: Cli) -> None:
    """The scales of codes look like matrices of weights, and must not be compressed."""
    parts = BY_NAMES[0][0]
    a = coded(parts)
    b = {name: tensor if tensor.dtype == "I32" else tuned({name: tensor})[name] for name, tensor in a.items()}
    changed = next(name for name in b if name.endswith("qweight"))
    b[changed] = Raw("I32", (8, 64), bytes(range(256)) * 8)
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", b)
    found = cli("pack", base, finetuned, "-o", tmp_path / "d.deltafmt")
    line = refused(found, 3, "its weights are codes of GPTQ", "--quantized exact takes the stored bytes as they are")
    assert "give the checkpoint that was quantized" in line
    deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", quantized="exact")
    deltafmt.verify(tmp_path / "d.deltafmt", base)
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    with Checkpoint(tmp_path / "out") as out, Checkpoint(finetuned) as wanted:
        for name, tensor in wanted.tensors.items():
            assert out.tensors[name].equals(tensor) == (not name.endswith(("embed_tokens.weight", "lm_head.weight")))


@pytest.mark.parametrize("command", ["diff", "analyze"])
def test_other_commands_refuse_codes_too(tmp_path: Path, command: str) -> None:
    base = write_folder(tmp_path / "base", coded(BY_NAMES[0][0]))
    with pytest.raises(UnsupportedError, match="codes of GPTQ"):
        getattr(deltafmt, command)(base, base)
    if command == "diff":
        assert deltafmt.diff(base, base, quantized="exact").changes == []
