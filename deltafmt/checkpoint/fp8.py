"""Checkpoints of 8-bit floats with scales, read as the weights that they mean.

Savers agree that a weight is its code times its scale, and differ in names and shapes: one scale for a tensor, for each
row, for each expert, or for each block of, most often, 128 rows and 128 columns. Scales of activations are no part of
the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from deltafmt.checkpoint.dequantized import DequantizedTensor
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.quantizers import FP8, are_codes, may_be_codes, quantization_settings, quantizer_of
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, Remedy, UnsupportedError
from deltafmt.format import constants as c
from deltafmt.index.scaled import ScaledRef

# The block of DeepSeek-V3 and of whoever followed it.
USUAL_BLOCK: Final = 128

# What savers of 8-bit floats store beside the weights that is no part of them: scales of activations and of the cache.
_ACTIVATIONS: Final = re.compile(
    r"[._](input_scale(_ub)?|input_global_scale|output_scale|activation_scale|qscale_act|[qkv]_scale|kv_scale|prob_scale"
    r"|scale_input|k_proj\.output_scale)$|^scaled_fp8$"
)
_WEIGHT_SCALE: Final = re.compile(r"weight_scale(_inv)?$|qscale_weight$|scale_weight$|_scale_inv$")
_ZERO_POINT: Final = re.compile(r"weight_zero_point$")


def read_as_values(checkpoint: Checkpoint, *, exact: bool = True) -> None:
    """Replace a checkpoint's 8-bit floats by the BF16 values that they mean, and leave out their scales.

    A checkpoint that is not quantized stays as it is.

    Args:
        checkpoint: the checkpoint.
        exact: the caller can pack the stored bytes instead, and an error says so.

    Raises:
        UnsupportedError: its weights are the codes of a quantizer, which the message names.
        InvalidFileError: 8-bit floats lack their scales, or the scales have a shape that does not say what they scale.
    """
    remedy = Remedy("quantized", "exact") if exact else None
    quantizer = quantizer_of(checkpoint)
    if quantizer is None:
        return
    if quantizer != FP8:
        raise UnsupportedError(f"{checkpoint.path}: {quantizer.refusal()}", remedy)
    tensors = checkpoint.tensors
    zero_point = next((name for name in tensors if _ZERO_POINT.search(name)), None)
    if zero_point is not None:
        raise UnsupportedError(
            f'{checkpoint.path}: tensor "{zero_point}" moves 8-bit floats by zero points, which are not read', remedy
        )
    found, used = dict[str, DequantizedTensor](), set[str]()
    scaled = any(_WEIGHT_SCALE.search(name) for name in tensors)
    settings = quantization_settings(checkpoint)
    blocks = list(_blocks(settings))
    for name, tensor in tensors.items():
        if tensor.dtype not in c.CODE_DTYPES or _ACTIVATIONS.search(name):
            continue
        scales = _scales_of(checkpoint, name)
        if scales is None:
            if scaled or settings:
                raise InvalidFileError(f'{checkpoint.path}: tensor "{name}" has 8-bit floats and no scales', remedy)
            found[name] = DequantizedTensor.of(tensor, None, tuple(max(size, 1) for size in tensor.shape))
            continue
        block = block_of(tensor.shape, scales.shape, blocks)
        if scales.dtype not in c.SCALE_DTYPES or block is None:
            raise UnsupportedError(
                f'{checkpoint.path}: tensor "{scales.name}" {scales.dtype} {list(scales.shape)} does not say how '
                f'"{name}" {list(tensor.shape)} is scaled',
                remedy,
            )
        found[name] = DequantizedTensor.of(tensor, scales, block)
        used.add(scales.name)
    lost = next((name for name in tensors if _WEIGHT_SCALE.search(name) and name not in used), None)
    if lost is not None:
        raise InvalidFileError(f'{checkpoint.path}: tensor "{lost}" has the scales of no 8-bit floats', remedy)
    weights = {
        name: found.get(name, tensor)
        for name, tensor in tensors.items()
        if name not in used and not _ACTIVATIONS.search(name)
    }
    # Some checkpoints have 8-bit floats beside other codes, such as experts of 4 bits in bytes.
    codes = next((tensor for tensor in weights.values() if are_codes(tensor) or may_be_codes(tensor)), None)
    if codes is not None:
        raise UnsupportedError(
            f'{checkpoint.path}: tensor "{codes.name}" {codes.dtype} beside 8-bit floats is not read as weights', remedy
        )
    checkpoint.tensors = weights
    checkpoint.dequantized = len(found)


def read_recorded(checkpoint: Checkpoint, scaled: Mapping[str, ScaledRef]) -> None:
    """Read the 8-bit floats that a delta file describes as values, and others as :func:`read_as_values` does.

    What a file describes needs no guess about names and blocks. A base whose names are others is read as it tells
    itself.

    Raises:
        UnsupportedError, InvalidFileError: as :func:`read_as_values` raises them, if some of what the file describes
            is not there.
    """
    stored = checkpoint.tensors
    found = {name: DequantizedTensor.recorded(name, ref, stored) for name, ref in scaled.items()}
    told = {name: tensor for name, tensor in found.items() if tensor is not None}
    if len(told) < len(scaled):
        read_as_values(checkpoint, exact=False)
    checkpoint.tensors = {**checkpoint.tensors, **told}
    checkpoint.dequantized = max(checkpoint.dequantized, len(told))


def _scales_of(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Return the scales of some 8-bit floats, or None.

    Raises:
        InvalidFileError: two tensors may be the scales.
    """
    names = [f"{name}_scale_inv", f"{name}_scale"]
    stem, _, last = name.rpartition(".")
    if last == "weight":
        names += [f"{stem}.{other}" for other in ("scale", "qscale_weight", "scale_weight")]
    found = [checkpoint.tensors[one] for one in names if one in checkpoint.tensors]
    if len(found) > 1:
        raise InvalidFileError(
            f'{checkpoint.path}: tensors "{found[0].name}" and "{found[1].name}" may both be the scales of "{name}"'
        )
    return found[0] if found else None


def _blocks(settings: Any) -> Iterator[tuple[int, int]]:
    """Give the sizes of blocks that a configuration names, wherever they stand in it."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key in ("weight_block_size", "block_structure") and isinstance(value, list | tuple) and len(value) == 2:
            if all(type(size) is int and size > 0 for size in value):
                yield value[0], value[1]
        elif key == "group_size" and type(value) is int and value > 0:
            yield 1, value
        elif key != "input_activations":
            yield from _blocks(value)


def block_of(
    shape: tuple[int, ...], scales: tuple[int, ...], configured: Sequence[tuple[int, int]] = ()
) -> tuple[int, ...] | None:
    """Return the sizes of the blocks of a tensor that share a scale, or None if the shapes do not tell.

    Args:
        shape: the tensor's shape.
        scales: the shape of its scales.
        configured: sizes of blocks that a configuration names.
    """
    if c.element_count(scales) == 1:
        return tuple(max(size, 1) for size in shape)
    grid = _grid(shape, scales)
    if grid is None or 0 in grid:
        return None
    for rows, columns in (*configured, (USUAL_BLOCK, USUAL_BLOCK), (0, 0)):
        wanted = (0,) * (len(shape) - 2) + (rows, columns)[-len(shape) :]
        block = [_step(size, count, step) for size, count, step in zip(shape, grid, wanted, strict=True)]
        if all(block):
            return tuple(block)
    return None


def _grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the number of blocks in each dimension."""
    rank = len(shape)
    if len(scales) == rank:
        return scales
    if len(scales) < rank and scales == shape[: len(scales)]:
        return scales + (1,) * (rank - len(scales))
    if len(scales) == 2 * rank and set(scales[1::2]) == {1}:
        return scales[::2]
    return None


def _step(size: int, count: int, wanted: int) -> int:
    """Return the size of so many blocks of a dimension; 0 if the wanted size does not give them.

    If no size is wanted, only a power of two that goes into the dimension without a rest is believed.
    """
    if count == 1:
        return max(size, 1)
    if count == size:
        return 1
    if not wanted:
        even = size // count
        return even if size % count == 0 and even & (even - 1) == 0 else 0
    return wanted if -(-size // wanted) == count else 0
