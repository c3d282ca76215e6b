"""Which quantizer has made a checkpoint's weights: told by its configuration and by the names of its tensors.

A delta of codes is no delta of weights. 8-bit floats with scales are read as the weights that they mean
(:mod:`deltafmt.checkpoint.fp8`); the codes of other quantizers are not, and their checkpoints are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.weight_choice import read_json
from deltafmt.format import constants as c

_FLOATS: Final = ("BF16", "F16", "F32", "F64", "C64", "BOOL")
_INTEGERS: Final = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")

# Ways to weights that are not quantized, beside giving the checkpoint that was quantized.
_DEQUANTIZE: Final = "load it with transformers, and save what model.dequantize() returns"
_MXFP4: Final = "load it with quantization_config=Mxfp4Config(dequantize=True), and save it"
_COMPRESSED: Final = "load it with quantization_config=CompressedTensorsConfig(dequantize=True), and save it"


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A quantizer.

    Attributes:
        title: what it is called, such as ``GPTQ``.
        way_out: how a user gets at weights that are not quantized, beside the checkpoint that was quantized.
        scaled_floats: True if its weights are 8-bit floats with scales, which are read as values.
    """

    title: str
    way_out: str = ""
    scaled_floats: bool = False

    def refusal(self) -> str:
        """Return why a checkpoint is not read, and what to give instead."""
        other = f", or {self.way_out}" if self.way_out else ""
        return (
            f"its weights are codes of {self.title}, which are not read as weights; give the checkpoint that was "
            f"quantized{other}"
        )


FP8: Final = Quantizer("FP8", scaled_floats=True)
# By ``quant_method`` in the configuration.
BY_METHOD: Final = {
    "aqlm": Quantizer("AQLM"),
    "auto-round": Quantizer("AutoRound"),
    "awq": Quantizer("AWQ"),
    "bitnet": Quantizer("BitNet"),
    "bitsandbytes": Quantizer("bitsandbytes", _DEQUANTIZE),
    "compressed-tensors": Quantizer("compressed-tensors", _COMPRESSED),
    "eetq": Quantizer("EETQ"),
    "fp_quant": Quantizer("FP-Quant"),
    "gptq": Quantizer("GPTQ"),
    "higgs": Quantizer("HIGGS", _DEQUANTIZE),
    "hqq": Quantizer("HQQ"),
    "modelopt": Quantizer("ModelOpt"),
    "mxfp4": Quantizer("MXFP4", _MXFP4),
    "nvfp4": Quantizer("NVFP4"),
    "quanto": Quantizer("quanto"),
    "quark": Quantizer("Quark"),
    "spqr": Quantizer("SpQR"),
    "torchao": Quantizer("torchao"),
    "vptq": Quantizer("VPTQ"),
}
# By the names of the tensors that no other quantizer has. The first that matches counts.
_BY_NAME: Final = tuple(
    (re.compile(pattern), quantizer)
    for pattern, quantizer in (
        (r"\.quant_state\.bitsandbytes__|\.(absmax|quant_map)$", Quantizer("bitsandbytes (4 bits)", _DEQUANTIZE)),
        (r"\.SCB$", Quantizer("bitsandbytes (8 bits)", _DEQUANTIZE)),
        (r"\.g_idx$", BY_METHOD["gptq"]),
        (r"\.qzeros$", BY_METHOD["awq"]),
        (r"\.W_q$", BY_METHOD["hqq"]),
        (r"\.(res_)?centroids(\.weight)?$", BY_METHOD["vptq"]),
        (r"\.codebooks$", BY_METHOD["aqlm"]),
        (r"\.(dense_weights|row_offsets|col_vals)$", BY_METHOD["spqr"]),
        (r"\.weight\._(data|scale)$", BY_METHOD["quanto"]),
        (r"weight_(scale_2|global_scale)$", BY_METHOD["nvfp4"]),
        (r"\.weight_packed$", Quantizer("compressed-tensors (packed integers)", _COMPRESSED)),
        (r"[._]qdata$", BY_METHOD["torchao"]),
        (r"\.weight_scales$", BY_METHOD["eetq"]),
        (r"\.qweight$", Quantizer("GPTQ or AWQ")),
    )
)
# Quantizers of several formats, among them 8-bit floats: the tensors say more than their names.
_SEVERAL: Final = (BY_METHOD["modelopt"], BY_METHOD["quark"])
_FP8_METHODS: Final = ("fp8", "fbgemm_fp8")
_NO_CODES: Final = re.compile(r"(mask|ids|index|bias)$")


def quantizer_of(checkpoint: Checkpoint) -> Quantizer | None:
    """Return the quantizer that has made a checkpoint's weights, or None if its weights are not quantized.

    A configuration alone does not count: a checkpoint may keep one after its weights were dequantized.
    """
    tensors, named = checkpoint.tensors, _by_config(checkpoint)
    ends = {_end(name) for name in tensors}
    found = next((quantizer for pattern, quantizer in _BY_NAME if any(map(pattern.search, ends))), None)
    found = found or _by_dtypes(tensors)
    if found is None:
        return named if any(may_be_codes(tensor) for tensor in tensors.values()) else None
    return found if found == FP8 or named is None or named in _SEVERAL else named


def _by_dtypes(tensors: dict[str, Tensor]) -> Quantizer | None:
    """Return the quantizer that the dtypes of the weights tell."""
    small = {tensor.dtype for tensor in tensors.values() if tensor.dtype not in (*_FLOATS, *_INTEGERS, "F8_E8M0")}
    if small & {"F4", "F6_E2M3", "F6_E3M2"}:
        return Quantizer("4-bit or 6-bit floats")
    if small - set(c.CODE_DTYPES):
        return Quantizer(f"8-bit floats of dtype {min(small - set(c.CODE_DTYPES))}")
    for name, tensor in tensors.items():
        if tensor.dtype == "U8" and name.endswith("_blocks"):
            return BY_METHOD["mxfp4"]
        if tensor.dtype in ("U8", "I8") and not {f"{name}_scale", f"{name}_scale_inv"}.isdisjoint(tensors):
            return BY_METHOD["bitnet"] if tensor.dtype == "U8" else Quantizer("8-bit integers with scales", _COMPRESSED)
    return FP8 if small else None


def _by_config(checkpoint: Checkpoint) -> Quantizer | None:
    """Return the quantizer that a configuration names."""
    settings = quantization_settings(checkpoint)
    method = settings.get("quant_method")
    if not isinstance(method, str) or method in _FP8_METHODS:
        return None
    form = settings.get("format")
    if method == "compressed-tensors" and isinstance(form, str):
        return Quantizer(f"compressed-tensors ({form})", _COMPRESSED)
    if method == "bitsandbytes":
        bits = 4 if settings.get("load_in_4bit") or settings.get("_load_in_4bit") else 8
        return Quantizer(f"bitsandbytes ({bits} bits)", _DEQUANTIZE)
    return BY_METHOD.get(method) or Quantizer(method)


def quantization_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint's configuration says of its quantization, or an empty map."""
    config = checkpoint.config()
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    for place in places:
        for key in SETTINGS:
            found = place.get(key)
            if isinstance(found, dict):
                return found
    beside = read_json(checkpoint.path / "hf_quant_config.json") if checkpoint.path.is_dir() else None
    inner = beside.get("quantization") if isinstance(beside, dict) else None
    return {"quant_method": "modelopt", **inner} if isinstance(inner, dict) else {}


# The keys of a configuration under which quantizers write what they did.
SETTINGS: Final = ("quantization_config", "compression_config")


def parts_of_codes(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the names of all tensors of modules whose weights are codes: they are of use as they are or not at all.

    For example, the scales of a module, which may look like a matrix of weights.
    """
    names = {name for name, tensor in checkpoint.tensors.items() if are_codes(tensor)}
    ends = {_end(name) for name in checkpoint.tensors}
    telling = {end for end in ends if any(pattern.search(end) for pattern, _ in _BY_NAME)}
    names |= {name for name in checkpoint.tensors if _end(name) in telling}
    names |= {name for name, tensor in checkpoint.tensors.items() if may_be_codes(tensor)}
    stems = {_stem(name) for name in names}
    return frozenset(name for name in checkpoint.tensors if _stem(name) in stems) if names else frozenset()


def _end(name: str) -> str:
    """Return the last two parts of a name, which tell as much as the whole: many tensors have few such ends."""
    return "." + ".".join(name.rsplit(".", 2)[-2:])


def _stem(name: str) -> str:
    """Return the module's name: ``x.q_proj`` for ``x.q_proj.weight_scale`` and ``x.q_proj.weight.absmax``."""
    return re.split(r"\.weight\b", name)[0] if re.search(r"\.weight\b", name) else name.rpartition(".")[0]


def are_codes(tensor: Tensor) -> bool:
    """Tell whether a tensor's dtype is one that only quantizers use."""
    return tensor.dtype not in (*_FLOATS, *_INTEGERS)


def may_be_codes(tensor: Tensor) -> bool:
    """Tell whether a tensor may be codes in the form of integers, if its checkpoint is quantized."""
    return tensor.dtype in ("I8", "U8", "I16", "I32") and len(tensor.shape) > 1 and not _NO_CODES.search(tensor.name)
